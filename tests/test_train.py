"""Whole runs, started as their user would start them, and every bad input's one line."""

import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import left_running, python, torchrun
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import sft
import train
from experiments import show
from grader import Grader

# small enough for seconds: every iteration is 4 problems x 2 responses, K = 2
SMALL = ["--dataset", "arithmetic", "--prompts_per_iteration", "4", "--responses_per_prompt", "2", "--minibatch", "4"]
SMALL += ["--max_tokens", "40", "--eval_problems", "8", "--eval_samples", "1"]


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- one iteration, with an engine that writes what it is told -----------------------------------------------------------------------


class ScriptedEngine:
    """Token ids are character codes, 0 is EOS. Continues each prompt with the text that script(prompt text, k) gives for sample k."""

    stop, leads = [], True

    def __init__(self, script, group=0, room=10**6):
        self.script, self.group, self.room, self.requests, self.running = script, group, room, [], {}

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)

    text = decode

    def stops(self, ids):
        return False

    def submit(self, key, prompt, n, max_tokens, temperature, top_p=1.0, logprobs=False):
        first = key[1] if key[0] == "response" else 0
        completions = [self.complete(self.decode(prompt), max_tokens, first + k) for k in range(n)]
        self.running[len(self.requests)] = key, completions
        self.requests.append((key, prompt, n, max_tokens))

    def has_room(self):
        return len(self.running) < self.room

    def step(self):
        _, ended = self.running.popitem()  # the latest request ends first
        return [ended]

    def complete(self, text, limit, k):
        ids = [*map(ord, self.script(text, k)), 0]
        finished = len(ids) <= limit
        return SimpleNamespace(token_ids=ids[:limit], finished=finished, logprobs=[0.0] * min(limit, len(ids)))


def test_an_iteration_values_states_by_their_own_rollouts_within_the_limit(device):
    """A chain of three lines, right if the second is "b": V(prompt) = 1/2, V after "a" = 1/2, after "b" 1, after "x" 0."""

    def script(text, k):
        line = "b" if k % 2 else "x"
        return {"?": f"a\n{line}\nc\n#### {line}", "a": f"\n{line}\nc\n#### {line}"}.get(text[-1], f"\nc\n#### {text[-1]}")

    s = train.Settings(responses_per_prompt=2, K=4, step_credit="paper", max_tokens=14, temperature=1.0, top_p=1.0)
    engine, grader = ScriptedEngine(script), Grader()
    problem, values = SimpleNamespace(answer="b", prompt="?"), train.Values(engine, grader, s)
    episodes = train.sample_responses(engine, grader, [(problem, [ord("?")])], s, values)
    assert [e["reward"] for e in episodes] == [0.0, 1.0] and all(e["finished"] for e in episodes)
    kinds = [key[0] for key, *_ in engine.requests]
    assert kinds == ["response"] * 2 + ["rollouts"] * 4
    assert len(values.rollouts) == 3 * 4  # those of the response that ended first, before the other one had ended
    values.wait()
    vined = values.set_advantages(episodes)
    _, prompts, n, limits = zip(*engine.requests[2:])
    assert set(n) == {4} and sorted(map(engine.decode, prompts)) == ["?", "?a", "?a\nb", "?a\nx"]  # each distinct state once
    assert all(limit == 14 - (len(prompt) - 1) for prompt, limit in zip(prompts, limits))
    assert (
        len(vined["rollouts"]) == 16 and vined["tokens"] == sum(14 - (len(prompt) - 1) for prompt in prompts for _ in range(4)) - 4 * 4 * 1
    )
    wrong, right = episodes
    assert right["values"] == [0.5, 0.5, 1.0] and wrong["values"] == [0.5, 0.5, 0.0]
    assert right["advantages"] == [0.0] * 1 + [0.5] * 2 + [0.0] * 10  # "a", "\nb", "\nc\n#### b" and EOS
    assert wrong["advantages"] == [0.0] * 1 + [-0.5] * 2 + [0.0] * 10
    assert_stored(show.record(episodes, vined["rollouts"], engine.decode))
    s.max_tokens = 12  # one too few: nothing ends, so nothing is right
    values = train.Values(engine, grader, s)
    cut = train.sample_responses(engine, grader, [(problem, [ord("?")])], s, values)
    assert [e["reward"] for e in cut] == [0.0, 0.0] and not any(e["finished"] for e in cut)
    values.wait()
    values.set_advantages(cut)
    assert all(v == 0.0 for e in cut for v in e["values"])
    s.max_tokens, s.max_valued_steps, engine.requests = 14, 1, []
    values = train.Values(engine, grader, s)
    capped = train.sample_responses(engine, grader, [(problem, [ord("?")])], s, values)
    values.wait()
    assert len(values.set_advantages(capped)["values"]) == 1 and len(engine.requests) == 3
    assert [e["values"] for e in capped] == [[0.5, None, None]] * 2
    assert [e["advantages"][0] for e in capped] == [-0.5, 0.5] and not any(a for e in capped for a in e["advantages"][1:])
    grader.close()


