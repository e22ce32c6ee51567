"""The loss against autograd on the plain formula; the update against itself in other micro-batches and on other numbers of ranks."""

import math
import sys

import pytest
import torch
from conftest import torchrun
from transformers import AutoModelForCausalLM

import ppo


def random_batch(seed=0, shape=(3, 7)):
    g = torch.Generator().manual_seed(seed)
    logprobs, old, ref = (-torch.rand(shape, generator=g) * 3 for _ in range(3))
    mask = (torch.rand(shape, generator=g) < 0.7).float()
    return logprobs, old, ref, torch.randn(shape, generator=g), mask


@pytest.mark.parametrize("clip,kl_coef", [(0.2, 1e-4), (0.05, 0.5), (10.0, 0.0)])
def test_loss_and_gradient_equal_the_plain_formula(clip, kl_coef):
    logprobs, old, ref, advantages, mask = random_batch()
    a, b = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    loss, metrics = ppo.ppo_loss(a, old, ref, advantages, mask, clip, kl_coef)

    policy, kl = 0.0, 0.0  # one token at a time, as the paper writes it
    for i in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[i, t]:
                ratio = torch.exp(b[i, t] - old[i, t])
                clipped = torch.minimum(torch.maximum(ratio, torch.tensor(1 - clip)), torch.tensor(1 + clip))
                policy = policy + torch.maximum(-advantages[i, t] * ratio, -advantages[i, t] * clipped)
                d = ref[i, t] - b[i, t]
                kl = kl + torch.clamp(torch.exp(d) - d - 1, 0, 10)
    plain = policy / mask.sum() + kl_coef * kl / mask.shape[0]
    loss.backward()
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(a.grad, b.grad)
    assert metrics["policy_loss"].item() == pytest.approx((policy / mask.sum()).item(), abs=1e-6)
    assert (a.grad[mask == 0] == 0).all()


def test_metrics_mean_what_their_names_say():
    ratio = torch.tensor([[1.0, 1.5, 0.5, 1.5]])
    old = torch.zeros(1, 4)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    _, metrics = ppo.ppo_loss(ratio.log(), old, old, advantages, torch.ones(1, 4))
    assert metrics["ratio"].item() == pytest.approx(4.5 / 4)
    assert metrics["clip_fraction"].item() == 0.5  # the second and the third; for the last the bound does not bite
    expected = sum(r - 1 - math.log(r) for r in (1.0, 1.5, 0.5, 1.5)) / 4
    assert metrics["approx_kl"].item() == pytest.approx(expected, rel=1e-5)


def test_kl_is_k3_and_clipped_to_ten():
    logprobs = torch.tensor([[-5.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-1.0, -1.5]])  # d = 4 would give 49.6; d = -0.5
    loss, _ = ppo.ppo_loss(logprobs, logprobs.detach(), ref, torch.zeros(1, 2), torch.ones(1, 2), kl_coef=1.0)
    assert loss.item() == pytest.approx(10 + math.exp(-0.5) + 0.5 - 1)
    loss.backward()
    assert logprobs.grad[0, 0] == 0 and logprobs.grad[0, 1].item() == pytest.approx(1 - math.exp(-0.5))


def test_padding_may_hold_anything():
    logprobs, old, ref, advantages, mask = random_batch()
    clean = [t.clone() for t in (logprobs, old, ref, advantages)]
    for t, value in zip((logprobs, old, ref, advantages), (float("-inf"), float("nan"), float("inf"), float("nan"))):
        t[mask == 0] = value
    logprobs.requires_grad_()
    loss, _ = ppo.ppo_loss(logprobs, old, ref, advantages, mask)
    loss.backward()
    torch.testing.assert_close(loss, ppo.ppo_loss(*clean, mask)[0])
    assert logprobs.grad.isfinite().all()


