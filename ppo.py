"""PPO's update: the clipped loss, the KL penalty, whitening, packed micro-batches, and the trainer that runs them.

trainer = Trainer(path, device, total_steps=16_000)
metrics = trainer.update(episodes)      # on every rank, with its own episodes, whose advantages are set
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from model import compute_dtype, full_tensors, load_sharded, load_state, save_pretrained, save_state
from support.ranks import sum_over_ranks

# --- the formulas ---


def whiten(advantages):
    """Advantages [N] of the action tokens with mean 0 and unbiased variance 1 over all ranks.

    The released code whitens each micro-batch by itself; called once on an iteration's episodes,
    the result does not depend on how they are batched. Advantages that are all equal become 0.
    """
    values = advantages.to(torch.float64)
    count, total = sum_over_ranks(torch.stack([values.new_tensor(len(values)), values.sum()])).tolist()
    centred = values - total / max(count, 1)
    variance = sum_over_ranks((centred**2).sum()).item() / max(count - 1, 1)
    return (centred / max(variance**0.5, 1e-8)).to(advantages.dtype)


def k3(ref_logprobs, logprobs):
    """The KL estimator exp(d) - d - 1 of each token, d = log pi_ref - log pi, clipped to [0, 10]."""
    d = ref_logprobs - logprobs
    return torch.clamp(d.exp() - d - 1, 0, 10)


def ppo_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, num_responses, num_tokens=None, clip=0.2, kl_coef=1e-4
):
    """Clipped policy loss plus KL penalty. All tensors [N]: the action tokens of some responses, one behind the other.

        policy = 1/num_tokens    sum_tokens max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),   rho = pi / pi_old
        kl     = 1/num_responses sum_tokens k3(pi_ref, pi)

    num_tokens and num_responses are those of the whole minibatch over all ranks, so the losses of
    its micro-batches add up to the minibatch's; num_tokens None means that these tokens are the
    minibatch. Returns (loss, metrics): metrics are this micro-batch's contributions to the
    minibatch's means, detached scalars that add up likewise. Source: the released code's PPO
    trainer (paper.md).
    """
    num_tokens = len(logprobs) if num_tokens is None else num_tokens
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    policy_loss = torch.maximum(unclipped, clipped).sum() / num_tokens
    kl = k3(ref_logprobs, logprobs).sum() / num_responses
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "kl_loss": kl_coef * kl.detach(),
            "ratio": ratio.sum() / num_tokens,
            "clip_fraction": (clipped > unclipped).sum() / num_tokens,
            "approx_kl": (ratio - 1 - log_ratio).sum()
            / num_tokens,  # of pi against pi_old, in nats per token
        }
    return policy_loss + kl_coef * kl, metrics


def learning_rate(step, total_steps, peak, warmup_fraction=0.03):
    """Linear warm-up over the first warmup_fraction of the optimizer steps, then linear decay to 0. step counts from 0."""
    warmup = max(1, round(warmup_fraction * total_steps))
    return peak * min((step + 1) / warmup, max(0.0, (total_steps - step) / max(1, total_steps - warmup)))


# --- episodes in batches: packed one behind the other, without padding ---


@dataclass
class MicroBatch:
    """Some episodes of a rank, one behind the other in a row of L tokens. N of these are action tokens."""

    input_ids: torch.Tensor  # [1, L]
    position_ids: torch.Tensor  # [1, L], which begin at 0 in each episode
    lengths: list[int]  # of each episode
    cu_seqlens: torch.Tensor  # [episodes + 1], int32: where each begins, and L
    positions: torch.Tensor  # [N], where in the row each action token is predicted
    targets: torch.Tensor  # [N], the ids of the action tokens
    tokens: torch.Tensor  # [N], where each stands among the action tokens of all of the rank's episodes

    def inputs(self):
        """What the network and packed_attention get."""
        lengths = dict(lengths=self.lengths, cu_seqlens=self.cu_seqlens)
        return dict(input_ids=self.input_ids, position_ids=self.position_ids, **lengths)


def per_token(episodes, name, device):
    """A field of episodes that has a number per token, over all their action tokens [N]; 0 where an episode has none."""
    numbers = [x for e in episodes for x in getattr(e, name) or [0.0] * len(e.response_ids)]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def micro_batch(episodes, rows, device, actions=True):
    """The MicroBatch of the episodes `rows`. Without actions: a pass with N = 0, of a rank that has less to do than others."""
    begins = [0, *accumulate(len(e.response_ids) for e in episodes)]
    ids, position_ids, positions, tokens, lengths = [], [], [], [], []
    for i in rows:
        e = episodes[i]
        if actions:
            first = len(ids) + len(e.prompt_ids) - 1  # where the first action token is predicted
            positions += range(first, first + len(e.response_ids))
            tokens += range(begins[i], begins[i + 1])
        ids += e.prompt_ids + e.response_ids
        position_ids += range(len(e))
        lengths.append(len(e))
    row = torch.tensor([ids, position_ids]).to(device, non_blocking=True)
    positions, tokens = torch.tensor([positions, tokens], dtype=torch.long).to(device, non_blocking=True)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return MicroBatch(row[:1], row[1:], lengths, cu_seqlens, positions, row[0, positions + 1], tokens)


def micro_batches(episodes, rows, max_tokens, device):
    """The episodes `rows` as MicroBatches of at most max_tokens tokens (a longer episode alone), as many on every rank.

    They are filled evenly: from the longest episode to the shortest, each goes where the fewest
    tokens are.
    """
    rows = sorted(rows, key=lambda i: len(episodes[i]), reverse=True)
    lengths = [len(episodes[i]) for i in rows]
    count = torch.tensor(fewest_parts(lengths, max_tokens), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    parts = [[rows[k] for k in part] for part in fill_evenly(lengths, count.item())]
    return [micro_batch(episodes, part or rows[-1:], device, actions=bool(part)) for part in parts]


def fill_evenly(lengths, count):
    """Numbers of the lengths, which descend, in `count` parts: each goes where the sum is the smallest so far."""
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
    """Numbers of the episodes of each minibatch of `size`, in another order in every epoch. seed: a tuple of ints."""
    if not num_episodes or num_episodes % size:
        raise ValueError(f"{num_episodes} episodes on this rank do not divide into minibatches of {size}")
    for epoch in range(epochs):
        order = torch.randperm(
            num_episodes, generator=torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)
        )
        yield from (rows.tolist() for rows in order.split(size))


# --- the update ---


class Learner:
    """A sharded network and its optimizer: minibatches, micro-batches, gradients and skipped steps of each update.

    model: see model.load_sharded. total_steps: optimizer steps of the whole run, for the learning
    rate's decay. minibatch: episodes per optimizer step over all ranks. micro_batch_tokens: tokens
    per forward pass of a rank; it changes memory and speed, not the result. epochs: passes over the
    episodes in each update.
    """

    MAX_RATIO = 10.0  # a step whose mean ratio exceeds this is skipped (paper.md)
    MAX_SKIPPED = 32  # so many skipped in a row, two of the paper's iterations, end the run

    def __init__(
        self, model, device, *, total_steps, learning_rate=1e-6, minibatch=64, micro_batch_tokens=8192, epochs=2,
        max_grad_norm=1.0, seed=0,
    ):  # fmt: skip
        self.model, self.device, self.total_steps, self.peak, self.seed = (
            model,
            device,
            total_steps,
            learning_rate,
            seed,
        )
        self.minibatch, self.micro_batch_tokens = minibatch // dist.get_world_size(), micro_batch_tokens
        self.epochs, self.max_grad_norm = epochs, max_grad_norm
        self.step, self.skipped = 0, 0  # optimizer steps so far; steps skipped in a row
        options = dict(lr=learning_rate, weight_decay=0.0, fused=device.type == "cuda")
        self.optimizer = torch.optim.AdamW(model.parameters(), **options)

    def micro_batches(self, episodes, rows=None):
        """The MicroBatches of a minibatch, or of all episodes."""
        rows = range(len(episodes)) if rows is None else rows
        return micro_batches(episodes, rows, self.micro_batch_tokens, self.device)

    def fit(self, episodes, loss_of):
        """Epochs of optimizer steps on this rank's episodes; every rank brings as many.

        loss_of(m, num_responses, num_tokens): (the MicroBatch's part of the minibatch's loss,
        metrics that add up likewise). Returns the means over the optimizer steps, without skipped
        ones unless all are, and skipped_steps.
        """
        steps = []
        for rows in minibatches(len(episodes), self.minibatch, self.epochs, (self.seed, self.step)):
            steps.append(self._optimizer_step(episodes, rows, loss_of))
        self.optimizer.zero_grad()  # nothing stays beside the engine that need not
        skipped = sum(step["skipped"] for step in steps)
        kept = [step for step in steps if not step["skipped"]] or steps
        means = {name: sum(step[name] for step in kept) / len(kept) for name in steps[0] if name != "skipped"}
        return means | {"skipped_steps": skipped}

    def _optimizer_step(self, episodes, rows, loss_of):
        """One gradient step on the episodes `rows` of this rank and the other ranks' shares."""
        lr = learning_rate(self.step, self.total_steps, self.peak)
        tokens = sum(len(episodes[i].response_ids) for i in rows)
        counts = torch.tensor([float(len(rows)), float(tokens)], device=self.device)
        num_responses, num_tokens = sum_over_ranks(counts).clamp(min=1).tolist()  # of the minibatch
        self.optimizer.zero_grad()
        sums = 0.0
        for m in self.micro_batches(episodes, rows):
            loss, metrics = loss_of(m, num_responses, num_tokens)
            (
                loss * dist.get_world_size()
            ).backward()  # FSDP averages over the ranks; the minibatch's gradient is their sum
            sums = sums + torch.stack([loss.detach(), *metrics.values()])
        means = dict(zip(["loss", *metrics], sum_over_ranks(sums).tolist()))
        norm = (
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm).full_tensor().item()
        )
        finite = abs(means["loss"]) < float("inf") and norm < float(
            "inf"
        )  # False for NaN; the same on all ranks
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
        """Write the sharded weights and optimizer state, all ranks together; load reads them, on any number of ranks."""
        save_state(folder, self.model, self.optimizer, self.step)

    def load(self, folder):
        self.step = load_state(folder, self.model, self.optimizer)


