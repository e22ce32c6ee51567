"""ppo_loss against the loss of TRL's GRPOTrainer, where TRL is installed (experiments/requirements-peers.txt)."""

import pytest
import torch
from conftest import EXACT

pytest.importorskip("trl", reason="TRL is not installed: pip install -r experiments/requirements-peers.txt")

from baselines.groups import grpo  # noqa: E402
from data import Problem  # noqa: E402
from episode import Episode  # noqa: E402
from experiments.peers import trl_trainer  # noqa: E402
from learner import micro_batch  # noqa: E402
from model import load_sharded  # noqa: E402
from ppo import ppo_loss  # noqa: E402

KL_COEF = 0.05  # of our sum over each response; large, so that the penalty is seen


def padded(rows, left=False):
    """(ids [B, L], mask [B, L]) of rows of unequal length."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows]
    mask = [
        [0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in rows
    ]
    return torch.tensor(ids), torch.tensor(mask)


def test_the_loss_is_that_of_trl_with_bnpo(tiny_model, device, tmp_path):
    """With its beta = kl_coef N / B, N tokens in B responses: the one is a mean over tokens, the other a
    sum over each response. And without its + 1e-4 beside the standard deviation.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 20, (count,), generator=generator).tolist()  # noqa: E731
    episodes = [Episode(draw(4 + i // 4), response_ids=draw(5 + 3 * i)) for i in range(8)]
    advantages = grpo([1.0, 0.0, 0.0, 1.0]) + grpo([0.0, 0.0, 1.0, 0.0])
    lengths = [len(e.response_ids) for e in episodes]
    policy = load_sharded(tiny_model, device, **EXACT)
    m = micro_batch(episodes, range(8), device)
    logprobs = policy(m, 1.0)  # [N]
    # far enough from the policy's that the clip and the penalty act
    old, ref = (logprobs.detach() + 0.3 * torch.randn(len(logprobs), generator=generator) for _ in range(2))
    per_token = torch.tensor([a for a, n in zip(advantages, lengths) for _ in range(n)])  # [N]
    loss, metrics = ppo_loss(logprobs, old, ref, per_token, num_responses=8, kl_coef=KL_COEF)
    loss.backward()
    assert 0.1 < metrics["clip_fraction"] < 0.9

    problems = [Problem(prompt="1+2?\n", answer="3")] * 16
    beta = KL_COEF * sum(lengths) / 8
    trainer = trl_trainer(tiny_model, problems, tmp_path, beta=beta)
    trainer.current_gradient_accumulation_steps = 1
    prompt_ids, prompt_mask = padded([e.prompt_ids for e in episodes], left=True)
    completion_ids, completion_mask = padded([e.response_ids for e in episodes])
    olds, refs = torch.zeros(2, *completion_ids.shape)
    olds[completion_mask.bool()], refs[completion_mask.bool()] = old, ref
    inputs = dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=completion_ids)
    inputs |= dict(completion_mask=completion_mask, advantages=torch.tensor(advantages))
    inputs |= dict(old_per_token_logps=olds, ref_per_token_logps=refs)
    theirs = trainer._compute_loss(trainer.model.train(), inputs)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, p in policy.network.named_parameters():
        found = p.grad.full_tensor()
        assert (found - expected[name]).norm() < 1e-4 * expected[name].norm(), name
    assert len(expected) == len(list(policy.network.parameters()))
