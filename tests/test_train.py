"""Whole runs, started as their user would start them, and every bad input's one line."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GAP, left_running, python, torchrun
from transformers import AutoModelForCausalLM

import sft
import train
from experiments import common
from support.ranks import TORCHRUN

# small enough for seconds: every iteration is 4 problems x 2 responses, K = 2
SMALL = [
    "--dataset",
    "arithmetic",
    "--prompts_per_iteration",
    "4",
    "--responses_per_prompt",
    "2",
    "--minibatch",
    "4",
]
SMALL += ["--max_tokens", "40", "--eval_problems", "8", "--eval_samples", "1"]


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- runs ---


def test_two_ranks_learn_arithmetic(tmp_path, sft_policy):
    """train.py as in `make demo`, shorter: held-out accuracy must rise by more than its noise can."""
    run = tmp_path / "run"
    arguments = ["--iterations", 14, "--eval_every", 14, "--save_every", 0, "--store_every", 10]
    done = torchrun(
        2, "train.py", "--dataset", "arithmetic", "--model", sft_policy, "--run_dir", run, *arguments
    )
    assert done.returncode == 0, done.stderr
    first, *lines = metrics_of(run)
    # 500 problems x 2 responses: the standard error of one accuracy is below 0.016, of the difference below 0.023
    assert lines[-1]["accuracy"] > first["accuracy"] + 0.05, (first, lines[-1]["accuracy"])
    assert [line["iteration"] for line in lines] == list(range(1, 15))
    for line in lines:
        assert line["logprob_gap"] < GAP  # the engine has the trainer's weights in every iteration
        assert line["skipped_steps"] == 0 and line["rollouts"] == 4 * line["states"]
        assert line["states"] <= 64 * line["steps_per_response"]
        assert 0 <= line["value_mean"] <= 1 and 0 <= line["zero_advantages"] <= 1 and 0 <= line["idle"] < 1
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["kl"] > 0
    assert "accuracy before training" in done.stdout and f"wrote {run / 'model'}" in done.stdout
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert sorted(path.name for path in (run / "episodes").iterdir()) == [
        "000001.jsonl.gz",
        "000010.jsonl.gz",
    ]
    page = python("tools/show.py", run)
    assert page.returncode == 0 and "64 solutions of iteration 10" in page.stdout, page.stderr
    plot = python("tools/plot.py", run)
    assert plot.returncode == 0 and (run / "curves.png").stat().st_size > 10_000, plot.stderr


FAULTY = """
import os, signal, sys, time, zlib
import data, dealing, grader, ppo, rollout, train
from support import run_folder
data.MAX_BAD_ANSWERS = 1  # the rewards below have nothing to do with the gold answers
how = sys.argv.pop()
rank = os.environ.get("RANK", "0")
calls, wait, even_out = [], dealing.DealtVine.wait, dealing.even_out
seed, update, save = rollout.Engine.seed, ppo.Trainer.update, run_folder.write_checkpoint

def chance(self, texts, golds):  # an untrained model is never right: with these rewards there is something to learn
    return [zlib.crc32(text.encode()) % 2 for text in texts]

def broken_step(self):
    raise OSError("CUDA error: an illegal memory access")

def faulty_seed(self, *numbers):
    if len(numbers) == 2:  # an iteration begins
        calls.append(1)
        if len(calls) == 2 and how == "engine" and rank == "1":
            rollout.Engine.step = broken_step
    seed(self, *numbers)

def faulty_wait(self):
    if len(calls) == 3 and how == "signal" and rank == "0":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)  # until both know
    wait(self)

def told_even_out(loads, sizes):
    dealt = even_out(loads, sizes)
    if [len(queue) for queue in dealt] != [len(queue) for queue in sizes]:
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

