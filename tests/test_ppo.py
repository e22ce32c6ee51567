"""The loss against autograd on the plain formula; the update against itself in other micro-batches
and on other numbers of ranks.
"""

import math
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import EXACT, python, settings, torchrun
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

import learner
import model as networks
import ppo
from episode import Episode
from model import ChunkedLogprobs, device_mesh, full_tensors, load_sharded, save_pretrained, token_entropy
from support.ranks import exit_all, init_distributed


def random_tokens(count=15, seed=0):
    g = torch.Generator().manual_seed(seed)
    logprobs, old, ref = (-torch.rand(count, generator=g) * 3 for _ in range(3))
    return logprobs, old, ref, torch.randn(count, generator=g)


@pytest.mark.parametrize("clip,kl_coef", [(0.2, 1e-4), (0.05, 0.5), (10.0, 0.0)])
def test_loss_and_gradient_equal_the_plain_formula(clip, kl_coef):
    logprobs, old, ref, advantages = random_tokens()
    a, b = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    loss, metrics = ppo.ppo_loss(a, old, ref, advantages, 3, len(a), clip=clip, kl_coef=kl_coef)

    policy, kl = 0.0, 0.0  # one token at a time, as the paper writes it
    for t in range(len(b)):
        ratio = torch.exp(b[t] - old[t])
        clipped = torch.minimum(torch.maximum(ratio, torch.tensor(1 - clip)), torch.tensor(1 + clip))
        policy = policy + torch.maximum(-advantages[t] * ratio, -advantages[t] * clipped)
        d = ref[t] - b[t]
        kl = kl + torch.clamp(torch.exp(d) - d - 1, 0, 10)
    plain = policy / len(b) + kl_coef * kl / 3
    loss.backward()
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(a.grad, b.grad)
    assert metrics["policy_loss"].item() == pytest.approx((policy / len(b)).item(), abs=1e-6)


def test_metrics_mean_what_their_names_say():
    ratio, advantages, old = (
        torch.tensor([1.0, 1.5, 0.5, 1.5]),
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        torch.zeros(4),
    )
    _, metrics = ppo.ppo_loss(ratio.log(), old, old, advantages, 1, 4)
    assert metrics["ratio"].item() == pytest.approx(4.5 / 4)
    assert (
        metrics["clip_fraction"].item() == 0.5
    )  # the second and the third; for the last the bound does not bite
    expected = sum(r - 1 - math.log(r) for r in (1.0, 1.5, 0.5, 1.5)) / 4
    assert metrics["approx_kl"].item() == pytest.approx(expected, rel=1e-5)


def test_kl_is_k3_and_clipped_to_ten():
    logprobs = torch.tensor([-5.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0, -1.5])  # d = 4 would give 49.6; d = -0.5
    loss, _ = ppo.ppo_loss(logprobs, logprobs.detach(), ref, torch.zeros(2), 1, 2, kl_coef=1.0)
    assert loss.item() == pytest.approx(10 + math.exp(-0.5) + 0.5 - 1)
    loss.backward()
    assert logprobs.grad[0] == 0 and logprobs.grad[1].item() == pytest.approx(1 - math.exp(-0.5))


def test_losses_of_micro_batches_add_up():
    tokens = random_tokens()
    whole, metrics = ppo.ppo_loss(*tokens, 6, 15)
    parts = [
        ppo.ppo_loss(*[t[a:b] for t in tokens], 6, 15) for a, b in ((0, 4), (4, 4), (4, 15))
    ]  # one is empty
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(m[name] for _, m in parts), value)


def test_whiten_has_mean_zero_and_unbiased_variance_one():
    white = ppo.whiten(torch.randn(45) * 3 + 7)
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.var(unbiased=True).item() == pytest.approx(1, rel=1e-5)
    assert (ppo.whiten(torch.full((6,), 0.7)).abs() < 1e-6).all()  # all equal: nothing to learn, no NaN


