"""Shared by the tests: a one-rank process group, a tiny untrained model, one engine for the whole session, torchrun, real data."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # GSM8K and a MATH sample, where they are at hand


@pytest.fixture(scope="session")
def device():
    import ppo

    return ppo.init_distributed()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with the arithmetic task's model, untrained."""
    import sft

    folder = tmp_path_factory.mktemp("tiny")
    sft.tiny_model(folder, seed=0)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def engine(tiny_model, device):
    from rollout import Engine

    engine = Engine(tiny_model, max_sequence=256, stop=["#"], seed=1)
    yield engine
    engine.shutdown()


@pytest.fixture
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no GSM8K and MATH files at {SHARED_DATA}")
    return SHARED_DATA


def torchrun(ranks, *argv):
    """Run a script on several ranks from the project's folder; returns the finished process with its output as text."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *argv)


def python(*argv):
    """Run python from the project's folder, outside of this process's group of ranks."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
