"""A checkpoint that is not whole is never taken for one, wherever its writing or copying was cut
short; what was saved before stays.
"""

import json
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, our_environment, python

from support import run_folder
from support.run import Run


def write(draft):
    (draft / "state").mkdir()
    for name, size in (("model.safetensors", 3000), ("config.json", 70), ("state/shard", 5000)):
        (draft / name).write_bytes(bytes(size))


def test_a_checkpoint_that_was_cut_at_any_byte_or_lacks_a_file_is_passed_over(tmp_path, device):
    for iteration in (1, 2):
        run_folder.write_checkpoint(tmp_path, iteration, write, keep=0)
    two = tmp_path / "checkpoints" / "2"
    assert run_folder.newest_checkpoint(tmp_path) == (2, two)
    shutil.copytree(two, tmp_path / "whole")
    rng = random.Random(0)
    for file in [p for p in two.rglob("*") if p.is_file()]:
        content = file.read_bytes()
        for size in {0, 1, len(content) - 1, *rng.sample(range(len(content)), 20)}:
            file.write_bytes(content[:size])
            assert run_folder.newest_checkpoint(tmp_path) == (1, tmp_path / "checkpoints" / "1"), (file, size)
        file.unlink()
        assert run_folder.newest_checkpoint(tmp_path)[0] == 1, file
        file.write_bytes(content)
        assert run_folder.newest_checkpoint(tmp_path)[0] == 2
    file.write_bytes(content[:-1])
    run_folder.write_checkpoint(tmp_path, 2, write, keep=0)  # the run went on from 1 and comes here again
    assert run_folder.newest_checkpoint(tmp_path) == (2, two)


def test_a_kill_while_it_is_written_leaves_the_last_good_one(tmp_path, device):
    run_folder.write_checkpoint(tmp_path, 1, write, keep=0)

    class Killed(BaseException):
        pass

    def cut_short(draft):
        (draft / "model.safetensors").write_bytes(bytes(7))
        raise Killed

    with pytest.raises(Killed):
        run_folder.write_checkpoint(tmp_path, 2, cut_short, keep=1)
    assert (tmp_path / "checkpoints" / "2.unfinished").exists()
    assert run_folder.newest_checkpoint(tmp_path)[0] == 1
    run_folder.write_checkpoint(tmp_path, 3, write, keep=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3"]


def test_older_ones_go_only_after_a_newer_one_is_whole(tmp_path, device):
    seen = []

    def look(draft):
        seen.append(sorted(p.name for p in draft.parent.iterdir()))
        write(draft)

    for iteration in (8, 9, 10, 11):
        run_folder.write_checkpoint(tmp_path, iteration, look, keep=2)
    assert seen == [
        ["8.unfinished"],
        ["8", "9.unfinished"],
        ["10.unfinished", "8", "9"],
        ["10", "11.unfinished", "9"],
    ]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "11"]


SAVES = """
import sys
from pathlib import Path
from model import load_sharded, save_pretrained, save_state
from support import run_folder
from support.ranks import init_distributed
device, run = init_distributed(), Path(sys.argv[2])
model = load_sharded(sys.argv[1], device)
import torch
from transformers import AutoTokenizer
tokenizer, optimizer = AutoTokenizer.from_pretrained(sys.argv[1]), torch.optim.AdamW(model.parameters())
def write(draft):
    save_state(draft / "state" / "policy", model, optimizer, 0)
    save_pretrained(model, tokenizer, draft)
for iteration in range(1, 100):
    run_folder.write_checkpoint(run, iteration, write, keep=0)
    print(iteration, flush=True)
"""


@pytest.mark.parametrize(
    "megabytes", [9, 12]
)  # 6 MB each: full while the state or while the model is written
def test_a_full_disk_stops_with_the_reason_and_what_was_saved_is_usable(megabytes, tmp_path, tiny_model):
    (tmp_path / "saves.py").write_text(SAVES)
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs {tmp_path / 'disk'}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a small disk (unshare -rm, tmpfs)")
    keep = f"; code=$?; cp -r {tmp_path / 'disk'} {tmp_path / 'kept'}; exit $code"  # the mount ends with its shell
    command = f"{mount} && {sys.executable} {tmp_path / 'saves.py'} {tiny_model} {tmp_path / 'disk'}{keep}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command],
        cwd=ROOT,
        env=our_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and " could not be written (" in done.stderr, done.stderr
    assert (
        "; 0 MB are free there); what was saved before is kept" in done.stderr
        or "No space left on device" in done.stderr
    )
    newest = int(done.stdout.split()[-1])
    assert newest >= 1 and run_folder.newest_checkpoint(tmp_path / "kept") == (
        newest,
        tmp_path / "kept" / "checkpoints" / str(newest),
    )
    assert not list((tmp_path / "kept" / "checkpoints").glob("*.unfinished"))


def test_one_process_at_a_time(tmp_path):
    file = run_folder.lock(tmp_path / "run")
    again = "import pathlib, sys; from support import run_folder; run_folder.lock(pathlib.Path(sys.argv[1]))"
    assert "is in use: another process trains in it" in python("-c", again, tmp_path / "run").stderr
    file.close()
    assert python("-c", again, tmp_path / "run").returncode == 0


def test_metrics_have_neither_gaps_nor_repeats(tmp_path):
    lines = [{"iteration": i, "reward": 0.5} for i in range(4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for cut in range(len(text.splitlines()[3]) + 1):  # line 3 is cut short somewhere
        (tmp_path / "metrics.jsonl").write_text(text[: len(text) - cut - 1])
        assert run_folder.read_metrics(tmp_path, 2) == lines[:3]
    (tmp_path / "metrics.jsonl").write_text(text)
    run_folder.open_metrics(tmp_path, run_folder.read_metrics(tmp_path, 1)).write("next\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(text.splitlines(True)[:2]) + "next\n"
    (tmp_path / "metrics.jsonl").write_text(text.splitlines(True)[0] + text.splitlines(True)[2])
    with pytest.raises(ValueError, match="does not hold the iterations 1 to 2"):
        run_folder.read_metrics(tmp_path, 2)


def test_a_resume_with_other_weights_or_problems_under_the_same_names_is_refused(tmp_path):
    run = object.__new__(Run)
    run.folder, run.checkpoint, inputs = tmp_path, None, {"--model": "a", "--dataset": "b"}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    run.check_inputs(inputs | {"--model": "c"})  # it begins anew
    run.checkpoint = tmp_path / "checkpoints" / "2"
    run.check_inputs(inputs)
    with pytest.raises(ValueError, match="was begun with other files: --model changed since; put them back"):
        run.check_inputs(inputs | {"--model": "c"})


def test_files_of_a_run_that_are_gone_or_empty_are_named(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl is gone"):
        run_folder.read_metrics(tmp_path, 3)
    (tmp_path / "settings.json").touch()
    with pytest.raises(ValueError, match="settings.json cannot be read"):
        run_folder.read_json(tmp_path / "settings.json")