def test_entropy_of_a_uniform_and_a_tempered_distribution():
    assert token_entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
    p = torch.tensor([0.2, 0.3, 0.5])
    assert token_entropy(2 * p.log()[None], temperature=2.0).item() == pytest.approx(
        -(p * p.log()).sum().item()
    )


# --- packing ---


def test_packed_logprobs_and_gradients_are_those_of_each_sequence_alone(tiny_model, device, monkeypatch):
    """Neighbours in the row do not see each other; neither the chunks of the head nor the empty
    pass change anything.
    """
    monkeypatch.setattr(networks, "LOGITS", 3 * 20)  # chunks of a few tokens
    model, plain = load_sharded(tiny_model, device, **EXACT), AutoModelForCausalLM.from_pretrained(tiny_model)
    m = learner.micro_batch(episodes(), [5, 0, 3], device)
    got = model(m, temperature=0.6).cpu()
    expected = []
    for i in (5, 0, 3):
        e = episodes()[i]
        ids = torch.tensor(e.prompt_ids + e.response_ids)
        logits = plain(ids[None]).logits[0].double() / 0.6
        expected += [
            logits[t - 1, ids[t]] - logits[t - 1].logsumexp(0) for t in range(len(e.prompt_ids), len(ids))
        ]
    expected = torch.stack(expected)
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-5)
    advantages = learner.per_token(episodes(), "advantages", device)[m.tokens].cpu()
    assert advantages.tolist() == pytest.approx([a for i in (5, 0, 3) for a in episodes()[i].advantages])
    (got * advantages).sum().backward()
    (expected * advantages).sum().backward()
    empty = model(learner.micro_batch(episodes(), [2], device, empty=True))
    assert len(empty) == 0
    empty.sum().backward()  # all parameters take part, so that FSDP's passes are the same on all ranks
    for (name, a), b in zip(model.network.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad.full_tensor().cpu(), b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_chunked_head_has_the_gradients_of_all_logits_at_once(monkeypatch):
    """Also those of a bias, and with a weight of its own for each token; bf16 up to its rounding."""
    monkeypatch.setattr(networks, "LOGITS", 3 * 20)
    torch.manual_seed(0)
    targets, upstream = torch.randint(20, (10,)), torch.randn(10)
    whole = [torch.randn(10, 8), torch.randn(20, 8), torch.randn(20)]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.03)):
        chunked = [x.detach().to(dtype).requires_grad_() for x in whole]
        plain = [x.detach().double().requires_grad_() for x in chunked]
        got = ChunkedLogprobs.apply(*chunked, targets, 0.6)
        expected = (F.linear(*plain) / 0.6).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        got.backward(upstream)
        expected.backward(upstream.double())
        for a, b in [(got, expected)] + [(x.grad, y.grad) for x, y in zip(chunked, plain)]:
            assert (a - b).norm() < tolerance * b.norm()


def test_a_sliding_window_is_kept(tiny_model, device, tmp_path):
    config = MistralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = MistralForCausalLM(config)
    plain.save_pretrained(tmp_path)
    model = load_sharded(tmp_path, device, **EXACT)
    m = learner.micro_batch(episodes(), [3, 4], device)
    row = m.input_ids[0, : m.lengths[0]].cpu()
    logprobs = plain(row[None]).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, row[1:, None])[len(episodes()[3].prompt_ids) - 1 :, 0]
    torch.testing.assert_close(model(m)[: len(expected)].cpu(), expected, atol=1e-5, rtol=1e-5)


def test_logits_that_the_model_changes_behind_the_head_are_refused(device, tmp_path):
    Gemma2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load_sharded(tmp_path, device)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 500))
