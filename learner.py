"""One optimizer step of a sharded network: minibatches, packed micro-batches without padding,
gradients, skipped steps.

The policy (ppo.py) and PPO's value network (baselines/critic.py) each have a Learner.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from model import load_state, save_state
from support.ranks import sum_over_ranks


@dataclass
class MicroBatch:
    """Some episodes of a rank, one after the other in a row of L tokens. N of them are action tokens."""

    input_ids: torch.Tensor  # [1, L]
    position_ids: torch.Tensor  # [1, L], which begin at 0 in each episode
    lengths: list[int]  # of each episode
    cu_seqlens: torch.Tensor  # [episodes + 1], int32: where each begins, and L
    positions: torch.Tensor  # [N], where in the row each action token is predicted
    targets: torch.Tensor  # [N], the ids of the action tokens
    tokens: torch.Tensor  # [N], the index of each among all action tokens of the rank's episodes

    def inputs(self):
        """What the network and packed_attention get."""
        lengths = dict(lengths=self.lengths, cu_seqlens=self.cu_seqlens)
        return dict(input_ids=self.input_ids, position_ids=self.position_ids, **lengths)


def per_token(episodes, name, device):
    """A per-token field of the episodes, over all their action tokens: [N]. ValueError if it is not set."""
    numbers = []
    for e in episodes:
        numbers += (field := getattr(e, name) or [])
        if len(field) != len(e.response_ids):
            raise ValueError(f"{name} has {len(field)} numbers for {len(e.response_ids)} tokens")
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def micro_batch(episodes, rows, device, empty=False):
    """The MicroBatch of the episodes `rows`.

    empty: without action tokens (N = 0), for a rank that has fewer micro-batches than the others:
    FSDP needs the same number of forward and backward passes on all of them.
    """
    begins = [0, *accumulate(len(e.response_ids) for e in episodes)]
    ids, position_ids, positions, tokens, lengths = [], [], [], [], []
    for i in rows:
        e = episodes[i]
        if not empty:
            first = len(ids) + len(e.prompt_ids) - 1  # where the first action token is predicted
            positions += range(first, first + len(e.response_ids))
            tokens += range(begins[i], begins[i + 1])
        ids += e.prompt_ids + e.response_ids
        position_ids += range(len(e))
        lengths.append(len(e))
    row = torch.tensor([ids, position_ids]).to(device, non_blocking=True)  # [2, L]
    actions = torch.tensor([positions, tokens], dtype=torch.long).to(device, non_blocking=True)  # [2, N]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    cu_seqlens, targets = cu_seqlens.to(device, non_blocking=True), row[0, actions[0] + 1]
    return MicroBatch(row[:1], row[1:], lengths, cu_seqlens, actions[0], targets, actions[1])


def micro_batches(episodes, rows, max_tokens, device):
    """The episodes `rows` as MicroBatches of at most max_tokens tokens, or of one longer episode; the
    same number on every rank.

    They are filled evenly: from the longest episode to the shortest, each goes where the fewest
    tokens are.
    """
    rows = sorted(rows, key=lambda i: len(episodes[i]), reverse=True)
    lengths = [len(episodes[i]) for i in rows]
    count = torch.tensor(fewest_parts(lengths, max_tokens), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    parts = [[rows[k] for k in part] for part in fill_evenly(lengths, count.item())]
    return [micro_batch(episodes, part or rows[-1:], device, empty=not part) for part in parts]


def fill_evenly(lengths, count):
    """Indices of the lengths, which descend, in `count` parts: each to the part with the smallest sum."""
    parts, sums = [[] for _ in range(count)], [0] * count
    for i, length in enumerate(lengths):
        smallest = sums.index(min(sums))
        parts[smallest].append(i)
        sums[smallest] += length
    return parts


def fewest_parts(lengths, max_tokens):
    """The fewest parts of fill_evenly that are no larger than max_tokens, or than the longest."""
    limit, count = max(max_tokens, *lengths[:1]), max(1, -(-sum(lengths) // max_tokens))
    while any(sum(lengths[i] for i in part) > limit for part in fill_evenly(lengths, count)):
        count += 1
    return count


def minibatches(num_episodes, size, epochs, seed):
    """Indices of the episodes of each minibatch, shuffled in every epoch. seed: a tuple of ints."""
    if not num_episodes or num_episodes % size:
        raise ValueError(f"{num_episodes} episodes on this rank do not divide into minibatches of {size}")
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)
        order = torch.randperm(num_episodes, generator=generator)
        yield from (rows.tolist() for rows in order.split(size))


def learning_rate(step, total_steps, peak, warmup_fraction=0.03):
    """The rate at `step`, from 0: linear warm-up from 0 to peak, then linear decay to 0."""
    warmup = max(1, round(warmup_fraction * total_steps))
    return peak * min((step + 1) / warmup, max(0.0, (total_steps - step) / max(1, total_steps - warmup)))


class Learner:
    """A sharded network, its optimizer, and how it makes the steps of an update.

    model: see model.load_sharded. total_steps: optimizer steps of the whole run, for the learning
    rate's decay. minibatch: episodes per optimizer step over all ranks. micro_batch_tokens: tokens
    per forward pass of a rank; it changes memory and speed, not the result. epochs: passes over the
    episodes in each update.
    """

    MAX_RATIO = 10.0  # a step whose mean ratio exceeds this is skipped, as in the released code
    MAX_SKIPPED = 32  # this many skipped in a row, two of the paper's iterations, end the run

    def __init__(
        self, model, device, *, total_steps, learning_rate=1e-6, minibatch=64, micro_batch_tokens=8192, epochs=2,
        max_grad_norm=1.0, seed=0,
    ):  # fmt: skip
        self.model, self.device, self.seed = model, device, seed
        self.total_steps, self.peak = total_steps, learning_rate
        self.minibatch, self.micro_batch_tokens = minibatch // dist.get_world_size(), micro_batch_tokens
        self.epochs, self.max_grad_norm = epochs, max_grad_norm
        self.step, self.skipped = 0, 0  # optimizer steps so far; steps skipped in a row
        options = dict(lr=learning_rate, weight_decay=0.0, fused=device.type != "cpu")
        self.optimizer = torch.optim.AdamW(model.parameters(), **options)

    def micro_batches(self, episodes, rows=None):
        """The MicroBatches of a minibatch, or of all episodes."""
        rows = range(len(episodes)) if rows is None else rows
        return micro_batches(episodes, rows, self.micro_batch_tokens, self.device)

    def fit(self, episodes, loss_of, counted=None):
        """Epochs of optimizer steps on this rank's episodes; every rank brings the same number.

        loss_of(m, num_responses, num_tokens) returns (the MicroBatch's part of the minibatch's loss,
        a scalar; metrics {name: scalar} that add up likewise). counted [N]: 1.0 for the action tokens that
        num_tokens counts, else 0.0; None: all. Returns the means over the optimizer steps, without skipped
        ones unless all are, and skipped_steps.
        """
        steps, tokens = [], [len(e.response_ids) for e in episodes]
        if counted is not None:
            tokens = torch.stack([part.sum() for part in counted.split(tokens)]).tolist()
        for rows in minibatches(len(episodes), self.minibatch, self.epochs, (self.seed, self.step)):
            steps.append(self._optimizer_step(episodes, rows, loss_of, sum(tokens[i] for i in rows)))
        self.optimizer.zero_grad()  # nothing stays beside the engine that need not
        skipped = sum(step["skipped"] for step in steps)
        kept = [step for step in steps if not step["skipped"]] or steps
        names = [name for name in steps[0] if name != "skipped"]
        means = {name: sum(step[name] for step in kept) / len(kept) for name in names}
        return means | {"skipped_steps": skipped}

    def _optimizer_step(self, episodes, rows, loss_of, tokens):
        """One gradient step on the episodes `rows` of this rank, which have `tokens` action tokens that
        count, and the other ranks' shares.
        """
        lr = learning_rate(self.step, self.total_steps, self.peak)
        counts = torch.tensor([float(len(rows)), float(tokens)], device=self.device)
        num_responses, num_tokens = sum_over_ranks(counts).clamp(min=1).tolist()  # of the minibatch
        self.optimizer.zero_grad()
        sums = 0.0
        for m in self.micro_batches(episodes, rows):
            loss, metrics = loss_of(m, num_responses, num_tokens)
            # FSDP averages over the ranks; the minibatch's gradient is their sum
            (loss * dist.get_world_size()).backward()
            sums = sums + torch.stack([loss.detach(), *metrics.values()])
        means = dict(zip(["loss", *metrics], sum_over_ranks(sums).tolist()))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = norm.full_tensor().item()
        finite = abs(means["loss"]) < float("inf") and norm < float("inf")  # False for NaN
        skipped = not (finite and means.get("ratio", 1.0) <= self.MAX_RATIO)
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.skipped = self.skipped + 1 if skipped else 0
        self.step += 1
        numbers = means | {"grad_norm": norm, "learning_rate": lr}
        if self.skipped >= self.MAX_SKIPPED:
            told = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            why = "since a number was not finite or the ratio too large"
            raise RuntimeError(
                f"{self.skipped} optimizer steps in a row were skipped, {why}; the last: {told}"
            )
        return numbers | {"skipped": skipped}

    def save(self, folder):
        """Write weights, optimizer and step count, sharded. All ranks call it."""
        save_state(folder, self.model, self.optimizer, self.step)

    def load(self, folder):
        self.step = load_state(folder, self.model, self.optimizer)
