"""A run that is killed again and again, with SIGKILL, ends as if nothing had been.

pytest tests/test_kill.py -m slow       # 36 kills, a quarter of an hour on two cores; the suite makes two
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, left_running, our_environment, torchrun
from transformers import AutoModelForCausalLM

import learner
from support import run_folder

ARGUMENTS = [
    "--dataset",
    "arithmetic",
    "--prompts_per_iteration",
    2,
    "--responses_per_prompt",
    2,
    "--minibatch",
    4,
]
ARGUMENTS += ["--K", 1, "--max_tokens", 16, "--eval_samples", 1, "--eval_every", 5, "--save_every", 1]
ARGUMENTS += ["--store_every", 3, "--eval_problems", 1]  # one of the ranks has no test problem


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def iterations_done(run, since):
    """Of a run that was started then; 0 before its first iteration."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() and path.stat().st_ctime > since else 0


def writes(run, since):
    """Whether a run that was started then writes a checkpoint at this moment."""
    with contextlib.suppress(FileNotFoundError):  # it has just been renamed
        return any(p.stat().st_mtime > since for p in run.glob("checkpoints/*.unfinished"))
    return False


def start_and_kill(command, run, marker, rng, moment, further):
    """Start the run on two ranks and kill a rank, or everything, at a random moment of its life, or
    after up to `further` iterations, in the
    middle of one or of the checkpoint behind it. Returns what was hit."""
    start, target = time.time(), run_folder.newest_checkpoint(run)[0] + rng.randint(1, further)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command], cwd=ROOT,
        env=our_environment() | {"VINEPPO_TEST": marker}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def wait_until(condition):
        while not condition() and process.poll() is None:
            time.sleep(0.002)

    everything, rank = rng.random() < 0.5, rng.randrange(2)
    victims = lambda: left_running(marker) if everything else left_running(marker, "train.py", rank)
    if moment == "any":
        time.sleep(rng.uniform(0, 25))
    else:
        wait_until(lambda: iterations_done(run, start) >= target)
        time.sleep(rng.uniform(0, 0.3))
    wait_until(victims)
    pids = victims()
    if moment == "saving":
        wait_until(lambda: writes(run, start))
        time.sleep(rng.uniform(0, 0.02))
    hit = (
        "finished"
        if process.poll() is not None
        else moment + (", while it writes" if writes(run, start) else "")
    )
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 or hit == "finished", errors
    for _ in range(50):
        if not left_running(marker):
            break
        time.sleep(0.1)
    assert left_running(marker) == []
    return hit


SHORT = ["saving", "training"]
LONG = ["any", "training", "training", "saving", "saving", "saving"] * 6


@pytest.mark.parametrize(
    "moments,iterations",
    [(SHORT, 12), pytest.param(LONG, 400, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_a_run_that_is_killed_again_and_again_ends_whole(moments, iterations, tmp_path, tiny_model):
    rng, run, hits = random.Random(0), tmp_path / "run", []
    command = [
        *map(
            str, ["train.py", *ARGUMENTS, "--model", tiny_model, "--run_dir", run, "--iterations", iterations]
        )
    ]
    for moment in moments:
        done = run_folder.newest_checkpoint(run)[0]
        hits.append(start_and_kill(command, run, tmp_path.name, rng, moment, further=5))
        assert run_folder.newest_checkpoint(run)[0] >= done  # nothing that was saved is lost
        print(hits[-1], run_folder.newest_checkpoint(run)[0], flush=True)
    assert "finished" not in hits and (
        moments is SHORT or sum("while it writes" in hit for hit in hits) >= 6
    ), hits
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr
    lines = metrics_of(run)
    assert [line["iteration"] for line in lines] == list(range(iterations + 1))
    for i, line in enumerate(lines[1:]):
        assert line["learning_rate"] == pytest.approx(
            learner.learning_rate(2 * i + 0.5, 2 * iterations, 1e-4), rel=0.1, abs=1e-7
        )
        assert ("accuracy" in line) == ((i + 1) % 5 == 0 or i + 1 == iterations) and line[
            "logprob_gap"
        ] < 1e-3
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(
        [str(iterations - 1), str(iterations)]
    )
    assert sorted(p.name for p in (run / "episodes").iterdir())[:2] == ["000001.jsonl.gz", "000003.jsonl.gz"]
