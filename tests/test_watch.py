"""Two ranks under torchrun, without an engine: a failure of one ends both with the reason, and
leaves nothing running.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, left_running, our_environment

RANK = """
import support.startup
import os, signal, sys, time
import torch.distributed as dist
from support.ranks import init_distributed, exit_all
from support.watch import Stopped, Watch

how, folder = sys.argv[1:]
Watch.EVERY, Watch.SILENT, Watch.GRACE, Watch.AGAIN = 0.2, 6, 4, 0.3
if how == "unmet":
    open(f"{folder}/alive{os.environ['RANK']}", "w").close()
    if os.environ["RANK"] == "1":
        time.sleep(10**6)
device = init_distributed()
rank = dist.get_rank()
with Watch(hang_timeout=3, tensor_parallel=2 if how == "pair" else 1) as watch:
    watch.graceful = how != "early"
    number = 0
    try:
        while True:
            with watch.phase("sample", can_stop=True):
                for i in range(16 if rank or how == "pair" else 8):  # rank 0 waits for rank 1
                    time.sleep(0.01)
                    watch.step()
                    if how == "engine" and rank == 1 and number == 3:
                        raise OSError("the engine died")
            if number == 3 and rank == 1:
                if how == "raise":
                    raise RuntimeError("a broken rank")
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
            if number == 3 and how == "hang":
                with watch.phase("train"):
                    if rank == 1:
                        time.sleep(10**6)
                    dist.barrier()
            open(f"{folder}/alive{rank}", "w").close()
            if how == "slow" and rank == 1 and number == 1:
                for _ in range(25):  # longer than hang_timeout and SILENT, but it shows progress
                    time.sleep(0.3)
                    watch.beat()
            number += 1
    except Stopped:
        pass
    if how == "unstoppable":
        with watch.phase("train"):
            for _ in range(1000):
                time.sleep(0.1)
                watch.beat()
    open(f"{folder}/saved{rank}", "w").write(str(number))
    if watch.error:
        raise watch.error
    code = watch.exit_code()
exit_all(code)
"""


class Ranks:
    """The script under torchrun, on two ranks."""

    def __init__(self, how, folder):
        self.folder, self.marker = folder, f"{how}-{folder.name}"
        (folder / "rank.py").write_text(RANK)
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--shutdown_timeout=5",
        ]
        command = [*torchrun, folder / "rank.py", how, folder]
        environment = our_environment() | {"VINEPPO_TEST": self.marker}
        output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **output)

    def wait_for(self, name):
        while not (self.folder / name).exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)

    def end(self):
        output, _ = self.process.communicate(timeout=90)
        time.sleep(1)
        assert left_running(self.marker) == []
        return self.process.returncode, output

    def saved(self):
        return [
            int((self.folder / f"saved{rank}").read_text())
            for rank in (0, 1)
            if (self.folder / f"saved{rank}").exists()
        ]


@pytest.mark.parametrize(
    "how,words",
    [
        ("raise", ["rank 1: failed: RuntimeError('a broken rank')", "rank 0: stops because rank 1 failed"]),
        ("kill", ["Signal 9 (SIGKILL)"]),
        ("hang", ["no progress: ", "rank 1 in train for 3 s"]),
        ("freeze", ["rank 0: stops because another rank is gone, or has been silent for 6 s"]),
    ],
)
def test_a_failure_of_one_rank_ends_both(how, words, tmp_path):
    ranks = Ranks(how, tmp_path)
    if how == "freeze":  # torchrun would wait half a minute for the frozen rank once the other one has ended
        ranks.wait_for("alive0")
        while left_running(ranks.marker, "rank.py", rank=0):
            time.sleep(0.2)
        for pid in left_running(ranks.marker, "rank.py", rank=1):
            os.kill(pid, signal.SIGKILL)
    code, output = ranks.end()
    assert code != 0 and ranks.saved() == []
    for text in words:
        assert text in output, output


def test_an_engine_that_dies_ends_both_after_saving(tmp_path):
    ranks = Ranks("engine", tmp_path)
    code, output = ranks.end()
    assert code != 0 and ranks.saved() == [3, 3]
    assert "rank 1: failed: OSError('the engine died'); all ranks save what they have and stop" in output


@pytest.mark.parametrize(
    "how,number", [("plain", signal.SIGINT), ("pair", signal.SIGTERM), ("slow", signal.SIGTERM)]
)
def test_a_signal_to_torchrun_stops_both_at_the_same_place(how, number, tmp_path):
    ranks = Ranks(how, tmp_path)
    ranks.wait_for("alive0" if how != "slow" else "alive1")
    time.sleep(9 if how == "slow" else 0.5)
    ranks.process.send_signal(number)
    if how == "pair":  # as of a scheduler that signals every process, beside torchrun that forwards it
        for pid in left_running(ranks.marker, "rank.py"):
            if pid != ranks.process.pid:
                os.kill(pid, number)
    code, output = ranks.end()
    assert code != 0 and len(set(ranks.saved())) == 1 == len(ranks.saved()) - 1, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # the second: its terminal is closed
def test_a_signal_to_one_rank_stops_both_with_the_documented_code(number, tmp_path):
    ranks = Ranks("plain", tmp_path)
    ranks.wait_for("alive1")
    os.kill(left_running(ranks.marker, "rank.py", rank=1)[0], number)
    code, output = ranks.end()
    assert code != 0 and len(set(ranks.saved())) == 1 == len(ranks.saved()) - 1
    expected = 128 + number
    assert f"exitcode  : {expected}" in output or f"exitcode: {expected}" in output, output


def test_a_signal_that_nohup_ignores_stops_nothing(tmp_path):
    """One rank without torchrun, which takes SIGHUP for a reason to end whatever nohup says."""
    (tmp_path / "rank.py").write_text(RANK)
    command = ["sh", "-c", f"trap '' HUP; exec {sys.executable} {tmp_path}/rank.py plain {tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, env=our_environment())
    alive = tmp_path / "alive0"
    while not alive.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)  # longer than the threads take to notice
    alive.unlink()
    while not alive.exists():  # it goes on
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM and (tmp_path / "saved0").exists()


def test_a_second_signal_ends_at_once_and_one_before_there_is_anything_to_save_too(tmp_path):
    for how, signals in (("unstoppable", 2), ("early", 1)):
        (tmp_path / how).mkdir()
        ranks = Ranks(how, tmp_path / how)
        ranks.wait_for("alive1")
        for _ in range(signals):
            for rank in (0, 1):
                for pid in left_running(ranks.marker, "rank.py", rank):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.5)
        code, output = ranks.end()  # "unstoppable" would go on for 100 s, and GRACE would say so after 4
        assert code != 0 and ranks.saved() == [] and "did not end within" not in output, output


def test_a_phase_that_does_not_end_is_cut_short(tmp_path):
    ranks = Ranks("unstoppable", tmp_path)
    ranks.wait_for("alive1")
    os.kill(left_running(ranks.marker, "rank.py", rank=0)[0], signal.SIGTERM)
    code, output = ranks.end()
    assert (
        code != 0
        and "train did not end within 4 s; what was saved before is kept" in output
        and ranks.saved() == []
    )


@pytest.mark.parametrize("how", ["unmet", "plain"])  # unmet: one still waits for the other to join
def test_ranks_do_not_outlive_torchrun(how, tmp_path):
    ranks = Ranks(how, tmp_path)
    ranks.wait_for("alive1")
    ranks.process.kill()
    code, _ = ranks.end()  # its helper sees that nothing is left
    assert code == -signal.SIGKILL
