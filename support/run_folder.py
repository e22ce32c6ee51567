"""The folder of a run. What stands there under its final name is whole, whenever the run was killed.

    settings.json     settings of the newest start
    inputs.json       hashes of the model and problems that the run began with, and the day of its first start
    metrics.jsonl     one line per iteration; line 0: accuracy before training
    checkpoints/N     the policy after N iterations, a Hugging Face folder; in state/ what training resumes
                      from, and the settings
    episodes/00000N   stored responses, for tools/show.py
    model             the final policy, a Hugging Face folder

Files and folders are written as NAME.unfinished and then renamed. A folder lists the sizes of its files, so
that a folder that a copy or a file system cut short does not count as whole either.
"""

import fcntl
import gzip
import json
import os
import shutil
import statistics
from datetime import date

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from steps import step_boundaries, token_starts

SIZES = "files.json"  # of a folder: {file: bytes}


def write_text(path, text):
    """Write a text file under another name and rename it."""
    draft = path.with_name(path.name + ".unfinished")
    with open(draft, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    draft.rename(path)


def read_json(path):
    """What a .json file holds. Raises ValueError, which names the file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): put it back, or name another --run_dir") from None


def first_day(run):
    """The date of a run's first start, which its chat template writes; today's for a new run."""
    path = run / "inputs.json"
    known = read_json(path).get("day") if path.exists() else None
    return date.fromisoformat(known) if known else date.today()


def write_folder(final, write):
    """Fill a folder with write(draft), then rename it. All ranks call it, on one file system."""
    draft = final.with_name(final.name + ".unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    dist.barrier()
    try:
        write(draft)
        dist.barrier()
        if dist.get_rank() == 0:
            sizes = {str(p.relative_to(draft)): p.stat().st_size for p in draft.rglob("*") if p.is_file()}
            write_text(draft / SIZES, json.dumps(sizes, indent=1))
            os.sync()  # else a power failure could leave the new name with files cut short
            shutil.rmtree(final, ignore_errors=True)  # a folder that was cut short
            draft.rename(final)
    except (Exception, CheckpointException) as error:  # torch's is not an Exception
        free = shutil.disk_usage(draft.parent).free / 1e6
        shutil.rmtree(draft, ignore_errors=True)
        # torch's exception brings the traces of all ranks, the reason at the end
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = lines[-1] if isinstance(error, CheckpointException) else " ".join(lines)
        raise RuntimeError(
            f"{final} could not be written ({reason}; {free:.0f} MB are free there); what was saved before is kept"
        ) from error
    dist.barrier()


def whole(folder):
    """Whether everything that write_folder wrote is there."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def checkpoints(run):
    """The checkpoint folders, whole or not, oldest first."""
    return sorted((p for p in run.glob("checkpoints/*") if p.name.isdigit()), key=lambda p: int(p.name))


def write_checkpoint(run, iteration, write, keep):
    """Write checkpoints/`iteration` like write_folder; then delete all but the newest `keep` (0: none)."""
    write_folder(run / "checkpoints" / str(iteration), write)
    if dist.get_rank() == 0:
        for older in [p for p in checkpoints(run) if whole(p)][:-keep] if keep else ():
            older.rename(older.with_name(older.name + ".unfinished"))
        for rest in (run / "checkpoints").glob("*.unfinished"):
            shutil.rmtree(rest)
    dist.barrier()


def newest_checkpoint(run):
    """(iterations done, folder) of the newest whole checkpoint; (0, None) if there is none."""
    return next(((int(p.name), p) for p in reversed(checkpoints(run)) if whole(p)), (0, None))


def lock(run):
    """Keep other processes out while the returned file is open. Raises ValueError if another has it."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--run_dir {run} is in use: another process trains in it") from None
    return file


def read_metrics(run, done):
    """The lines of metrics.jsonl up to iteration `done`. Raises ValueError if a line is missing.

    A kill can have cut the last line short.
    """
    lines, path = [], run / "metrics.jsonl"
    if done and not path.exists():
        raise ValueError(f"{path} is gone: put it back, or name another --run_dir")
    for text in path.read_text().splitlines() if done else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["iteration"] <= done:
            lines.append(line)
    if [line["iteration"] for line in lines if line["iteration"]] != list(range(1, done + 1)):
        raise ValueError(
            f"{path} does not hold the iterations 1 to {done} that the newest checkpoint comes from"
        )
    return lines


def open_metrics(run, lines):
    """metrics.jsonl with these lines, open for appending."""
    write_text(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return open(run / "metrics.jsonl", "a", buffering=1)


def solution(episode, decode, shown=2):
    """What tools/show.py gets of an episode: prompt, answer, reward, finished, steps.

    A step: text, tokens (a number), advantage (mean over its tokens), value (of the state before it; None if
    the algorithm has none). Where rollouts made the value also K, how many were right, their token counts,
    the texts of `shown` right and wrong ones, and target and baseline if values were averaged.
    """
    e, steps = episode, []
    starts = token_starts(e.response_ids, decode)
    cuts = e.boundaries or step_boundaries("paper", e.text, e.response_ids, decode)
    for t, (a, b) in enumerate(zip(cuts, cuts[1:])):
        text = e.text[starts[a] : starts[b] if b < len(starts) else None]
        step = dict(text=text, tokens=b - a, advantage=statistics.mean(e.advantages[a:b]), value=None)
        if e.states:
            state = e.states[t] if t < len(e.states) else None
            rollouts = state.rollouts if state else []
            right = [r for r in rollouts if r.reward]
            wrong = [r for r in rollouts if not r.reward]
            step |= dict(value=state.value if state else None, right=len(right), K=len(rollouts))
            step["rollout_tokens"] = [len(r.token_ids) for r in rollouts]
            if state and e.step_targets:
                step |= dict(target=e.step_targets[t], baseline=e.step_baselines[t])
            step["rollouts"] = [(r.reward, r.text[starts[a] :]) for r in right[:shown] + wrong[:shown]]
        elif e.token_values:
            step["value"] = e.token_values[a]
        steps.append(step)
    return dict(prompt=e.prompt, answer=e.answer, reward=e.reward, finished=e.finished, steps=steps)


def write_solutions(path, solutions):
    """Write the stored responses of an iteration, dicts, as a .jsonl.gz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".unfinished")
    with gzip.open(draft, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(solution, ensure_ascii=False) + "\n" for solution in solutions)
    draft.rename(path)


def read_solutions(path):
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]