def test_micro_batches_hold_each_episode_once_within_the_budget(lengths, budget):
    lengths = sorted(lengths, reverse=True)
    count = learner.fewest_parts(lengths, budget)
    parts = learner.fill_evenly(lengths, count)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths))) and len(parts) == count
    assert max(sum(lengths[i] for i in part) for part in parts) <= max(budget, lengths[0])
    if budget >= lengths[0]:  # at least half full on average, or one part
        assert count == 1 or sum(lengths) / count >= budget / 2
    more = learner.fill_evenly(lengths, count + 3)  # another rank needs more passes
    assert sorted(i for part in more for i in part) == list(range(len(lengths))) and len(more) == count + 3


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [learner.learning_rate(step, 1000, 1.0) for step in range(1001)]
    assert (
        rates[0] == pytest.approx(1 / 30)
        and max(rates) == rates[29] == 1.0
        or rates[30] == pytest.approx(1.0)
    )
    assert rates[-1] == 0 and rates[-2] > 0
    assert all(a <= b for a, b in zip(rates[:30], rates[1:30])) and all(
        a >= b for a, b in zip(rates[31:], rates[32:])
    )


# --- the whole update ---


def episodes(count=8):
    g = torch.Generator().manual_seed(3)
    return [
        Episode(
            prompt_ids=torch.randint(3, 20, (4 + i % 3,), generator=g).tolist(),
            response_ids=torch.randint(3, 20, (5 + 3 * (i % 4),), generator=g).tolist(),
            advantages=torch.randn(5 + 3 * (i % 4), generator=g).tolist(),
            engine_logprobs=[0.0] * (5 + 3 * (i % 4)),
        )
        for i in range(count)
    ]


def test_a_field_that_was_not_set_is_not_taken_for_zeros(tiny_model, device):
    unset, short = episodes(), episodes()
    unset[3].engine_logprobs = None
    short[3].advantages = short[3].advantages[1:]
    trainer = ppo.Trainer(settings(tiny_model), device)
    with pytest.raises(ValueError, match="engine_logprobs has 0 numbers for"):
        trainer.update(unset)
    with pytest.raises(ValueError, match="advantages has"):
        trainer.update(short)


def updated_weights(model, device, rank=0, world=1, **changes):
    """Weights after two epochs of one minibatch of all eight episodes, spread over the ranks."""
    options = dict(learning_rate=1e-2, micro_batch_tokens=1000, temperature=0.7, kl_coef=0.1)
    trainer = ppo.Trainer(settings(model, **options | changes), device)
    metrics = trainer.update(episodes()[rank::world])
    return {name: t.to("cpu", copy=True) for name, t in trainer.weights()}, metrics


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


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_micro_batch_size_does_not_change_the_update(tiny_model, device, reference_update, tokens):
    assert_same_update(
        updated_weights(tiny_model, device, micro_batch_tokens=tokens), reference_update, tiny_model
    )


def test_activation_checkpointing_does_not_change_the_update(
    tiny_model, device, reference_update, monkeypatch
):
    monkeypatch.setattr(ppo, "load_sharded", partial(load_sharded, checkpoint_activations=True))
    assert_same_update(updated_weights(tiny_model, device), reference_update, tiny_model)


@pytest.mark.parametrize("whiten", [True, False])
def test_the_scale_of_the_advantages_matters_only_where_they_are_not_whitened(tiny_model, device, whiten):
    scales = []
    for scale in (1.0, 0.1):
        trainer = ppo.Trainer(settings(tiny_model, epochs=1, whiten=whiten, kl_coef=0.0), device)
        batch = episodes()
        for e in batch:
            e.advantages = [scale * a for a in e.advantages]
        scales.append(trainer.update(batch)["grad_norm"])
    assert scales[0] == pytest.approx(scales[1] if whiten else 10 * scales[1], rel=1e-3)