def assert_stored(solutions):
    """What show.py gets of that iteration: whole texts, and of every state the rollouts that made its value."""
    wrong, right = solutions
    assert "".join(step["text"] for step in right["steps"]) == "a\nb\nc\n#### b" and right["reward"] == 1.0
    assert [step["advantage"] for step in right["steps"]] == [0.0, 0.5, 0.0]
    assert [(step["value"], step["right"], step["K"]) for step in right["steps"]] == [(0.5, 2, 4), (0.5, 2, 4), (1.0, 4, 4)]
    assert right["steps"][1]["rollouts"] == [(1.0, "\nb\nc\n#### b")] * 2 + [(0.0, "\nx\nc\n#### x")] * 2
    assert [step["right"] for step in wrong["steps"]] == [2, 2, 0]


def value_unequal_problems(rank):
    """Rank 0's response has eight lines, rank 1's has one; the engines have room for one request. Behind t lines every (1 + t)th rollout is right."""

    def script(text, k):
        lines = text.count("line")
        return "line\n" * ((8 if text[0] == "0" else 1) - lines) + f"#### {int(k % (1 + lines) == 0)}"

    s = train.Settings(responses_per_prompt=1, K=72, step_credit="newline", max_tokens=100, temperature=1.0, top_p=1.0)
    engine, grader = ScriptedEngine(script, rank, room=1), Grader()
    values = train.Values(engine, grader, s)
    episodes = train.sample_responses(engine, grader, [(SimpleNamespace(answer="1", prompt=""), [ord(str(rank))])], s, values)
    values.spread()
    values.wait()
    vined = values.set_advantages(episodes)
    grader.close()
    assert len(vined["values"]) == len(episodes[0]["states"]) and len(vined["rollouts"]) == 72 * len(vined["values"])
    assert vined["tokens"] == sum(r["tokens"] for r in vined["rollouts"])
    return episodes[0]["values"], [chr(prompt[0]) for _, prompt, *_ in engine.requests[1:]]


UNEQUAL = """
import json, sys
sys.path.insert(0, "tests")
import test_train, train
train.ppo.init_distributed()
rank = train.dist.get_rank()
found = train.over_ranks([test_train.value_unequal_problems(rank)])
if rank == 0:
    print(json.dumps(found))
train.dist.destroy_process_group()
"""


def test_states_that_wait_are_dealt_to_the_rank_with_less_to_do(tmp_path):
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    done = torchrun(2, tmp_path / "unequal.py")
    assert done.returncode == 0, done.stderr
    (values, prompts), (of_other, prompts_of_other) = json.loads(done.stdout.splitlines()[-1])
    assert len(values) >= 8
    for found in (values, of_other):
        assert found == [math.ceil(72 / (1 + t)) / 72 for t in range(len(found))]
    own, dealt = prompts.count("0"), prompts_of_other.count("0")
    assert set(prompts) == {"0"} and own + dealt == len(values) and min(own, dealt) >= 3, (prompts, prompts_of_other)


costs = st.lists(st.integers(1, 50), max_size=20)


