"""DPO-positive (arXiv 2402.13228), the paper's DPO+: learn from pairs of a right and a wrong response.

    torchrun --nproc_per_node=8 -m baselines.dpo --dataset math
    python -m baselines.dpo --dataset arithmetic --learning_rate 1e-4 --problems_per_round 256

    loss = -log sigmoid(beta (log rho(right) - log rho(wrong) - penalty max(0, -log rho(right))))
    rho(y) = pi(y) / pi_ref(y)

Both responses are the policy's own, to one problem. The penalty holds up the likelihood of the right
response; plain DPO lets it fall if the likelihood of the wrong response falls faster. The reference of a
round is the policy that sampled its pairs; with --rounds 1 this is DPO+ as published.
"""

import support.startup  # noqa: F401 (before torch is imported)

# isort: split
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from baselines import rounds
from learner import Learner
from model import load_sharded
from support.ranks import gather_lists
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
    """[(right episode, wrong episode)], at most `cap` per problem, no response in two pairs."""
    rng = random.Random(seed)
    pairs = []
    for right, wrong in rounds.by_problem(episodes):
        n = min(cap, len(right), len(wrong))
        pairs += zip(rng.sample(right, n), rng.sample(wrong, n))
    return pairs


def response_logprobs(policy, m, episodes):
    """log pi(response | prompt) of each episode of a MicroBatch: [B]."""
    lengths = [len(episodes[i].response_ids) for i in m.rows]
    return torch.stack([part.sum() for part in policy(m).split(lengths)])


def train_round(s, episodes, policy, device):
    """One round (see rounds.main): the policy that sampled the episodes, trained on their pairs."""
    world = dist.get_world_size()
    policy = policy or load_sharded(s.model, device)
    pairs = pairs_of(episodes, s.cap, s.seed)
    pairs = pairs[: len(pairs) // world * world]  # all ranks make the same number of passes
    if not pairs:
        return policy, 0, {"examples": 0}
    size = min(s.batch, len(pairs))
    total = max(1, int(len(pairs) * s.epochs) // size)
    learner = Learner(policy, device, s.learning_rate, total, micro_batch=2 * s.micro_batch)
    responses = [e for pair in pairs for e in pair]  # right, wrong, right, wrong, ..
    reference = _reference_logprobs(policy, responses, learner)  # [responses]
    for step in learner.steps(responses, batches(len(pairs), size, total, s)):
        for m in step.micro_batches():
            logprobs = response_logprobs(policy, m, responses).view(-1, 2)  # [B, 2]: right, wrong
            ref = reference[m.rows].view(-1, 2)  # [B, 2]
            losses = dpo_positive_loss(*logprobs.T, *ref.T, s.beta, s.penalty)  # [B]
            step.backward(losses.sum() / size)
    return policy, total, {"examples": len(pairs), "loss": learner.means()["loss"]}


def batches(count, size, total, s):
    """The rows of this rank's responses in each of `total` batches of `size` pairs, out of `count` pairs."""
    order = []
    for epoch in range(int(s.epochs) + 1):
        order += random.Random(s.seed + epoch).sample(range(count), count)
    for start in range(0, total * size, size):
        mine = order[start : start + size][dist.get_rank() :: dist.get_world_size()]
        yield [row for i in mine for row in (2 * i, 2 * i + 1)]


@torch.no_grad()
def _reference_logprobs(policy, responses, learner):
    """[responses], under the policy before its first step; each rank computes a share."""
    share = len(responses) // dist.get_world_size()
    mine = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    parts = [response_logprobs(policy, m, responses) for m in learner.micro_batches(responses, mine)]
    return torch.tensor(gather_lists(torch.cat(parts).tolist()), device=learner.device)


if __name__ == "__main__":
    rounds.main("dpo", __doc__, Settings, train_round)
