"""Shared by the tests: a one-rank process group, a tiny untrained model, one engine for the whole
session, torchrun, real data.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("no clock", deadline=None)  # a test passes on a busy machine
hypothesis.settings.load_profile("no clock")

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
EXACT = dict(bfloat16=False)  # also on a GPU: the references are float32 on CPU
GAP = 0.05 if torch.cuda.is_available() else 1e-4  # largest logprob_gap of equal weights
SHARED_DATA = ROOT.parent / "shared" / "data"  # GSM8K and a MATH sample, where they are at hand


def settings(model, **changes):
    """Of two iterations with one minibatch of eight responses, in two epochs, at temperature 1."""
    import train

    sizes = dict(iterations=2, prompts_per_iteration=4, responses_per_prompt=2, minibatch=8)
    return train.Settings(**dict(model=str(model), temperature=1.0, whiten=True) | sizes | EXACT | changes)


@pytest.fixture(scope="session")
def device():
    from support.ranks import init_distributed

    return init_distributed()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with the arithmetic task's model, untrained."""
    from tasks.arithmetic import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(folder, seed=0)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def engine(tiny_model, device):
    from rollout import Engine

    engine = Engine(settings(tiny_model, max_sequence=256, stop="#"))
    yield engine
    engine.shutdown()


def pytest_collection_finish(session):
    """Begin to tune the policy of sft_policy, beside the tests that come before those that need it."""
    if any("sft_policy" in getattr(item, "fixturenames", ()) for item in session.items):
        folder = tempfile.mkdtemp()
        sft = f"--nproc_per_node=2 sft.py --dataset arithmetic --out {folder}/sft".split()
        output = open(f"{folder}/log.txt", "w")  # a pipe that nobody reads would fill up and block it
        options = dict(cwd=ROOT, env=our_environment(), stdout=output, stderr=output)
        session.config.sft = folder, subprocess.Popen([sys.executable, *TORCHRUN, *sft], **options)


def pytest_unconfigure(config):
    if hasattr(config, "sft"):
        folder, process = config.sft
        process.terminate()  # if the tests ended before it
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def sft_policy(pytestconfig):
    """A folder with the arithmetic task's policy as `make demo` tunes it, on two ranks."""
    folder, process = pytestconfig.sft
    assert process.wait(timeout=900) == 0, Path(folder, "log.txt").read_text()
    return Path(folder) / "sft"


@pytest.fixture
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no GSM8K and MATH files at {SHARED_DATA}")
    return SHARED_DATA


def torchrun(ranks, *argv, **variables):
    """Run a script on several ranks from the project's folder; returns the finished process with
    its output as text.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs, here {gpus}")
    return python(*TORCHRUN, f"--nproc_per_node={ranks}", *argv, **variables)


def python(*argv, **variables):
    """Run python from the project's folder, outside of this process's group of ranks, with these
    environment variables.
    """
    environment = our_environment() | variables
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def main_of(monkeypatch, capsys):
    """Runs a program's main with arguments, in this process: (exit code, stdout, what it says as it ends)."""

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            module.main()
            code = said = None
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int | None) else 1
            said = ended.code if isinstance(ended.code, str) else ""
        return code or 0, capsys.readouterr().out, said

    return run


def our_environment():
    """This process's, but for what makes it a rank; one thread per process."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in ours} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def left_running(marker, command="", rank=None):
    """Numbers of the processes that were started, by whomever, with VINEPPO_TEST=marker; those of
    one command, of one rank.
    """
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                environment = (folder / "environ").read_bytes().split(b"\0")
                wanted = [f"VINEPPO_TEST={marker}", *([] if rank is None else [f"RANK={rank}"])]
                if command in (folder / "cmdline").read_text() and all(
                    w.encode() in environment for w in wanted
                ):
                    found.append(int(folder.name))
        except (OSError, IndexError):
            continue  # it has ended, or is another user's
    return found
