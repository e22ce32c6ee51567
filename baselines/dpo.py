"""DPO-positive (arXiv 2402.13228), the paper's DPO+: learn from pairs of a right and a wrong
response that the policy wrote to one problem.

    torchrun --nproc_per_node=8 -m baselines.dpo --dataset math
    python -m baselines.dpo --dataset arithmetic --learning_rate 1e-4 --problems_per_round 256

    loss = -log sigmoid(beta (log rho(right) - log rho(wrong) - penalty max(0, -log rho(right))))
    rho(y) = pi(y) / pi_ref(y)

The penalty holds up the likelihood of the right response, which plain DPO lets fall as long as that
of the wrong one falls faster. The reference of a round is the policy that sampled its pairs; with
--rounds 1 that is DPO+ as published.
"""

import support.startup  # noqa: F401 (before torch is imported)

# isort: split
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from baselines import rounds
from learner import learning_rate, micro_batch
from model import load_sharded
from support.ranks import gather_lists, sum_over_ranks
from support.settings import setting


@dataclass
class Settings(rounds.Settings):
    beta: float = setting(0.3, "weight of the log-ratios", min=0)
    penalty: float = setting(50.0, "weight of the right response's loss of likelihood; 0: plain DPO", min=0)


def dpo_positive_loss(right, wrong, ref_right, ref_wrong, beta=0.3, penalty=50.0):
    """Loss of each pair [B] from the log-probabilities [B] of whole responses."""
    rho_right, rho_wrong = right - ref_right, wrong - ref_wrong
    return -F.logsigmoid(beta * (rho_right - rho_wrong - penalty * torch.relu(-rho_right)))


def pairs_of(episodes, cap, seed):
    """[(right episode, wrong episode)], at most `cap` to a problem, no response in two pairs."""
    rng = random.Random(seed)
    pairs = []
    for right, wrong in rounds.by_problem(episodes):
        n = min(cap, len(right), len(wrong))
        pairs += zip(rng.sample(right, n), rng.sample(wrong, n))
    return pairs


def response_logprobs(policy, episodes, device):
    """log pi(response | prompt) of each episode: [B]."""
    logprobs = policy(micro_batch(episodes, range(len(episodes)), device))
    return torch.stack([part.sum() for part in logprobs.split([len(e.response_ids) for e in episodes])])


def train_round(s, episodes, policy, device):
    """One round (see rounds.main): the policy that sampled the episodes, trained on their pairs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = policy or load_sharded(s.model, device)
    pairs = pairs_of(episodes, s.cap, s.seed)
    pairs = pairs[: len(pairs) // world * world]  # all ranks make the same number of passes
    if not pairs:
        return policy, 0, {"examples": 0}
    batch = min(s.batch, len(pairs))
    steps = max(1, int(len(pairs) * s.epochs) // batch)
    order = []
    for epoch in range(int(s.epochs) + 1):
        order += random.Random(s.seed + epoch).sample(range(len(pairs)), len(pairs))
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=s.learning_rate, weight_decay=0.0, fused=device.type == "cuda"
    )
    reference, losses = _reference_logprobs(s, policy, pairs, device), []
    for step in range(steps):
        mine = order[step * batch : (step + 1) * batch][rank::world]
        total = torch.zeros((), device=device)
        optimizer.zero_grad()
        for k in range(0, len(mine), s.micro_batch):
            rows = mine[k : k + s.micro_batch]
            both = [e for i in rows for e in pairs[i]]
            logprobs = response_logprobs(policy, both, device).view(-1, 2)  # [B, 2]: right, wrong
            ref = reference[rows].to(device)  # [B, 2]
            loss = dpo_positive_loss(*logprobs.T, *ref.T, s.beta, s.penalty).sum() / batch
            (loss * world).backward()  # FSDP averages over the ranks; we want the sum
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, s.learning_rate)
        optimizer.step()
        losses.append(sum_over_ranks(total).item())
    return policy, steps, {"examples": len(pairs), "loss": sum(losses) / len(losses)}


@torch.no_grad()
def _reference_logprobs(s, policy, pairs, device):
    """[pairs, 2], under the policy before its first step; each rank computes a share."""
    share = len(pairs) // dist.get_world_size()
    mine, parts = pairs[dist.get_rank() * share :][:share], []
    for k in range(0, share, s.micro_batch):
        both = [e for pair in mine[k : k + s.micro_batch] for e in pair]
        parts.append(response_logprobs(policy, both, device))
    return torch.tensor(gather_lists(torch.cat(parts).tolist())).view(-1, 2)


if __name__ == "__main__":
    rounds.main("dpo", __doc__, Settings, train_round)
