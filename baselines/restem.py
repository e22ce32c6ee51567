"""RestEM (arXiv 2312.06585): sample, keep the right responses, fine-tune the base model on them; repeat.

    torchrun --nproc_per_node=8 -m baselines.restem --dataset math
    python -m baselines.restem --dataset arithmetic --learning_rate 3e-4 --problems_per_round 256

Every round starts again from the base model, so what an early round taught does not pile up; the policy of
the round before only samples.
"""

import support.startup  # noqa: F401 (before torch is imported)

# isort: split
import random
from dataclasses import dataclass

import torch.distributed as dist

import sft
from baselines import rounds
from model import load_sharded
from support.settings import setting


@dataclass
class Settings(rounds.Settings):
    base_model: str | None = setting(None, "what every round fine-tunes; None: --model")


def right_responses(episodes, cap, seed):
    """At most `cap` distinct right responses per problem, chosen at random."""
    rng = random.Random(seed)
    return [e for right, _ in rounds.by_problem(episodes) for e in rng.sample(right, min(cap, len(right)))]


def train_round(s, episodes, policy, device):
    """One round (see rounds.main): the base model, fine-tuned on all ranks' right responses."""
    examples = right_responses(episodes, s.cap, s.seed)
    policy = load_sharded(s.base_model or s.model, device)
    if len(examples) < dist.get_world_size():
        return policy, 0, {"examples": len(examples)}
    learner = sft.finetune(policy, examples, device, s)
    return policy, learner.step, {"examples": len(examples), "loss": learner.means()["loss"]}


if __name__ == "__main__":
    rounds.main("restem", __doc__, Settings, train_round)
