"""simple.py against the real path on the same sampled ids, and as its user runs it."""

import ast
import json
import runpy
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import GAP, ROOT, python, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import learner
import ppo
import simple
import train
import vine
from episode import Episode

SETTINGS = simple.Settings(
    responses_per_prompt=3, K=2, temperature=0.7, max_tokens=40, stop="#", kl_coef=0.1, minibatch=12, micro_batch=5
)  # fmt: skip


class Chance:
    """An untrained policy is never right: these rewards differ, and depend on the text alone."""

    def grade(self, texts, golds):
        return [zlib.crc32(text.encode()) % 3 == 0 for text in texts]


class Yes:
    def grade(self, texts, golds):
        return [True] * len(texts)


@pytest.fixture(scope="module")
def starts(tiny_model):
    problems, _ = data.encode(data.load("arithmetic")[0][:3], AutoTokenizer.from_pretrained(tiny_model), 40)
    starts = [(tuple(p.prompt_ids), (), p.answer) for p in problems]
    return [*starts, starts[0]]  # one problem is drawn twice


@pytest.fixture(scope="module")
def collected(engine, starts):
    """(the responses, the rollouts from their states)"""
    engine.seed(0)
    sampled = []

    def recorded(*arguments):
        sampled.append(plain(*arguments))
        return sampled[-1]

    plain, simple.sample = simple.sample, recorded
    responses = simple.collect(engine.llm, Chance(), starts, SETTINGS)
    simple.sample = plain
    assert sampled[0] is responses
    return responses, sampled[1]


def real_path(responses, values, model, device, s, learning_rate):
    """What vine.py, ppo.py and learner.py make of responses and their states' values, for a minibatch of them all:
    advantages, whitened too [tokens]; loss and gradient of given old and reference log-probabilities; and the
    weights after an update.
    """
    episodes = []
    for r in responses:
        steps = vine.step_advantages([values[state] for state in r.states], r.reward)
        tokens = vine.token_advantages(r.steps, steps)
        nothing = [0.0] * len(tokens)
        ids = dict(prompt_ids=list(r.prompt), response_ids=list(r.ids))
        episodes.append(Episode(**ids, advantages=tokens, engine_logprobs=nothing))
    advantages = learner.per_token(episodes, "advantages", device)
    whitened = ppo.whiten(advantages)
    names = ("epochs", "kl_coef", "temperature")
    options = {name: getattr(s, name) for name in names} | dict(learning_rate=learning_rate, iterations=1)
    count = len(responses)
    sizes = dict(minibatch=count, prompts_per_iteration=count, responses_per_prompt=1)
    trainer = ppo.Trainer(settings(model, **options | sizes), device)

    def loss_and_gradient(old, ref):
        m = learner.micro_batch(episodes, range(len(episodes)), device)
        logprobs = trainer.policy(m, s.temperature)
        sampled = old[m.tokens], ref[m.tokens], whitened[m.tokens]
        options = dict(clip=s.clip, kl_coef=s.kl_coef)
        loss, _ = ppo.ppo_loss(logprobs, *sampled, len(episodes), len(m.tokens), **options)
        loss.backward()
        gradient = {name: p.grad.full_tensor() for name, p in trainer.policy.network.named_parameters()}
        trainer.policy.zero_grad()
        return loss.item(), gradient

    def updated_weights():
        trainer.update(episodes)
        return dict(trainer.weights())

    return SimpleNamespace(
        advantages=advantages, whitened=whitened, loss_and_gradient=loss_and_gradient, updated_weights=updated_weights
    )  # fmt: skip


def values_of(rollouts):
    rewards = {}
    for tau in rollouts:
        rewards.setdefault((tau.prompt, tau.prefix, tau.answer), []).append(tau.reward)
    return {state: vine.monte_carlo_value(found) for state, found in rewards.items()}


def network(model, device):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)


# --- against the real path ---


def test_every_distinct_state_gets_k_rollouts_that_continue_the_sampled_ids(collected):
    responses, rollouts = collected
    states = [state for r in responses for state in r.states]
    visits = [(tau.prompt, tau.prefix, tau.answer) for tau in rollouts]
    assert set(visits) == set(states) and len(set(states)) < len(states)  # the prompts, at least, are shared
    assert all(visits.count(state) == SETTINGS.K for state in set(states))
    assert any(len(r.states) > 2 for r in responses)
    for r in responses:
        assert [len(prefix) for _, prefix, _ in r.states] == r.steps[:-1] and r.steps[-1] == len(r.ids)
        assert all(prefix == r.ids[: len(prefix)] for _, prefix, _ in r.states)
    assert all(len(tau.prefix + tau.ids) <= SETTINGS.max_tokens for tau in rollouts)


def test_the_reward_of_what_is_unfinished_is_zero(engine, starts, tokenizer):
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("#")}
    rollouts = simple.sample(engine.llm, Yes(), starts, 32, replace(SETTINGS, max_tokens=10))
    assert [r.reward for r in rollouts] == [float(r.ids[-1] in stops) for r in rollouts]
    assert {r.reward for r in rollouts} == {0.0, 1.0}
    assert not any("#" in r.text for r in rollouts)


def test_the_advantages_are_those_of_the_real_path(collected, tiny_model, device):
    responses, rollouts = collected
    real = real_path(responses, values_of(rollouts), tiny_model, device, SETTINGS, 1e-4)
    ours = torch.cat([r.advantages for r in responses])
    torch.testing.assert_close(ours, real.advantages.cpu(), atol=1e-7, rtol=0)
    assert len(ours.unique()) > 2 and any(r.reward for r in responses)