def test_two_ranks_make_the_update_of_one(tiny_model, reference_update, tmp_path):
    done = torchrun(2, __file__, tiny_model, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    assert_same_update(torch.load(tmp_path / "two.pt"), reference_update, tiny_model)


def test_two_machines_that_hold_a_copy_each_make_the_update_of_one(tiny_model, reference_update, tmp_path):
    """Two machines of one rank each: what FSDP2 replicates stays equal."""
    port = free_port()
    nodes = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        2,
        "--nproc_per_node",
        1,
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
    ]
    run = lambda rank: python(*nodes, "--node_rank", rank, __file__, tiny_model, tmp_path / "copies.pt")
    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(run, range(2)):
            assert done.returncode == 0, done.stderr
    assert_same_update(torch.load(tmp_path / "copies.pt"), reference_update, tiny_model)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_update_equals_plain_torch(tiny_model, device, reference_update):
    """No FSDP, no batching, no library of ours but the plain formula: AdamW on the loss of eight
    sequences.
    """
    model, ref = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    def logprobs(m, e):
        ids = torch.tensor([e.prompt_ids + e.response_ids])
        logits = m(ids).logits[0, :-1] / 0.7
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[len(e.prompt_ids) - 1 :, 0]

    batch = episodes()
    flat = torch.tensor([a for e in batch for a in e.advantages])
    with torch.no_grad():
        old = [logprobs(model, e) for e in batch]
    for step in range(2):
        optimizer.zero_grad()
        loss = 0.0
        for e, o in zip(batch, old):
            advantage = (torch.tensor(e.advantages) - flat.mean()) / flat.std()
            new, d = logprobs(model, e), None
            ratio = (new - o).exp()
            loss = loss + torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).sum() / len(
                flat
            )
            d = logprobs(ref, e).detach() - new
            loss = loss + 0.1 * (d.exp() - d - 1).clamp(0, 10).sum() / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learner.learning_rate(step, 4, 1e-2)
        optimizer.step()
    assert_same_weights(model.state_dict(), reference_update[0], tiny_model)


