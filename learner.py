"""How a sharded network learns: packed micro-batches without padding, and optimizer steps.

    for step in learner.steps(episodes, batches):
        for m in step.micro_batches():
            step.backward(loss of m, metrics of m)

The policy (ppo.py), PPO's value network (baselines/critic.py), sft.py and DPO+ (baselines/dpo.py) learn so.
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
    position_ids: torch.Tensor  # [1, L], from 0 in each episode
    rows: list[int]  # the index of each episode among the rank's
    lengths: list[int]  # of each episode
    cu_seqlens: torch.Tensor  # [episodes + 1], int32: where each episode begins, and L
    positions: torch.Tensor  # [N], where in the row each action token is predicted
    targets: torch.Tensor  # [N], the ids of the action tokens
    tokens: torch.Tensor  # [N], the index of each among all action tokens of the rank's episodes

    def inputs(self):
        """What the network and packed_attention get."""
        lengths = dict(lengths=self.lengths, cu_seqlens=self.cu_seqlens)
        return dict(input_ids=self.input_ids, position_ids=self.position_ids, **lengths)


def per_token(episodes, name, device):
    """A per-token field over all action tokens of the episodes: [N]. Raises ValueError if it is not set."""
    numbers = []
    for e in episodes:
        numbers += (field := getattr(e, name) or [])
        if len(field) != len(e.response_ids):
            raise ValueError(f"{name} has {len(field)} numbers for {len(e.response_ids)} tokens")
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def micro_batch(episodes, rows, device, empty=False):
    """The MicroBatch of the episodes `rows`.

    Two episodes of 2 + 1 and 2 + 2 tokens, prompt [7, 8] both, responses [1] and [2, 3]:

        input_ids     7 8 1 7 8 2 3      cu_seqlens  0 3 7
        position_ids  0 1 2 0 1 2 3      positions   1 4 5      targets  1 2 3

    empty: without action tokens (N = 0), for a rank that has fewer micro-batches than the others: FSDP needs
    the same number of forward and backward passes on all ranks.
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
    return MicroBatch(row[:1], row[1:], list(rows), lengths, cu_seqlens, actions[0], targets, actions[1])