def test_loss_gradient_and_weights_are_those_of_the_real_path(collected, tiny_model, device):
    """The gradient with ratios and a KL that are not trivial; the weights after two optimizer steps, of which the
    second has such.
    """
    responses, rollouts = collected
    real = real_path(responses, values_of(rollouts), tiny_model, device, SETTINGS, 1e-5)
    policy, reference = network(tiny_model, device), network(tiny_model, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0)
    simple.update(policy, reference, optimizer, responses, SETTINGS)
    torch.testing.assert_close(torch.cat([r.advantages for r in responses]), real.whitened, atol=1e-6, rtol=0)
    before, after = network(tiny_model, device).state_dict(), real.updated_weights()
    assert any((after[name] - before[name]).abs().max() > 1e-5 for name in after)
    for name, weight in policy.state_dict().items():
        torch.testing.assert_close(weight, after[name], atol=1e-6, rtol=0, msg=name)

    policy, real = (
        network(tiny_model, device),
        real_path(responses, values_of(rollouts), tiny_model, device, SETTINGS, 0.1),
    )
    noise = torch.Generator().manual_seed(0)
    new = simple.logprobs(policy, responses, SETTINGS)
    for r, logp in zip(responses, new):
        for name in ("old_logprobs", "ref_logprobs"):
            shift = 0.3 * torch.randn(len(r.ids), generator=noise).to(device)
            setattr(r, name, logp.detach() + shift)
    size = sum(len(r.ids) for r in responses), len(responses)
    loss = sum(simple.ppo_loss(logp, r, *size, SETTINGS) for logp, r in zip(new, responses))
    loss.backward()
    old, ref = (torch.cat([getattr(r, name) for r in responses]) for name in ("old_logprobs", "ref_logprobs"))
    expected, gradient = real.loss_and_gradient(old, ref)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    for name, p in policy.named_parameters():
        assert (p.grad - gradient[name]).norm() < 1e-5 * gradient[name].norm(), name


# --- as its user runs it ---


SHORT = ["--prompts_per_iteration", 4, "--minibatch", 4, "--K", 2, "--max_tokens", 20, "--memory", 0.1]


def test_a_run_prints_rewards_and_accuracies_and_saves_the_policy(tmp_path, tiny_model):
    options = ["--model", tiny_model, "--out", tmp_path / "out", "--iterations", 2, "--eval_every", 2, *SHORT]
    done = python("simple.py", *options)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("iteration")]
    assert [words[:3] for words in lines] == [
        ["iteration", "0:", "accuracy"],
        ["iteration", "1:", "reward"],
        ["iteration", "2:", "reward"],
        ["iteration", "2:", "accuracy"],
    ]
    assert all(0 <= float(words[3]) <= 1 for words in lines)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


# An untrained policy is never right and would not change: other rewards. Then the engine's log-probabilities.
SYNCED = """
import json, runpy, zlib
import grader
grader.Grader.grade = lambda self, texts, golds: [zlib.crc32(text.encode()) % 2 for text in texts]
g = runpy.run_path("simple.py", run_name="__main__")
(r,) = g["sample"](g["llm"], g["grader"], g["starts"][:1], 1, g["s"])
ids = [*r.prompt, *r.ids]
asked = g["SamplingParams"](max_tokens=1, prompt_logprobs=0)
(output,) = g["llm"].generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
engine = [found[i].logprob for found, i in zip(output.prompt_logprobs[1:], ids[1:])]
networks = [g["policy"], g["reference"]]
print(json.dumps([engine, *(network(g["torch"].tensor([ids]).to(g["device"])).logits[0, :-1].log_softmax(-1)
                            .gather(-1, g["torch"].tensor(ids[1:])[:, None].to(g["device"]))[:, 0].tolist()
                            for network in networks)]))
"""


def test_the_engine_samples_from_the_trained_policy(tmp_path, tiny_model):
    options = ["--model", tiny_model, "--out", tmp_path / "out", "--iterations", 1, "--learning_rate", 0.01]
    done = python("-c", SYNCED, *options, *SHORT)
    assert done.returncode == 0, done.stderr
    engine, policy, reference = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert (engine - policy).abs().mean() < GAP < (engine - reference).abs().mean()


@pytest.mark.parametrize(
    "argv,said",
    [
        (["--model", "runs/nothing"], "--model runs/nothing is not there: make it with sft.py"),
        (["--K", "0"], "--K 0 must be above 0"),
        (["--temperature", "nan"], "--temperature nan must be above 0.0"),
        (["--stop", ""], "--stop '' must be above ''"),
        (["--dataset", "nothing"], "--dataset nothing is not known"),
        (["--max_tokens", "155"], "every prompt is longer than --max_sequence - --max_tokens = 5"),
    ],
)
def test_bad_input_is_one_line(argv, said, tiny_model, monkeypatch):
    model = [] if "--model" in argv else ["--model", tiny_model]
    monkeypatch.setattr(sys, "argv", ["simple.py", *model, *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(ROOT / "simple.py", run_name="__main__")
    assert ended.value.code.startswith("simple.py: ") and said in ended.value.code
    assert "\n" not in ended.value.code


# --- the promises of its first lines ---


def test_it_is_short_and_uses_three_concepts_of_ours():
    text = (ROOT / "simple.py").read_text()
    assert len(text.splitlines()) <= 200 and max(map(len, text.splitlines())) <= 100
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert imported & ours == {"data", "grader", "steps"}


def test_its_values_are_those_of_make_demo():
    demo = train.parse_settings(["--dataset", "arithmetic", "--model", "runs/sft"])
    # its own; a stop string that the task's tokens cannot spell; and a constant of ppo_loss
    other = {"out", "memory", "micro_batch", "stop", "clip"}
    for name, value in vars(simple.Settings()).items():
        assert name in other or getattr(demo, name) == value, name
    assert simple.Settings().clip == ppo.ppo_loss.__kwdefaults__["clip"]