SMALL = dict(
    vocab_size=20, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.05,
)  # fmt: skip
ARCHITECTURES = dict(
    llama=LlamaConfig(**SMALL, tie_word_embeddings=False),
    tied_llama=LlamaConfig(**SMALL, tie_word_embeddings=True),
    qwen2=Qwen2Config(**SMALL),
    qwen3=Qwen3Config(**SMALL, head_dim=16),
    mistral_with_a_window=MistralConfig(**SMALL, sliding_window=8),
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_update_in_bfloat16_is_near_that_in_float32(name, device, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "ppo_loss", partial(ppo.ppo_loss, clip=10))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES[name]).save_pretrained(tmp_path)
    both = [
        updated_weights(tmp_path, device, learning_rate=3e-4, bfloat16=short)[1] for short in (False, True)
    ]
    exact, short = both
    for metric in ("loss", "ratio", "kl_loss", "approx_kl"):  # without the jumps of a clipped loss
        assert short[metric] == pytest.approx(exact[metric], abs=1e-3), metric
    assert exact["grad_norm"] > 0.1 and short["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.01)
    assert exact["kl_loss"] > 0 and exact["approx_kl"] > 0  # the policy moved between the two steps


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(tiny_model, device):
    trainer = ppo.Trainer(settings(tiny_model, learning_rate=1e-2, epochs=1), device)
    before = {name: t.clone() for name, t in trainer.weights()}
    broken = episodes()
    broken[3].advantages[0] = float("inf")
    assert trainer.update(broken)["skipped_steps"] == 1
    for name, tensor in trainer.weights():
        assert torch.equal(tensor, before[name]), name


def test_many_skipped_steps_in_a_row_end_the_run_with_the_weights_as_they_were(tiny_model, device):
    trainer = ppo.Trainer(settings(tiny_model, learning_rate=1e-2), device)
    before = {name: t.clone() for name, t in trainer.weights()}
    trainer.learner.MAX_SKIPPED = 4
    broken = episodes()
    broken[3].advantages[0] = float("nan")
    assert trainer.update(broken)["skipped_steps"] == 2 and trainer.learner.skipped == 2
    with pytest.raises(RuntimeError, match="4 optimizer steps in a row were skipped.*loss nan"):
        trainer.update(broken)
    for name, tensor in trainer.weights():
        assert torch.equal(tensor, before[name]), name
    trainer.update(episodes())
    assert trainer.learner.skipped == 0


def test_responses_without_a_token_and_equal_rewards_go_through(tiny_model, device):
    """What the engine gave up before its first token; and advantages that are all equal."""
    for all_empty in (True, False):
        trainer = ppo.Trainer(settings(tiny_model, learning_rate=1e-2), device)
        batch = episodes()
        for i, e in enumerate(batch):
            if all_empty or i % 3 == 0:
                e.response_ids, e.advantages, e.engine_logprobs = [], [], None
            e.advantages = [0.5] * len(e.advantages)
        metrics = trainer.update(batch)
        assert all(math.isfinite(value) for value in metrics.values()) and metrics["skipped_steps"] == 0, (
            metrics
        )
        assert metrics["grad_norm"] < 1e-6


def test_code_of_a_model_is_not_run(device, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_sharded(tmp_path, device)
    assert not (tmp_path / "it_ran").exists()


def test_a_step_whose_mean_ratio_is_too_large_is_skipped(tiny_model, device):
    trainer = ppo.Trainer(settings(tiny_model, learning_rate=1e-2), device)
    before = {name: t.clone() for name, t in trainer.weights()}
    trainer.learner.MAX_RATIO = 0.5  # every ratio of the first step is 1
    assert trainer.update(episodes())["skipped_steps"] == 2
    for name, tensor in trainer.weights():
        assert torch.equal(tensor, before[name]), name


def test_saved_training_state_continues_as_if_never_interrupted(tiny_model, device, tmp_path):
    s = settings(tiny_model, learning_rate=1e-2, minibatch=4, seed=5)
    straight, first = (ppo.Trainer(s, device) for _ in range(2))
    straight.update(episodes())
    straight.update(episodes())
    first.update(episodes())
    first.save(tmp_path / "state")
    second = ppo.Trainer(s, device)
    second.load(tmp_path / "state")
    second.update(episodes())
    for (name, a), (_, b) in zip(straight.weights(), second.weights()):
        assert torch.equal(a, b), name


def test_saving_before_the_first_step_that_is_not_skipped_counts_no_step(tiny_model, device, tmp_path):
    """torch makes a step to have a state that can be saved; the next one would have 74 % of its size."""
    s = settings(tiny_model, learning_rate=1e-2, seed=5)
    straight, saved = (ppo.Trainer(s, device) for _ in range(2))
    broken = episodes()
    broken[3].advantages[0] = float("inf")
    for trainer in straight, saved:
        assert trainer.update(broken)["skipped_steps"] == 2
    saved.save(tmp_path / "state")
    resumed = ppo.Trainer(s, device)
    resumed.load(tmp_path / "state")
    for trainer in straight, saved, resumed:
        trainer.update(episodes())
    for (name, a), (_, b), (_, c) in zip(straight.weights(), saved.weights(), resumed.weights()):
        assert torch.equal(a, b) and torch.equal(a, c), name


def test_episodes_that_do_not_fill_the_minibatches_are_refused(tiny_model, device):
    trainer = ppo.Trainer(settings(tiny_model), device)
    with pytest.raises(ValueError, match="5 episodes on this rank do not divide into minibatches of 8"):
        trainer.update(episodes(5))


def test_a_saved_model_loads_with_transformers(tiny_model, device, tokenizer, tmp_path):
    model = load_sharded(tiny_model, device, **EXACT)
    save_pretrained(model, tokenizer, tmp_path / "model", torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in full_tensors(model):
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name


if __name__ == "__main__":  # one of two ranks
    device = init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    machines = world // int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # vLLM on CPU does that
    result = updated_weights(sys.argv[1], device, rank, world)
    assert device_mesh(device).shape == ((2, 1) if machines == 2 else (2,))
    if torch.distributed.get_rank() == 0:
        torch.save(result, sys.argv[2])
    exit_all()