class Trainer:
    """Policy, optimizer and reference policy, sharded over the ranks.

    path: Hugging Face folder or hub name that both policies start from. temperature: of the
    sampling. whiten_advantages: GRPO and RLOO bring advantages that are scaled already. loading:
    see model.load_sharded; learning: see Learner.
    """

    def __init__(
        self,
        path,
        device,
        *,
        clip=0.2,
        kl_coef=1e-4,
        temperature=1.0,
        whiten_advantages=True,
        loading=None,
        **learning,
    ):
        loading = loading or {}
        self.device, self.dtype = device, compute_dtype(device, loading.get("bfloat16"))
        self.clip, self.kl_coef, self.temperature = clip, kl_coef, temperature
        self.whiten_advantages = whiten_advantages
        self.policy = load_sharded(path, device, **loading)
        self.reference = load_sharded(path, device, trainable=False, **loading)
        self.learner = Learner(self.policy, device, **learning)

    def update(self, episodes):
        """Train on one iteration's episodes of this rank; every rank brings the same number, a multiple of its minibatch.

        Returns metrics over all ranks: means over the optimizer steps of what ppo_loss and Learner
        report, those of the episodes before the update (see score), skipped_steps of this update,
        gradient_steps of all so far.
        """
        advantages = per_token(episodes, "advantages", self.device)  # [N]
        if self.whiten_advantages:
            advantages = whiten(advantages)
        old_logprobs, ref_logprobs, metrics = self.score(episodes)

        def loss_of(m, num_responses, num_tokens):
            known = (x[m.tokens] for x in (old_logprobs, ref_logprobs, advantages))
            logprobs = self.policy(m, self.temperature)
            return ppo_loss(logprobs, *known, num_responses, num_tokens, self.clip, self.kl_coef)

        return metrics | self.learner.fit(episodes, loss_of) | {"gradient_steps": self.learner.step}

    @torch.no_grad()
    def score(self, episodes):
        """(old_logprobs [N], ref_logprobs [N], metrics): a pass of each policy over the episodes before the update.

        Before the first step of all the two policies are one, and the reference makes no pass.
        Metrics: entropy, in nats per token; kl to the reference, in nats per response; logprob_gap,
        the mean difference of the engine's and the trainer's log-probabilities at temperature 1 and
        before top-p, which both sides define alike.
        """
        engine_logprobs = per_token(episodes, "engine_logprobs", self.device)
        old, ref = torch.zeros(2, len(engine_logprobs), device=self.device)  # [N] each
        sums = torch.zeros(3, device=self.device)
        for m in self.learner.micro_batches(episodes):
            logprobs, at_one, entropy = self.policy(m, self.temperature, details=True)  # [N] each
            old[m.tokens] = logprobs
            ref[m.tokens] = self.reference(m, self.temperature) if self.learner.step else logprobs
            gap = (at_one - engine_logprobs[m.tokens]).abs()
            sums += torch.stack([entropy.sum(), k3(ref[m.tokens], logprobs).sum(), gap.sum()])
        self.reference.reshard()  # FSDP leaves the root's parameters gathered after a forward pass
        counts = torch.tensor([float(len(old)), float(len(episodes))], device=self.device)
        entropy, kl, gap, num_tokens, num_responses = sum_over_ranks(torch.cat([sums, counts])).tolist()
        per = max(num_tokens, 1)
        return old, ref, {"entropy": entropy / per, "kl": kl / num_responses, "logprob_gap": gap / per}

    def weights(self):
        """(name, whole tensor) of the policy, one at a time, for the engine. A collective: all ranks must iterate together."""
        return full_tensors(self.policy)

    def save_pretrained(self, tokenizer, folder):
        """Write the policy as a Hugging Face folder. All ranks call it."""
        save_pretrained(self.policy, tokenizer, folder, self.dtype)

    def save(self, folder):
        self.learner.save(folder)

    def load(self, folder):
        self.learner.load(folder)