grader.Grader.grade, rollout.Engine.seed, ppo.Trainer.update = chance, faulty_seed, faulty_update
run_folder.write_checkpoint = save_and_die
dealing.DealtVine.wait, dealing.even_out = faulty_wait, told_even_out
train.main()
"""


def comparable(run):
    """The metrics of a run, but for what the clock says."""
    timed = ("seconds", "tokens_per_second", "idle", "answers")  # the cache of graded answers begins anew
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics_of(run)]


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path, tiny_model):
    """SIGTERM among the rollouts of iteration 3 on two ranks; the same command again.

    Exactly equal, sampled at temperature 1.
    """
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = [
        *SMALL,
        "--model",
        tiny_model,
        "--iterations",
        4,
        "--eval_every",
        2,
        "--save_every",
        0,
        "--learning_rate",
        3e-3,
    ]
    arguments += ["--max_sequences", 4]  # so that states wait, and are dealt to the other rank
    arguments += "--gae_lambda 0.5 --baseline_smoothing 0.5 --step_credit cutpoints:12".split()
    run = lambda folder, how, ranks=2: torchrun(
        ranks, tmp_path / "faulty.py", *arguments, "--run_dir", tmp_path / folder, how
    )
    straight = run("straight", "none")
    assert straight.returncode == 0 and "states were dealt" in straight.stdout, straight.stderr
    stopped = run("stopped", "signal")
    assert stopped.returncode != 0 and "exitcode  : 143" in stopped.stderr, stopped.stderr
    assert "stopped after iteration 2; the same command resumes from there" in stopped.stdout + stopped.stderr
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["2"] and len(
        metrics_of(tmp_path / "stopped")
    ) == 3
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
    went_on = run("stopped", "none")
    assert went_on.returncode == 0 and "resumes after iteration 2" in went_on.stdout + went_on.stderr, (
        went_on.stderr
    )
    expected = comparable(tmp_path / "straight")
    assert (
        [line["iteration"] for line in expected] == [0, 1, 2, 3, 4]
        and expected[-1]["kl"] > 0
        and expected[-1]["grad_norm"] > 0
    )
    assert comparable(tmp_path / "stopped") == expected
    assert all(line["steps_per_response"] > 1 for line in expected[1:])
    same = [
        AutoModelForCausalLM.from_pretrained(tmp_path / folder / "model").state_dict()
        for folder in ("straight", "stopped")
    ]
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
    assert again.returncode == 0 and "alone is finished, its model is in model/" in again.stdout


def test_a_killed_run_resumes_where_it_was(tmp_path, tiny_model):
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = [
        *SMALL,
        "--model",
        tiny_model,
        "--run_dir",
        tmp_path / "run",
        "--iterations",
        3,
        "--eval_every",
        0,
        "--save_every",
        1,
    ]
    arguments += ["--algorithm", "ppo"]  # with a critic, so there is more to lose
    killed = torchrun(1, tmp_path / "faulty.py", *arguments, "killed")
    assert killed.returncode != 0 and [line["iteration"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"iteration": 3, "rewa')  # as if it had been killed while it wrote
    refused = python("train.py", *arguments, "--kl_coef", 0.3, "--seed", 1)
    assert refused.returncode == 1 and "run holds a run with other settings: " in refused.stderr
    assert "--kl_coef was 0.0001, now 0.3" in refused.stderr and "--seed was 0, now 1" in refused.stderr
    done = python("train.py", *arguments, "--hang_timeout", 200)
    assert done.returncode == 0, done.stderr
    assert "resumes after iteration 2" in done.stderr + done.stdout
    assert "--hang_timeout was 90.0, now 200.0" in done.stderr + done.stdout
    lines = metrics_of(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert (
        lines[2]["learning_rate"] < lines[1]["learning_rate"] < lines[0]["learning_rate"]
    )  # the schedule went on
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["2", "3"]
    for name in ("2", "3"):
        AutoModelForCausalLM.from_pretrained(checkpoints / name)
        assert (checkpoints / name / "state" / "critic" / ".metadata").is_file()
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["kl_coef"] == 0.0001
    assert all(abs(line["explained_variance"]) < 10 and line["value_loss"] >= 0 for line in lines)

    # the analysis of values, on that run's policy and critic
    results = tmp_path / "results" / "values.jsonl"
    arguments = ["--problems", 3, "--ranked", 2, "--truth_rollouts", 8, "--results", results]
    done = python("experiments/values.py", tmp_path / "run" / "checkpoints" / "3", *arguments)
    assert done.returncode == 0, done.stderr
    found = common.newest(results)["run-3"]
    for row in found["states"]:  # an untrained policy is never right
        assert row["truth"] == row["error"] == row["K=9"] == row["constant"] == 0
        assert 0 <= row["position"] < 1 and "value network" in row
    assert (tmp_path / "results" / "values-run-3.png").exists()
    assert "## run-3" in (tmp_path / "results" / "values.md").read_text()

    # and of gradients, also of the policy that the run began from
    results = tmp_path / "results" / "gradients.jsonl"
    arguments = ["--batches", 10, "--only", "RLOO", "value network", "--results", results]
    run = tmp_path / "run"
    done = python("experiments/gradients.py", run, run / "checkpoints" / "3", *arguments)
    assert done.returncode == 0, done.stderr
    for name, with_network in (("run-0", False), ("run-3", True)):
        found = common.newest(results)[name]
        batches = common.rows_of(found["batches"])
        assert len(batches) == 10 and set(map(len, found["products"]["K=9"])) == {10}
        for batch in batches:
            squares = batch["estimators"]
            assert squares["K=9"] == squares["RLOO"] == 0
            assert ("value network" in squares) == with_network and batch["tokens"]["K=9"] > 0
    assert (tmp_path / "results" / "gradients.png").exists()


FAILURES = {
    "raise": [
        "rank 1: failed: RuntimeError('a broken rank'); all ranks stop",
        "rank 0: stops because rank 1 failed",
    ],
    "hang": ["rank 1 in train for", "in faulty_update"],  # the stacks tell where
    "engine": [
        "rank 1: failed: OSError('CUDA error: an illegal memory access'); all ranks save what they have and stop"
    ],
}


@pytest.mark.parametrize("how", FAILURES)
def test_when_one_rank_fails_all_stop_and_say_why(tmp_path, tiny_model, how):
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = [
        *SMALL,
        "--K",
        2,
        "--model",
        tiny_model,
        "--run_dir",
        tmp_path / "run",
        "--iterations",
        3,
        "--eval_every",
        0,
    ]
    arguments += ["--save_every", 0, "--hang_timeout", 12]
    marker, secret = f"{how}-{tmp_path.name}", "hf_ThisIsSecret"
    done = torchrun(
        2, tmp_path / "faulty.py", *arguments, how, VINEPPO_TEST=marker, HF_TOKEN=secret, WANDB_API_KEY=secret
    )
    assert done.returncode != 0
    for words in FAILURES[how]:
        assert words in done.stderr, done.stderr
    time.sleep(1)
    assert left_running(marker) == []  # no rank, no engine, no worker of the grader
    saved = [p.name for p in (tmp_path / "run").glob("checkpoints/*")]
    assert saved == (["1"] if how == "engine" else [])
    written = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(written) >= 3 and not any(
        secret.encode() in content for content in [*written, (done.stdout + done.stderr).encode()]
    )


def test_evaluation_alone(tmp_path, tiny_model):
    alone = [
        *SMALL,
        "--eval_only",
        "--minibatch",
        "3",
    ]  # of which 8 responses are no multiple: there are none
    done = python("train.py", *alone, "--model", tiny_model, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "accuracy 0.0000 (8 problems, 8 responses, temperature 1.0, top_p 1.0)" in done.stdout
    assert not (tmp_path / "run").exists()


# --- bad input ---

BAD_INPUT = [  # arguments, ranks, what the message says
    ("--dataset mth", 1, "--dataset mth is not known: use math, gsm8k, arithmetic, worded"),
    ("--dataset none/mine.jsonl --model {model}", 1, "none/mine.jsonl: no such file"),
    ("--dataset {empty} --model {model}", 1, "empty.jsonl is empty"),
    ("--dataset {broken} --model {model}", 1, "broken.jsonl cannot be read: line 2"),
    ("--dataset {columns} --model {model}", 1, "none of the columns problem, question"),
    (
        "--dataset {nogold} --model {model} --max_sequence 200 --max_tokens 9",
        1,
        "no response can match 2 of 2 gold",
    ),
    ("--dataset {fine}", 1, "--model is missing"),
    ("--model {pickled}", 1, "pytorch_model.bin is refused: it is not a file of tensors alone"),
    ("--model {own_code}", 1, "cannot be loaded"),
    ("--model {model} --hang_timeout 0", 1, "--hang_timeout 0.0 must be above 0"),
    ("--model no/where", 1, "--model no/where cannot be loaded"),
    (
        "--dataset worded --model runs/sft-none",
        1,
        "`python sft.py --dataset worded --out runs/sft-none` first",
    ),
    ("--model runs/none/model", 1, "name a Hugging Face folder or hub model (there is no such folder)"),
    (
        "--model {model} --prompts_per_iteration 3",
        2,
        "--prompts_per_iteration 3 does not divide over 2 ranks: take a multiple of 2",
    ),
    ("--model {model} --minibatch 3", 2, "--minibatch 3 does not divide over 2 ranks"),
    ("--model {model} --minibatch 24", 1, "--minibatch 24 does not divide the iteration's 64 responses"),
    ("--model {model} --K 0", 1, "--K 0 must be at least 1"),
    (
        "--model {model} --algorithm grpo --K 4",
        1,
        "--K does nothing with --algorithm grpo: it belongs to vineppo",
    ),
    (
        "--model {model} --critic_learning_rate 0.9",
        1,
        "--critic_learning_rate does nothing with --algorithm vineppo: it belongs to ppo",
    ),
    (
        "--model {model} --algorithm ppo --gae_lambda 2",
        1,
        "--gae_lambda 2.0 must be at least 0 and at most 1",
    ),
    (
        "--model {model} --algorithm rloo --responses_per_prompt 1",
        1,
        "compares responses: --responses_per_prompt 1 must be at least 2",
    ),
    (
        "--model {model} --step_credit line",
        1,
        "--step_credit line is not known: use paper, newline, sentence, tokens:N",
    ),
    ("--model {model} --top_p 1.5", 1, "--top_p 1.5 must be above 0 and at most 1"),
    ("--model {model} --temperature 0", 1, "--temperature 0.0 must be above 0"),
    ("--model {model} --iterations 0", 1, "--iterations 0 must be at least 1"),
    ("--model {model} --iterations 5 --eval_only", 1, "--eval_only trains nothing: leave out --iterations"),
    (
        "--model {model} --max_tokens 200",
        1,
        "--max_tokens 200 leaves no room for prompts in --max_sequence 160",
    ),
    (
        "--model {model} --max_sequence 130",
        1,
        "every prompt is longer than --max_sequence - --max_tokens = 2 tokens",
    ),
    ("--model {model} --max_sequence 300", 1, "--max_sequence 300 is more than the 256 positions of --model"),
    ("--model {model} --max_valued_steps 0", 1, "--max_valued_steps 0 must be at least 1"),
    (
        "--model {model} --eval_temperature 0",
        1,
        "--eval_temperature 0 gives one and the same response: add --eval_samples 1",
    ),
    ("--model {model} --temperature 0.005", 1, "--temperature 0.005 must be at least 0.01"),
    ("--model {model} --eval_temperature 0.005", 1, "--eval_temperature 0.005 must be 0 or at least 0.01"),
    ("--model {model} --eval_every -1", 1, "--eval_every -1 must be at least 0"),
    ("--model {model} --prompt_template x", 1, "has no {problem} in it"),
    ("--model {model} --chat", 1, "--chat: the tokenizer of"),
]


@pytest.mark.parametrize("arguments,ranks,message", BAD_INPUT, ids=[a for a, _, _ in BAD_INPUT])
def test_bad_input_gets_one_line_before_anything_loads(
    arguments, ranks, message, tmp_path, tiny_model, monkeypatch
):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # else it tries a network that may not be there for 20 s
    row = '{"problem": "p", "answer": "1"}\n'
    files = dict(
        empty="",
        fine=row * 2,
        broken=row + "{",
        columns='{"text": "p"}\n' * 2,
        nogold='{"problem": "p", "answer": ""}\n' * 2,
    )
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    for name in ("pickled", "own_code"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "own_code" / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'
    )
    (tmp_path / "own_code" / "own.py").write_text("raise SystemExit('it ran')")
    filled = arguments.replace("{model}", tiny_model).replace("{pickled}", str(tmp_path / "pickled"))
    filled = filled.replace("{own_code}", str(tmp_path / "own_code"))
    for name in files:
        filled = filled.replace(f"{{{name}}}", str(tmp_path / f"{name}.jsonl"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_dir", str(tmp_path / "run"), *filled.split()])
    for name in TORCHRUN:
        monkeypatch.setenv(name, str(ranks) if name.endswith("WORLD_SIZE") else "0")
    for program in ("train", "evaluate_only"):
        monkeypatch.setattr(train, program, lambda *_: pytest.fail("the run began"))
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert message in str(exit.value) and "\n" not in str(exit.value)
    assert not (tmp_path / "run").exists()


def test_the_run_folder_of_a_dataset_stays_inside_of_runs():
    for dataset in ("..", ".", "/", "a/../..", "math"):
        folder = Path(train.parse_settings(["--dataset", dataset]).run_dir)
        assert folder.parts[0] == "runs" and len(folder.parts) == 2 and ".." not in folder.parts, dataset


def test_a_stop_string_may_be_written_as_help_shows_it():
    s = train.parse_settings(["--dataset", "math", "--stop", r"\n\nProblem:"])
    assert s.stop == "\n\nProblem:"


def test_bad_input_from_the_shell(tmp_path):
    done = python("train.py", "--dataset", "mth")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_sft_refuses_what_it_cannot_learn_from(tmp_path, monkeypatch):
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
    done = python("train.py", "--dataset", "math", "--help")
    assert done.returncode == 0
    for words in (
        "realtreetune/rho-1b-sft-MATH",
        "rollouts that estimate the value of each state",
        "torchrun --nproc_per_node=8",
    ):
        assert words in " ".join(done.stdout.split())  # however it is wrapped
