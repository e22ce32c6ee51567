"""The programs in tools/: show, plot and report. test_plan.py has plan."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from support.run_folder import write_solutions
from tools import plot, report, show

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 & \u202e \x1b[2J"


def solution(text=HOSTILE):
    step = dict(text=text, advantage=-0.5, value=0.5, right=2, K=4, rollouts=[[0.0, text]])
    steps = [step, dict(text="\nb", advantage=0.0, value=None)]
    return dict(prompt=text, answer=text, reward=0.0, finished=False, steps=steps)


def test_the_page_holds_the_models_text_as_data_alone():
    page = show.as_page(HOSTILE, [solution()])
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)</" not in page and "<!--" not in page
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == dict(title=HOSTILE, solutions=[solution()])
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)  # nothing is loaded from anywhere


def test_a_solution_in_the_terminal():
    lines = show.as_text(solution("x = 5\n")).splitlines()
    assert lines[-3].split(maxsplit=4) == ["0", "0.50", ".", "-0.50", "x = 5"]
    assert lines[-2].split(maxsplit=4) == ["1", ".", ".", "+0.00", "b"]
    assert lines[-1] == "reward 0, the answer is x = 5; unfinished"
    assert "\x1b" not in show.as_text(solution())


def assert_one_line(done, about):
    """A program that was refused said why."""
    code, _, said = done
    assert code == 1 and "\n" not in said and str(about) in said


def test_show(tmp_path, main_of):
    run = tmp_path / "run"
    assert_one_line(main_of(show, run), run)
    write_solutions(run / "episodes" / "000020.jsonl.gz", [solution()] * 3)
    assert_one_line(main_of(show, run, "--iteration", 3), "--iteration 3 was not stored")
    assert_one_line(main_of(show, run, "--text", 3), "--text 3 must be at least 0 and at most 2")
    assert main_of(show, run, "--text", 2)[1].rstrip().endswith("unfinished")
    _, output, _ = main_of(show, run, "--out", tmp_path / "page.html")
    assert "3 solutions of iteration 20" in output
    assert "run, iteration 20" in (tmp_path / "page.html").read_text()
    assert_one_line(main_of(show, run, "--picture", tmp_path / "credit.png"), "has no wrong solution to draw")
    drop = solution() | dict(reward=0.0, finished=True)
    write_solutions(run / "episodes" / "000021.jsonl.gz", [drop])
    assert main_of(show, run, "--picture", tmp_path / "credit.png")[0] == 0
    assert (tmp_path / "credit.png").stat().st_size > 5_000


def test_plot(tmp_path, main_of):
    runs = tmp_path / "run", tmp_path / "other"
    assert_one_line(main_of(plot, runs[0]), runs[0])
    for run, rate in zip(runs, (0.1, 0.2)):
        run.mkdir()
        lines = [json.dumps(dict(iteration=i, reward=i / 100, kl=i / 10)) + "\n" for i in range(11)]
        (run / "metrics.jsonl").write_text("".join(lines) + '{"iteration": 11, "rew')  # killed while it wrote
        settings = dict(dataset="arithmetic", algorithm="vineppo", learning_rate=rate, run_dir=str(run))
        settings |= dict(clip=0.2) if rate == 0.1 else {}  # a setting that only one of them had
        (run / "settings.json").write_text(json.dumps(settings))
    for chosen, picture in ((runs[:1], "one.png"), (runs, "both.png")):
        code, output, _ = main_of(plot, *chosen, "--out", tmp_path / picture)
        assert code == 0 and (tmp_path / picture).stat().st_size > 20_000
    assert "learning_rate 0.1" in output and "learning_rate 0.2" in output
    assert "run_dir" not in output and "clip" not in output


# --- report ---


def write_run(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text('{"K": 4}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


LINES = [{"iteration": 0, "accuracy": 0.5}, {"iteration": 1, "reward": 0.25, "kl": None}]


def test_metrics_go_to_tensorboard_once_however_often_they_are_sent(tmp_path, main_of):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path / "run", LINES)
    for _ in range(2):
        assert main_of(report, tmp_path / "run", "--to", "tensorboard")[0] == 0
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(found.Tags()["scalars"]) == {"iteration", "accuracy", "reward"}
    assert [(e.step, e.value) for e in found.Scalars("reward")] == [(1, 0.25)]


def test_a_run_goes_on_in_the_same_place_of_wandb(tmp_path, monkeypatch, main_of):
    starts, logged = [], []

    class Place:
        step = property(lambda self: len(logged))

        def log(self, line, step):
            logged.append((step, line))

        def finish(self):
            pass

    double = SimpleNamespace(
        init=lambda **options: starts.append(options) or Place(),
        util=SimpleNamespace(generate_id=lambda: f"id{len(starts)}"),
    )
    monkeypatch.setitem(sys.modules, "wandb", double)
    write_run(tmp_path / "run", LINES[:1])
    main_of(report, tmp_path / "run", "--to", "wandb")
    write_run(tmp_path / "run", LINES)
    main_of(report, tmp_path / "run", "--to", "wandb")
    assert [start["id"] for start in starts] == ["id0", "id0"] and starts[0]["config"] == {"K": 4}
    assert logged == [(0, LINES[0]), (1, LINES[1])]


def test_lines_are_followed_until_the_run_has_ended(tmp_path):
    """A line that is half written is read once it is whole."""
    write_run(tmp_path, LINES)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"iteration": 2, "rew')
    lines = report.lines_of(tmp_path, follow=True, seconds=0.0)
    assert [next(lines), next(lines)] == LINES
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('ard": 1}\n')
    assert next(lines) == {"iteration": 2, "reward": 1}
    write_run(tmp_path, LINES[:1])  # resumed from an earlier checkpoint
    with pytest.raises(SystemExit, match="start report.py again"):
        next(lines)
    write_run(tmp_path, LINES)
    (tmp_path / "model").mkdir()
    assert list(report.lines_of(tmp_path, follow=True)) == LINES


def test_report_says_what_is_missing(tmp_path, monkeypatch, main_of):
    assert "holds no metrics.jsonl" in main_of(report, tmp_path, "--to", "wandb")[2]
    write_run(tmp_path, LINES)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--to wandb needs a package that is not installed" in main_of(report, tmp_path, "--to", "wandb")[2]