@given(st.lists(st.tuples(st.integers(0, 100), costs), min_size=1, max_size=8))
def test_queues_are_evened_out_as_far_as_their_items_allow(engines):
    begun, queues = zip(*engines)
    items = [[(i, k, cost) for k, cost in enumerate(queue)] for i, queue in enumerate(queues)]
    dealt = train.even_out(begun, items, lambda item: item[2])
    assert sorted(x for queue in dealt for x in queue) == sorted(x for queue in items for x in queue)
    loads = lambda queues: [load + sum(cost for *_, cost in queue) for load, queue in zip(begun, queues)]
    mean = sum(loads(items)) / len(items)
    for i, (before, after) in enumerate(zip(loads(items), loads(dealt))):
        if before < mean:  # it keeps its own, and gets no more than it needs
            assert dealt[i][: len(items[i])] == items[i]
            assert after < mean + 50 or dealt[i] == items[i]
        else:  # it keeps no more than it must
            assert dealt[i] == items[i][: len(dealt[i])] and mean <= after <= before
            assert not dealt[i] or after - dealt[i][-1][2] < mean


def test_engine_and_trainer_that_disagree_are_told_of_once_or_stop_the_run():
    said, s = [], train.Settings()
    fine, wide, nan = ({"logprob_gap": gap, "skipped_steps": 0} for gap in (1e-6, 0.004, float("nan")))
    assert not train.check_update(fine, s, torch.float32, said.append, False) and said == []
    assert train.check_update(wide, s, torch.float32, said.append, False) and "ENGINE AND TRAINER DISAGREE" in said.pop()
    assert train.check_update(nan, s, torch.float32, said.append, True) and said == []
    assert not train.check_update(wide, s, torch.bfloat16, said.append, False)  # rounding
    s.max_logprob_gap, s.strict = 0.003, True
    with pytest.raises(RuntimeError, match="the new weights did not reach the engine"):
        train.check_update(wide, s, torch.bfloat16, said.append, False)
    train.check_update(fine | {"skipped_steps": 3}, s, torch.float32, said.append, False)
    assert said == ["3 skipped steps: a loss or gradient was not finite, or the mean ratio was too large"]


def test_an_iteration_in_which_the_engine_gave_everything_up_goes_through(device):
    class Broken(ScriptedEngine):
        def complete(self, text, limit, k):
            return SimpleNamespace(token_ids=[], finished=False, logprobs=None)

    s = train.Settings(responses_per_prompt=2, K=4, step_credit="paper", max_tokens=14, temperature=1.0, top_p=1.0)
    engine, grader = Broken(None), Grader()
    values = train.Values(engine, grader, s)
    episodes = train.sample_responses(engine, grader, [(SimpleNamespace(answer="b", prompt="?"), [ord("?")])], s, values)
    values.wait()
    vined = values.set_advantages(episodes)
    seconds = dict(sample=1.0, values=1.0)
    metrics = train.iteration_metrics(1, episodes, (vined, grader.counts, (0, 0), 2), {}, seconds, dict(sample=0, values=0))
    assert metrics["aborted"] == 2 and metrics["unfinished"] == 1 and metrics["reward"] == metrics["states"] == metrics["value_mean"] == 0
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["idle"] == 0
    grader.close()


# --- runs -------------------------------------------------------------------------------------------------------------------------