def micro_batches(episodes, rows, max_tokens, device):
    """The episodes `rows` as MicroBatches of at most max_tokens tokens, or of one longer episode.

    Every rank gets the same number. They are filled evenly: from the longest episode to the shortest, each
    goes to the MicroBatch with the fewest tokens.
    """
    rows = sorted(rows, key=lambda i: len(episodes[i]), reverse=True)
    lengths = [len(episodes[i]) for i in rows]
    count = torch.tensor(fewest_parts(lengths, max_tokens), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    parts = [[rows[k] for k in part] for part in fill_evenly(lengths, count.item())]
    return [micro_batch(episodes, part or rows[-1:], device, empty=not part) for part in parts]


def fill_evenly(lengths, count):
    """Indices of the descending lengths in `count` parts: each goes to the part with the smallest sum."""
    parts, sums = [[] for _ in range(count)], [0] * count
    for i, length in enumerate(lengths):
        smallest = sums.index(min(sums))
        parts[smallest].append(i)
        sums[smallest] += length
    return parts


def fewest_parts(lengths, max_tokens):
    """The smallest count with which no part of fill_evenly exceeds max_tokens, or the longest length."""
    limit, count = max(max_tokens, *lengths[:1]), max(1, -(-sum(lengths) // max_tokens))
    while any(sum(lengths[i] for i in part) > limit for part in fill_evenly(lengths, count)):
        count += 1
    return count


def minibatches(num_episodes, s, step):
    """The rows of this rank's episodes in each minibatch of an update: s.epochs passes, shuffled anew.

    For example, eight episodes on each of two ranks, s.minibatch 8, one epoch: [[5, 0, 7, 2], [1, 6, 3, 4]].
    step: optimizer steps so far, which with s.seed are the seed. ValueError if the episodes do not divide.
    """
    size = s.minibatch // dist.get_world_size()
    if not num_episodes or num_episodes % size:
        raise ValueError(f"{num_episodes} episodes on this rank do not divide into minibatches of {size}")
    for epoch in range(s.epochs):
        generator = torch.Generator().manual_seed(hash((s.seed, step, epoch)) % 2**63)
        order = torch.randperm(num_episodes, generator=generator)
        yield from (rows.tolist() for rows in order.split(size))


def optimizer_steps(s):
    """Optimizer steps of a whole run; the learning rate decays over them."""
    return s.iterations * s.epochs * (s.prompts_per_iteration * s.responses_per_prompt // s.minibatch)


def learning_rate(step, total_steps, peak, warmup_fraction=0.03):
    """The rate at `step`, from 0: linear warm-up from 0 to peak, then linear decay to 0."""
    warmup = max(1, round(warmup_fraction * total_steps))
    return peak * min((step + 1) / warmup, max(0.0, (total_steps - step) / max(1, total_steps - warmup)))


class Step:
    """One optimizer step: a minibatch over all ranks; this rank has its episodes `rows`."""

    def __init__(self, learner, episodes, rows):
        self.learner, self.episodes, self.rows = learner, episodes, rows
        tokens = sum(len(episodes[i].response_ids) for i in rows)
        counts = torch.tensor([float(len(rows)), float(tokens)], device=learner.device)
        # of the whole minibatch
        self.num_responses, self.num_tokens = sum_over_ranks(counts).clamp(min=1).tolist()
        self.names, self.sums = [], 0.0

    def micro_batches(self):
        """The minibatch's MicroBatches, the same number on every rank."""
        return self.learner.micro_batches(self.episodes, self.rows)

    def backward(self, loss, metrics=None):
        """Add a micro-batch's part of the minibatch's loss, a scalar, to the gradient.

        The loss is divided by num_responses or num_tokens, so that the parts add up. metrics: {name: detached scalar
        tensor}, the same names each time, which add up likewise. One named "ratio" is the mean of pi / pi_old: where
        it exceeds MAX_RATIO, the step is skipped.
        """
        # FSDP averages over the ranks; the minibatch's gradient is their sum
        (loss * dist.get_world_size()).backward()
        self.names = ["loss", *(metrics or {})]
        self.sums = self.sums + torch.stack([loss.detach(), *(metrics or {}).values()])


class Learner:
    """A sharded network (see model.load_sharded), its optimizer, and its steps.

    learning_rate: peak, see learning_rate. total_steps: optimizer steps of the whole run.
    micro_batch_tokens: tokens per forward pass of a rank, or micro_batch: episodes per forward pass, in the
    order of the rows; they change memory and speed, not the result.
    """

    MAX_NORM = 1.0  # larger gradients are scaled down to this norm
    MAX_RATIO = 10.0  # a step whose mean ratio exceeds this is skipped, as in the released code
    MAX_SKIPPED = 32  # this many skipped in a row, two of the paper's iterations, end the run

    def __init__(
        self, model, device, learning_rate, total_steps, *, micro_batch_tokens=None, micro_batch=None
    ):
        self.model, self.device, self.peak, self.total_steps = model, device, learning_rate, total_steps
        self.micro_batch_tokens, self.micro_batch = micro_batch_tokens, micro_batch
        self.step, self.skipped = 0, 0  # optimizer steps so far; steps skipped in a row
        self.reports = []  # metrics of each step of the update
        options = dict(lr=learning_rate, weight_decay=0.0, fused=device.type != "cpu")
        self.optimizer = torch.optim.AdamW(model.parameters(), **options)

    def micro_batches(self, episodes, rows=None):
        """The MicroBatches of a minibatch, or of all episodes."""
        rows = range(len(episodes)) if rows is None else rows
        if self.micro_batch:
            parts = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
            return [micro_batch(episodes, part, self.device) for part in parts]
        return micro_batches(episodes, rows, self.micro_batch_tokens, self.device)

    def steps(self, episodes, batches):
        """Yield a Step for each minibatch; make the optimizer step after the loop's body has run.

        batches: the rows of this rank's episodes in each minibatch; every rank brings the same number.
        """
        self.reports = []
        for rows in batches:
            self.optimizer.zero_grad()
            step = Step(self, episodes, rows)
            yield step
            self.reports.append(self._finish(step))
        self.optimizer.zero_grad()  # frees the gradients' memory for the engine

    def _finish(self, step):
        """Clip the gradient and make the optimizer step, or skip it. Returns the minibatch's metrics."""
        lr = learning_rate(self.step, self.total_steps, self.peak)
        numbers = dict(zip(step.names, sum_over_ranks(step.sums).tolist()))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.MAX_NORM)
        norm = norm.full_tensor().item()
        finite = abs(numbers["loss"]) < float("inf") and norm < float("inf")  # False for NaN
        skipped = not (finite and numbers.get("ratio", 1.0) <= self.MAX_RATIO)
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.skipped = self.skipped + 1 if skipped else 0
        self.step += 1
        numbers |= {"grad_norm": norm, "learning_rate": lr}
        if self.skipped >= self.MAX_SKIPPED:
            last = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            raise RuntimeError(
                f"{self.skipped} optimizer steps in a row were skipped "
                f"because a number was not finite or the ratio too large; the last: {last}"
            )
        return numbers | {"skipped": skipped}

    def means(self):
        """skipped_steps, and the mean of each metric over the steps that were not skipped, or over all if all were."""
        made = [report for report in self.reports if not report["skipped"]] or self.reports
        names = [name for name in made[0] if name != "skipped"]
        means = {name: sum(report[name] for report in made) / len(made) for name in names}
        return means | {"skipped_steps": sum(report["skipped"] for report in self.reports)}

    def save(self, folder):
        """Write weights, optimizer and step count, sharded. All ranks call it."""
        save_state(folder, self.model, self.optimizer, self.step)

    def load(self, folder):
        self.step = load_state(folder, self.model, self.optimizer)