def test_losses_of_micro_batches_add_up():
    batch = random_batch(shape=(6, 7))
    mask = batch[-1]
    whole, metrics = ppo.ppo_loss(*batch)
    parts = [ppo.ppo_loss(*[t[i : i + 2] for t in batch], num_tokens=mask.sum(), num_responses=6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(m[name] for _, m in parts), value)


def test_whiten_has_mean_zero_and_unbiased_variance_one():
    *_, advantages, mask = random_batch(shape=(5, 9))
    white = ppo.whiten(advantages * 3 + 7, mask)
    inside = white[mask.bool()]
    assert inside.mean().item() == pytest.approx(0, abs=1e-6)
    assert inside.var(unbiased=True).item() == pytest.approx(1, rel=1e-5)
    assert (white[mask == 0] == 0).all()
    assert (ppo.whiten(torch.full((2, 3), 0.7), torch.ones(2, 3)).abs() < 1e-6).all()  # all equal: nothing to learn, no NaN
    assert (ppo.whiten(torch.ones(2, 3), torch.zeros(2, 3)) == 0).all()


def test_token_logprobs_are_those_of_the_tempered_softmax_and_ignore_right_padding(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[1, 5, 9, 4, 7], [1, 3, 8, 0, 0]])
    for temperature in (0.6, 1.0, 1.7):
        got = ppo.token_logprobs(model, ids, temperature=temperature)
        assert got.shape == (2, 4)
        for row, length in ((0, 5), (1, 3)):
            logits = model(ids[row : row + 1, :length]).logits[0].double() / temperature
            for t in range(length - 1):
                expected = logits[t, ids[row, t + 1]] - logits[t].logsumexp(0)
                assert got[row, t].item() == pytest.approx(expected.item(), abs=1e-5)


def test_entropy_of_a_uniform_and_a_tempered_distribution():
    assert ppo.token_entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))
    p = torch.tensor([0.2, 0.3, 0.5])
    assert ppo.token_entropy(2 * p.log()[None, None], temperature=2.0).item() == pytest.approx(-(p * p.log()).sum().item())


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [ppo.learning_rate(step, 1000, 1.0) for step in range(1001)]
    assert rates[0] == pytest.approx(1 / 30) and max(rates) == rates[29] == 1.0 or rates[30] == pytest.approx(1.0)
    assert rates[-1] == 0 and rates[-2] > 0
    assert all(a <= b for a, b in zip(rates[:30], rates[1:30])) and all(a >= b for a, b in zip(rates[31:], rates[32:]))


# --- the whole update -------------------------------------------------------------------------------------------------------------


def episodes(count=8):
    g = torch.Generator().manual_seed(3)
    return [
        {
            "prompt_ids": torch.randint(3, 20, (4 + i % 3,), generator=g).tolist(),
            "response_ids": torch.randint(3, 20, (5 + 3 * (i % 4),), generator=g).tolist(),
            "advantages": torch.randn(5 + 3 * (i % 4), generator=g).tolist(),
        }
        for i in range(count)
    ]


def updated_weights(model, device, rank=0, world=1, **changes):
    """Weights after two epochs of one minibatch of all eight episodes, spread over the ranks."""
    options = dict(total_steps=4, learning_rate=1e-2, minibatch=8, micro_batch=8, epochs=2, temperature=0.7, kl_coef=0.1)
    trainer = ppo.Trainer(model, device, **(options | changes))
    metrics = trainer.update(episodes()[rank::world])
    return {name: t.clone() for name, t in ppo.full_tensors(trainer.model)}, metrics


@pytest.fixture(scope="module")
def reference_update(tiny_model, device):
    return updated_weights(tiny_model, device)


def assert_same_weights(got, expected, model):
    """The two changes of the model's weights are equal to float tolerance, relative to their size."""
    for name, start in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        change = (expected[name] - start).norm()
        assert change > 1e-3, name  # something was learned
        assert (got[name] - expected[name]).norm() < 1e-3 * change, name


