"""PPO's update: whitened advantages, the clipped loss, the KL penalty, and the trainer of the policy.

The trainer of a run: trainer = Trainer(s, device). Then, on every rank and in every iteration, with its own episodes:
metrics = trainer.update(episodes). They need advantages and, for the metric logprob_gap, engine_logprobs.
"""

import torch

from learner import Learner, minibatches, optimizer_steps, per_token
from model import compute_dtype, full_tensors, load_sharded, save_pretrained
from support.ranks import sum_over_ranks


def whiten(advantages):
    """Advantages [N] of the action tokens with mean 0 and unbiased variance 1 over all ranks.

    The released code whitens each micro-batch; here all of an iteration's episodes are whitened at
    once, so the result does not depend on how they are batched. Advantages that are all equal become
    0.
    """
    values = advantages.to(torch.float64)
    sums = torch.stack([values.new_tensor(len(values)), values.sum()])
    count, total = sum_over_ranks(sums).tolist()
    centred = values - total / max(count, 1)
    variance = sum_over_ranks((centred**2).sum()).item() / max(count - 1, 1)
    return (centred / max(variance**0.5, 1e-8)).to(advantages.dtype)


def k3(ref_logprobs, logprobs):
    """The KL estimator exp(d) - d - 1 of each token [N], d = log pi_ref - log pi, clipped to [0, 10]."""
    d = ref_logprobs - logprobs
    return torch.clamp(d.exp() - d - 1, 0, 10)


def ppo_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, num_responses, num_tokens, *, clip=0.2, kl_coef=1e-4
):
    """Clipped policy loss plus KL penalty. The first four [N]: of the action tokens of some responses.

        policy = 1/num_tokens    sum_tokens max(-A rho, -A clip(rho, 1 - clip, 1 + clip))    rho = pi / pi_old
        kl     = 1/num_responses sum_tokens k3(pi_ref, pi)

    num_responses and num_tokens are those of the whole minibatch over all ranks, so the losses of its
    micro-batches add up to the minibatch's. Returns (loss, metrics): metrics are this micro-batch's
    contributions to the minibatch's means, detached scalars that add up likewise. Source: the released code's
    PPO trainer.
    """
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
            # of pi against pi_old, in nats per token
            "approx_kl": (ratio - 1 - log_ratio).sum() / num_tokens,
        }
    return policy_loss + kl_coef * kl, metrics


class Trainer:
    """Policy, optimizer and reference policy, sharded over the ranks.

    s: settings with model, bfloat16, trust_remote_code; temperature, whiten, kl_coef, learning_rate,
    micro_batch_tokens; and those of learner.minibatches and learner.optimizer_steps.
    """

    def __init__(self, s, device):
        self.s, self.device, self.dtype = s, device, compute_dtype(device, s.bfloat16)
        loading = dict(bfloat16=s.bfloat16, trust_remote_code=s.trust_remote_code)
        self.policy = load_sharded(s.model, device, **loading)
        self.reference = load_sharded(s.model, device, trainable=False, **loading)
        self.learner = Learner(
            self.policy, device, s.learning_rate, optimizer_steps(s), micro_batch_tokens=s.micro_batch_tokens
        )

    def update(self, episodes):
        """Train on one iteration's episodes of this rank.

        Every rank brings the same number, a multiple of its share of a minibatch. Returns metrics over all
        ranks: means over the optimizer steps of what ppo_loss and Learner report, those of the episodes before
        the update (see score), skipped_steps of this update, gradient_steps of all so far.
        """
        s, learner = self.s, self.learner
        advantages = per_token(episodes, "advantages", self.device)  # [N]
        if s.whiten:
            advantages = whiten(advantages)
        old_logprobs, ref_logprobs, scores = self.score(episodes)  # [N] each
        batches = minibatches(len(episodes), s, learner.step)  # epochs x minibatches, shuffled
        for step in learner.steps(episodes, batches):
            for m in step.micro_batches():  # packed, the same number on every rank
                logprobs = self.policy(m, s.temperature)  # [N of m]
                loss, metrics = ppo_loss(
                    logprobs, old_logprobs[m.tokens], ref_logprobs[m.tokens], advantages[m.tokens],
                    step.num_responses, step.num_tokens, kl_coef=s.kl_coef,
                )  # fmt: skip
                step.backward(loss, metrics)
        return scores | learner.means() | {"gradient_steps": learner.step}

    @torch.no_grad()
    def score(self, episodes):
        """(old_logprobs [N], ref_logprobs [N], metrics): a pass of each policy over the episodes,
        before the update.

        Before the very first optimizer step the two policies are identical, and the reference makes no pass.
        Metrics: entropy, in nats per token; kl to the reference, in nats per response; logprob_gap,
        the mean difference of the engine's and the trainer's log-probabilities at temperature 1 and
        before top-p, which is how the engine reports them.
        """
        engine_logprobs = per_token(episodes, "engine_logprobs", self.device)
        old, ref = torch.zeros(2, len(engine_logprobs), device=self.device)  # [N] each
        sums = torch.zeros(3, device=self.device)
        for m in self.learner.micro_batches(episodes):
            logprobs, at_one, entropy = self.policy(m, self.s.temperature, details=True)  # [N] each
            old[m.tokens] = logprobs
            ref[m.tokens] = self.reference(m, self.s.temperature) if self.learner.step else logprobs
            gap = (at_one - engine_logprobs[m.tokens]).abs()
            sums += torch.stack([entropy.sum(), k3(ref[m.tokens], logprobs).sum(), gap.sum()])
        self.reference.reshard()  # FSDP leaves the root's parameters gathered after a forward pass
        counts = torch.tensor([float(len(old)), float(len(episodes))], device=self.device)
        entropy, kl, gap, tokens, responses = sum_over_ranks(torch.cat([sums, counts])).tolist()
        tokens = max(tokens, 1)
        return old, ref, {"entropy": entropy / tokens, "kl": kl / responses, "logprob_gap": gap / tokens}

    def weights(self):
        """(name, whole tensor) of the policy, one at a time. All ranks must iterate together."""
        return full_tensors(self.policy)

    def save_pretrained(self, tokenizer, folder):
        """Write the policy as a Hugging Face folder. All ranks call it."""
        save_pretrained(self.policy, tokenizer, folder, self.dtype)

    def save(self, folder):
        self.learner.save(folder)

    def load(self, folder):
        self.learner.load(folder)