def test_two_ranks_learn_arithmetic(tmp_path):
    """sft.py and train.py as in `make demo`, shorter: held-out accuracy must rise by more than its noise can."""
    done = torchrun(2, "sft.py", "--dataset", "arithmetic", "--out", tmp_path / "sft")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    arguments = ["--iterations", "14", "--eval_every", "14", "--save_every", "0", "--store_every", "10"]
    done = torchrun(2, "train.py", "--dataset", "arithmetic", "--model", tmp_path / "sft", "--run_dir", run, *arguments)
    assert done.returncode == 0, done.stderr
    first, *lines = metrics_of(run)
    # 500 problems x 2 responses: the standard error of one accuracy is below 0.016, of the difference below 0.023
    assert lines[-1]["accuracy"] > first["accuracy"] + 0.05, (first, lines[-1]["accuracy"])
    assert [line["iteration"] for line in lines] == list(range(1, 15))
    for line in lines:
        assert line["logprob_gap"] < 1e-4  # the engine has the trainer's weights in every iteration
        assert line["skipped_steps"] == 0 and line["rollouts"] == 4 * line["states"]
        assert line["states"] <= 64 * line["steps_per_response"]
        assert 0 <= line["value_mean"] <= 1 and 0 <= line["zero_advantages"] <= 1 and 0 <= line["idle"] < 0.5
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["kl"] > 0
    assert "accuracy before training" in done.stdout and f"wrote {run / 'model'}" in done.stdout
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert sorted(path.name for path in (run / "episodes").iterdir()) == ["000001.jsonl.gz", "000010.jsonl.gz"]
    page = python("experiments/show.py", run)
    assert page.returncode == 0 and "64 solutions of iteration 10" in page.stdout, page.stderr
    plot = python("experiments/plot.py", run)
    assert plot.returncode == 0 and (run / "curves.png").stat().st_size > 10_000, plot.stderr


FAULTY = """
import os, signal, sys, time, zlib
import ppo, rollout, train
how = sys.argv.pop()
rank = os.environ.get("RANK", "0")
# an untrained model is never right: with these rewards there is something to learn
train.rewards = lambda grader, responses: [float(zlib.crc32(r["text"].encode()) % 2) for r in responses]
calls, sample, step, update, save = [], train.sample_responses, rollout.Engine.step, ppo.Trainer.update, train.run_folder.write_checkpoint

def broken_step(self):
    raise OSError("CUDA error: an illegal memory access")

def faulty_sample(*arguments):
    calls.append(1)
    if len(calls) == 2 and how == "engine" and rank == "1":
        rollout.Engine.step = broken_step
    return sample(*arguments)

def faulty_wait(self):
    if len(calls) == 3 and how == "signal" and rank == "0":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)  # until both know
    wait(self)

def told_even_out(loads, queues, cost):
    dealt = even_out(loads, queues, cost)
    if dealt != [list(queue) for queue in queues]:
        print("states were dealt")
    return dealt

def faulty_update(self, episodes):
    if len(calls) == 2 and rank == "1":
        if how == "raise":
            raise RuntimeError("a broken rank")
        if how == "hang":
            time.sleep(10**6)
    return update(self, episodes)

def save_and_die(run, iteration, *arguments):
    save(run, iteration, *arguments)
    if how == "killed" and iteration == 2:
        os.kill(os.getpid(), signal.SIGKILL)

train.sample_responses, ppo.Trainer.update, train.run_folder.write_checkpoint = faulty_sample, faulty_update, save_and_die
wait, train.Values.wait, even_out, train.even_out = train.Values.wait, faulty_wait, train.even_out, told_even_out
train.main()
"""