def assert_same_update(got, expected, model):
    assert_same_weights(got[0], expected[0], model)
    for name, value in expected[1].items():
        if name != "logprob_gap":
            assert got[1][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_micro_batch_size_does_not_change_the_update(tiny_model, device, reference_update, micro_batch):
    assert_same_update(updated_weights(tiny_model, device, micro_batch=micro_batch), reference_update, tiny_model)


def test_activation_checkpointing_does_not_change_the_update(tiny_model, device, reference_update):
    assert_same_update(updated_weights(tiny_model, device, checkpoint_activations=True), reference_update, tiny_model)


def test_two_ranks_make_the_update_of_one(tiny_model, reference_update, tmp_path):
    done = torchrun(2, __file__, tiny_model, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    assert_same_update(torch.load(tmp_path / "two.pt"), reference_update, tiny_model)


def test_the_update_equals_plain_torch(tiny_model, device, reference_update):
    """No FSDP, no batching, no library of ours but the plain formula: AdamW on the loss of eight sequences."""
    model, ref = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    def logprobs(m, e):
        ids = torch.tensor([e["prompt_ids"] + e["response_ids"]])
        logits = m(ids).logits[0, :-1] / 0.7
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[len(e["prompt_ids"]) - 1 :, 0]

    batch = episodes()
    flat = torch.tensor([a for e in batch for a in e["advantages"]])
    with torch.no_grad():
        old = [logprobs(model, e) for e in batch]
    for step in range(2):
        optimizer.zero_grad()
        loss = 0.0
        for e, o in zip(batch, old):
            advantage = (torch.tensor(e["advantages"]) - flat.mean()) / flat.std()
            new, d = logprobs(model, e), None
            ratio = (new - o).exp()
            loss = loss + torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).sum() / len(flat)
            d = logprobs(ref, e).detach() - new
            loss = loss + 0.1 * (d.exp() - d - 1).clamp(0, 10).sum() / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = ppo.learning_rate(step, 4, 1e-2)
        optimizer.step()
    assert_same_weights(model.state_dict(), reference_update[0], tiny_model)


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(tiny_model, device):
    trainer = ppo.Trainer(tiny_model, device, total_steps=4, learning_rate=1e-2, minibatch=8, micro_batch=8, epochs=1)
    before = {name: t.clone() for name, t in ppo.full_tensors(trainer.model)}
    broken = episodes()
    broken[3]["advantages"][0] = float("inf")
    assert trainer.update(broken)["skipped_steps"] == 1
    for name, tensor in ppo.full_tensors(trainer.model):
        assert torch.equal(tensor, before[name]), name


def test_a_step_whose_mean_ratio_is_too_large_is_skipped(tiny_model, device):
    trainer = ppo.Trainer(tiny_model, device, total_steps=4, learning_rate=1e-2, minibatch=8, micro_batch=8, epochs=2)
    before = {name: t.clone() for name, t in ppo.full_tensors(trainer.model)}
    trainer.MAX_RATIO = 0.5  # every ratio of the first step is 1
    assert trainer.update(episodes())["skipped_steps"] == 2
    for name, tensor in ppo.full_tensors(trainer.model):
        assert torch.equal(tensor, before[name]), name


def test_saved_training_state_continues_as_if_never_interrupted(tiny_model, device, tmp_path):
    options = dict(total_steps=8, learning_rate=1e-2, minibatch=4, micro_batch=4, epochs=2, seed=5)
    straight, first = (ppo.Trainer(tiny_model, device, **options) for _ in range(2))
    straight.update(episodes())
    straight.update(episodes())
    first.update(episodes())
    first.save(tmp_path / "state")
    second = ppo.Trainer(tiny_model, device, **options)
    second.load(tmp_path / "state")
    second.update(episodes())
    for (name, a), (_, b) in zip(ppo.full_tensors(straight.model), ppo.full_tensors(second.model)):
        assert torch.equal(a, b), name


def test_episodes_that_do_not_fill_the_minibatches_are_refused(tiny_model, device):
    trainer = ppo.Trainer(tiny_model, device, total_steps=4, minibatch=8)
    with pytest.raises(ValueError, match="5 episodes on this rank do not divide into minibatches of 8"):
        trainer.update(episodes(5))


def test_a_saved_model_loads_with_transformers(tiny_model, device, tokenizer, tmp_path):
    model = ppo.load_sharded(tiny_model, device)
    ppo.save_pretrained(model, tokenizer, tmp_path / "model", torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in ppo.full_tensors(model):
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name


if __name__ == "__main__":  # one rank of test_two_ranks_make_the_update_of_one
    device = ppo.init_distributed()
    result = updated_weights(sys.argv[1], device, torch.distributed.get_rank(), torch.distributed.get_world_size())
    if torch.distributed.get_rank() == 0:
        torch.save(result, sys.argv[2])
    torch.distributed.destroy_process_group()