def comparable(run):
    """The metrics of a run, but for what the clock says."""
    timed = ("seconds", "tokens_per_second", "idle", "answers")  # the cache of graded answers begins anew
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics_of(run)]


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path, tiny_model):
    """SIGTERM among the rollouts of iteration 3 on two ranks; the same command again. Exactly equal, sampled at temperature 1."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = [*SMALL, "--model", tiny_model, "--iterations", 4, "--eval_every", 2, "--save_every", 0, "--learning_rate", 3e-3]
    arguments += ["--max_sequences", 4]  # so that states wait, and are dealt to the other rank
    run = lambda folder, how, ranks=2: torchrun(ranks, tmp_path / "faulty.py", *arguments, "--run_dir", tmp_path / folder, how)
    straight = run("straight", "none")
    assert straight.returncode == 0 and "states were dealt" in straight.stdout, straight.stderr
    stopped = run("stopped", "signal")
    assert stopped.returncode != 0 and "exitcode  : 143" in stopped.stderr, stopped.stderr
    assert "stopped after iteration 2; the same command goes on from there" in stopped.stdout + stopped.stderr
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["2"] and len(metrics_of(tmp_path / "stopped")) == 3
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
    went_on = run("stopped", "none")
    assert went_on.returncode == 0 and "goes on after iteration 2" in went_on.stdout + went_on.stderr, went_on.stderr
    expected = comparable(tmp_path / "straight")
    assert [line["iteration"] for line in expected] == [0, 1, 2, 3, 4] and expected[-1]["kl"] > 0 and expected[-1]["grad_norm"] > 0
    assert comparable(tmp_path / "stopped") == expected
    same = [AutoModelForCausalLM.from_pretrained(tmp_path / folder / "model").state_dict() for folder in ("straight", "stopped")]
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    for name, tensor in same[0].items():
        assert torch.equal(tensor, same[1][name]) and not torch.equal(tensor, start[name]), name
    # on another number of ranks: other shares of the work, so not the same numbers
    alone = run("alone", "none", ranks=1)
    assert alone.returncode == 0, alone.stderr
    assert [line["iteration"] for line in metrics_of(tmp_path / "alone")] == [0, 1, 2, 3, 4]
    assert comparable(tmp_path / "alone")[:3] == expected[:3]
    # once more: it is finished
    again = python("train.py", *arguments, "--run_dir", tmp_path / "alone")
    assert again.returncode == 0 and "alone is finished: its model is" in again.stdout


def test_a_killed_run_resumes_where_it_was(tmp_path, tiny_model):
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = [*SMALL, "--model", tiny_model, "--run_dir", tmp_path / "run", "--iterations", 3, "--eval_every", 0, "--save_every", 1]
    arguments += ["--report_to", "tensorboard", "--algorithm", "ppo"]  # with a critic, so there is more to lose
    killed = torchrun(1, tmp_path / "faulty.py", *arguments, "killed")
    assert killed.returncode != 0 and [line["iteration"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"iteration": 3, "rewa')  # as if it had been killed while it wrote
    refused = python("train.py", *arguments, "--clip", 0.3, "--seed", 1)
    assert refused.returncode == 1 and "run holds a run with other settings: " in refused.stderr
    assert "--clip was 0.2, now 0.3" in refused.stderr and "--seed was 0, now 1" in refused.stderr
    done = python("train.py", *arguments, "--resume", "--keep_checkpoints", 3)
    assert done.returncode == 0, done.stderr
    assert "goes on after iteration 2" in done.stderr + done.stdout
    assert "--keep_checkpoints was 2, now 3" in done.stderr + done.stdout
    lines = metrics_of(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert lines[2]["learning_rate"] < lines[1]["learning_rate"] < lines[0]["learning_rate"]  # the schedule went on
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["1", "2", "3"]
    for name in ("2", "3"):
        AutoModelForCausalLM.from_pretrained(checkpoints / name)
        assert (checkpoints / name / "state" / "critic" / ".metadata").is_file()
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["clip"] == 0.2
    assert all(abs(line["explained_variance"]) < 10 and line["value_loss"] >= 0 for line in lines)

    # the analysis of values, on that run's policy and critic
    arguments = ["--problems", 3, "--ranked", 2, "--batches", 3, "--truth_rollouts", 8, "--results", tmp_path / "results" / "values"]
    done = python("experiments/values.py", tmp_path / "run" / "checkpoints" / "3", *arguments)
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "results" / "values").glob("run-3.json")
    found = json.loads(found.read_text())
    for row in found["states"]:  # an untrained policy is never right
        assert row["truth"] == row["error"] == row["K=9"] == row["constant"] == 0 and 0 <= row["position"] < 1 and "value network" in row
    assert len(found["gradient"]) == 3
    for line in found["gradient"]:
        assert line["K=1"] == line["K=9"] == line["RLOO"] == 0 and line["value network"] >= 0  # the network alone thinks otherwise
    assert (tmp_path / "results" / "values-run-3.png").exists() and "## run-3" in (tmp_path / "results" / "values.md").read_text()


FAILURES = {
    "raise": ["rank 1: failed: RuntimeError('a broken rank'); all ranks stop", "rank 0: stops, since rank 1 failed"],
    "hang": ["rank 1 in train for", "in faulty_update"],  # the stacks tell where
    "engine": ["rank 1: failed: OSError('CUDA error: an illegal memory access'); all ranks save what they have and stop"],
}


@pytest.mark.parametrize("how", FAILURES)
def test_when_one_rank_fails_all_stop_and_say_why(tmp_path, tiny_model, how):
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = [*SMALL, "--K", 2, "--model", tiny_model, "--run_dir", tmp_path / "run", "--iterations", 3, "--eval_every", 0]
    arguments += ["--save_every", 0, "--hang_timeout", 20]
    start, marker, secret = time.time(), f"{how}-{tmp_path.name}", "hf_ThisIsSecret"
    done = torchrun(2, tmp_path / "faulty.py", *arguments, how, VINEPPO_TEST=marker, HF_TOKEN=secret, WANDB_API_KEY=secret)
    assert done.returncode != 0 and time.time() - start < 120
    for words in FAILURES[how]:
        assert words in done.stderr, done.stderr
    time.sleep(1)
    assert left_running(marker) == []  # no rank, no engine, no worker of the grader
    saved = [p.name for p in (tmp_path / "run").glob("checkpoints/*")]
    assert saved == (["1"] if how == "engine" else [])
    written = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(written) >= 3 and not any(secret.encode() in content for content in [*written, (done.stdout + done.stderr).encode()])


def test_evaluation_alone(tmp_path, tiny_model):
    done = python("train.py", *SMALL, "--model", tiny_model, "--run_dir", tmp_path / "run", "--eval_only")
    assert done.returncode == 0, done.stderr
    assert "accuracy 0.0000 (8 problems, 8 responses, temperature 1.0, top_p 1.0)" in done.stdout
    assert not (tmp_path / "run").exists()


# --- bad input --------------------------------------------------------------------------------------------------------------------

BAD_INPUT = [  # arguments, ranks, what the message says
    ("--dataset mth", 1, "--dataset mth is not known: use math, gsm8k, arithmetic"),
    ("--dataset none/mine.jsonl --model {model}", 1, "none/mine.jsonl: no such file"),
    ("--dataset {empty} --model {model}", 1, "empty.jsonl is empty"),
    ("--dataset {broken} --model {model}", 1, "broken.jsonl cannot be read: line 2"),
    ("--dataset {columns} --model {model}", 1, "needs a column problem or question, found text"),
    ("--dataset {nogold} --model {model}", 1, "line 1 has no gold answer"),
    ("--dataset {fine}", 1, "--model is missing"),
    ("--model {pickled}", 1, "has no weights in safetensors files"),
    ("--model {own_code}", 1, "cannot be loaded"),
    ("--model {model} --hang_timeout 0", 1, "--hang_timeout 0.0 must be above 0"),
    ("--model no/where", 1, "--model no/where cannot be loaded"),
    ("--model {model} --prompts_per_iteration 3", 2, "--prompts_per_iteration 3 does not divide over 2 ranks: take a multiple of 2"),
    ("--model {model} --minibatch 3", 2, "--minibatch 3 does not divide over 2 ranks"),
    ("--model {model} --minibatch 24", 1, "--minibatch 24 does not divide the iteration's 64 responses"),
    ("--model {model} --K 0", 1, "--K 0 must be at least 1"),
    ("--model {model} --algorithm grpo --K 4", 1, "--K does nothing with --algorithm grpo: it belongs to vineppo"),
    ("--model {model} --gamma 0.9", 1, "--gamma does nothing with --algorithm vineppo: it belongs to ppo"),
    ("--model {model} --algorithm ppo --gae_lambda 2", 1, "--gae_lambda 2.0 must be between 0 and 1"),
    ("--model {model} --algorithm rloo --responses_per_prompt 1", 1, "--responses_per_prompt 1 must be at least 2"),
    ("--model {model} --step_credit line", 1, "--step_credit line is not known: use paper, newline, sentence, or tokens:N"),
    ("--model {model} --top_p 1.5", 1, "--top_p 1.5 must be above 0 and at most 1"),
    ("--model {model} --temperature 0", 1, "--temperature 0.0 must be above 0"),
    ("--model {model} --iterations 0", 1, "--iterations 0 trains nothing"),
    ("--model {model} --iterations 0 --eval_only", 1, "--eval_only trains nothing: leave out --iterations"),
    ("--model {model} --eval_only --resume", 1, "--eval_only and --resume exclude each other"),
    ("--model {model} --max_tokens 200", 1, "--max_tokens 200 leaves no room for a prompt in --max_sequence 160"),
    ("--model {model} --max_sequence 130", 1, "every prompt is longer than --max_sequence - --max_tokens = 2 tokens"),
    ("--model {model} --max_sequence 300", 1, "--max_sequence 300 is more than the 256 positions of --model"),
    ("--model {model} --max_valued_steps 0", 1, "--max_valued_steps 0 must be at least 1"),
    ("--model {model} --eval_temperature 0", 1, "--eval_temperature 0 gives one and the same response: add --eval_samples 1"),
    ("--model {model} --eval_every -1", 1, "--eval_every -1 must not be negative"),
    ("--model {model} --resume", 1, "holds no checkpoint"),
    ("--model {model} --prompt_template x", 1, "has no {problem} in it"),
    ("--model {model} --chat", 1, "--chat: the tokenizer of"),
    ("--model {model} --report_to wandb", 1, "--report_to wandb: the package is not installed"),
]


@pytest.mark.parametrize("arguments,ranks,message", BAD_INPUT, ids=[a for a, _, _ in BAD_INPUT])
def test_bad_input_gets_one_line_before_anything_loads(arguments, ranks, message, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries a network that may not be there for 20 s
    if "wandb" in arguments:
        monkeypatch.setitem(sys.modules, "wandb", None)
    row = '{"problem": "p", "answer": "1"}\n'
    files = dict(empty="", fine=row * 2, broken=row + "{", columns='{"text": "p"}\n' * 2, nogold='{"problem": "p", "answer": ""}\n' * 2)
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    for name in ("pickled", "own_code"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "own_code" / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own_code" / "own.py").write_text("raise SystemExit('it ran')")
    filled = arguments.replace("{model}", tiny_model).replace("{pickled}", str(tmp_path / "pickled"))
    filled = filled.replace("{own_code}", str(tmp_path / "own_code"))
    for name in files:
        filled = filled.replace(f"{{{name}}}", str(tmp_path / f"{name}.jsonl"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_dir", str(tmp_path / "run"), *filled.split()])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(train, "train_run", lambda *_: pytest.fail("the run began"))
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert message in str(exit.value) and "\n" not in str(exit.value)
    assert not (tmp_path / "run").exists()


def test_the_run_folder_of_a_dataset_stays_inside_of_runs():
    for dataset in ("..", ".", "/", "a/../..", "math"):
        folder = Path(train.parse_settings(["--dataset", dataset]).run_dir)
        assert folder.parts[0] == "runs" and len(folder.parts) == 2 and ".." not in folder.parts, dataset


def test_bad_input_from_the_shell(tmp_path):
    done = python("train.py", "--dataset", "mth")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_sft_refuses_what_it_cannot_learn_from(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1"}\n' * 2)
    for arguments, message in [
        (f"--dataset {tmp_path / 'a.jsonl'} --model m", "no solutions to learn from"),
        (f"--dataset arithmetic --model {tmp_path / 'none'}", "none"),
        ("--dataset arithmetic --batch 0", "--batch 0"),
        ("--dataset mth", "--dataset mth is not known"),
    ]:
        monkeypatch.setattr(sys, "argv", ["sft.py", *arguments.split()])
        with pytest.raises(SystemExit) as exit:
            sft.main()
        assert message in str(exit.value) and "\n" not in str(exit.value)


def test_help_names_the_defaults_of_every_dataset():
    done = python("train.py", "--help")
    assert done.returncode == 0
    for words in (
        "realtreetune/rho-1b-sft-MATH",
        "rollouts that estimate the value of each state",
        "torchrun --nproc_per_node=8",
    ):
        assert words in " ".join(done.stdout.split())  # however it is wrapped
