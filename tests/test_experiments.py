"""The comparison: which runs it plans, and what it makes of their results. The page and the table of a run's solutions; its pictures."""

import json
import random
import re
import statistics

import pytest
import torch
from conftest import python
from transformers import AutoModelForCausalLM

import ppo
import train
from experiments import balance, compare, naive, show, values


def result(accuracies, tokens=100, seconds=2.0):
    """A run of ten iterations between evaluations, four steps each."""
    curve = [{"iteration": 0, "accuracy": accuracies[0], "tokens": 0, "seconds": 0.0}]
    for i in range(1, 10 * (len(accuracies) - 1) + 1):
        line = {"iteration": i, "gradient_steps": 4 * i, "reward": i / 100, "kl": i / 10, "tokens": tokens * i, "seconds": seconds * i}
        curve.append(line | ({"accuracy": accuracies[i // 10]} if i % 10 == 0 else {}))
    return dict(start="0", curve=curve, command="")


def test_every_planned_command_is_one_that_train_accepts():
    for method, (command, rates, seeds, search) in compare.METHODS.items():
        assert seeds in compare.T95 and (search is None or compare.METHODS[search][1] == rates)
        for rate in rates if command.startswith("train.py") else ():
            s = train.parse_settings([*command.split()[1:], "--learning_rate", *rate.split()])
            train.check(s, 1)
            episodes = s.prompts_per_iteration * s.responses_per_prompt
            assert s.iterations * s.epochs * episodes // s.minibatch == 160, method  # all RL methods make as many optimizer steps
            assert method in compare.STYLE or search


def test_the_seeds_that_count_wait_for_the_search_and_use_the_best_rate():
    plan = compare.planned({})
    assert all(name.startswith("search-") for name in plan)
    found = {compare.search_name("rloo", rate, seed): result([0, 0, 0.5, 0.5]) for rate in compare.LR for seed in compare.SEARCH_SEEDS}
    best = compare.LR[1]
    found[compare.search_name("rloo", best, 100)] = result([0, 0, 0.5, 0.6])
    assert compare.chosen_rate("rloo", found) == compare.chosen_rate("rloo-T0.6", found) == best
    plan = compare.planned(found)
    assert all(plan[f"rloo-s{seed}"].endswith(f"--learning_rate {best} --seed {seed}") for seed in range(5))
    assert set(found) < set(plan) and "grpo-s0" not in plan


def planned_results(curves):
    """The curves as results of the commands that are planned for them; the search first, since the others follow from it."""
    found = {}
    for name in sorted(curves, key=lambda name: not name.startswith("search-")):
        found[name] = curves[name] | dict(command=compare.planned(found).get(name, "an older one"))
    return found


def test_results_of_other_commands_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    curves = {compare.search_name("rloo", rate, seed): result([0, 0.5, 0.5]) for rate in compare.LR for seed in compare.SEARCH_SEEDS}
    found = planned_results(curves | {"rloo-s0": result([0, 1]), "rloo-s1": result([0, 1]), "rloo-s9": result([0, 1])})
    found["rloo-s1"]["command"] = found["rloo-s1"]["command"].replace(compare.LR[0], compare.LR[1])
    for name, r in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(r))
    assert set(compare.load_results()) == set(found) - {"rloo-s1", "rloo-s9"}
    stale = compare.search_name("rloo", compare.LR[2], 100)
    (tmp_path / f"{stale}.json").write_text(json.dumps(found[stale] | dict(command="an older one")))
    assert set(compare.load_results()) == set(curves) - {stale}  # the search is not complete, so no rate is chosen


def test_evaluations_over_seeds():
    first, second = result([0.4, 0.6, 0.5]), result([0.4, 0.8, 0.7], seconds=4.0)
    start, middle, end = compare.evaluations([first["curve"], second["curve"]])
    assert start["accuracy"] == pytest.approx(0.4) and start["half"] == 0 and start["tokens"] == 0
    assert middle["accuracy"] == pytest.approx(0.7) and middle["half"] == pytest.approx(12.71 * 0.1)  # t(1) s / sqrt(2)
    assert middle["gradient_steps"] == 40 and middle["tokens"] == 1000 and middle["seconds"] == 20  # ten iterations of the faster seed
    assert middle["train"] == pytest.approx(statistics.mean(range(5, 16)) / 100) and end["train"] == pytest.approx(0.175)
    assert end["kl"] == pytest.approx(statistics.mean(range(11, 21)) / 10)
    points = [start, middle, end]
    assert compare.reach(points, 0.55, "tokens") == pytest.approx(500) and compare.reach(points, 0.71, "tokens") is None
    assert compare.reach(points, 0.3, "tokens") == 0


def test_pictures_and_table_come_from_the_results_alone(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results" / "compare"
    folder.mkdir(parents=True)
    monkeypatch.setattr(compare, "RESULTS", folder)
    with pytest.raises(SystemExit, match="no finished runs"):
        compare.draw()
    runs = {f"vineppo-K9-s{seed}": result([0.4, 0.5, 0.6 + seed / 100]) for seed in range(5)}
    runs |= {f"ppo-s{seed}": result([0.4, 0.45, 0.5], tokens=10) for seed in range(2)}  # not all of them have ended
    for method in ("vineppo-K9", "ppo"):
        runs |= {compare.search_name(method, rate, s): result([0, 0.5, 0.5]) for rate in compare.METHODS[method][1] for s in (100, 101)}
    for name, r in planned_results(runs).items():
        (folder / f"{name}.json").write_text(json.dumps(r))
    compare.draw()
    table = (folder.parent / "compare.md").read_text()
    assert table == capsys.readouterr().out
    assert (
        "| VinePPO, K = 9 | 2e-5 | 5 | 0.620 ± 0.020 | 0.620 | 40 | 1,000 | 20 | 2,000 | 40 |" in table
    )  # reaches 0.5 at the first evaluation
    assert "| PPO | 1e-5 | 2 | 0.500 ± 0.000 | 0.500 | 80 | 200 | 40 | 200 | 40 |" in table
    for picture in ("compare.png", "compare-more.png"):
        assert (folder.parent / picture).stat().st_size > 20_000


HOSTILE = "</script><script>alert(1)</script><!-- \u2028 & \u202e \x1b[2J"


def solution(text=HOSTILE):
    step = dict(text=text, advantage=-0.5, value=0.5, right=2, K=4, rollouts=[[0.0, text]])
    return dict(prompt=text, answer=text, reward=0.0, finished=False, steps=[step, dict(text="\nb", advantage=0.0, value=None)])


def test_the_page_holds_the_models_text_as_data_alone():
    page = show.as_page(HOSTILE, [solution()])
    assert page.count("<script") == page.count("</script>") == 2 and "alert(1)</" not in page and "<!--" not in page
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == dict(title=HOSTILE, solutions=[solution()])
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)  # nothing is loaded from anywhere


def test_a_solution_in_the_terminal():
    lines = show.as_text(solution("x = 5\n")).splitlines()
    assert lines[-3].split(maxsplit=4) == ["0", "0.50", ".", "-0.50", "x = 5"] and lines[-2].split(maxsplit=4) == [
        "1",
        ".",
        ".",
        "+0.00",
        "b",
    ]
    assert lines[-1] == "reward 0, the answer is x = 5; unfinished"
    assert "\x1b" not in show.as_text(solution())


def test_show_and_plot_from_the_shell(tmp_path):
    run = tmp_path / "run"
    for script in ("show", "plot"):
        done = python(f"experiments/{script}.py", run)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and str(run) in done.stderr
    show.write(run / "episodes" / "000020.jsonl.gz", [solution()] * 3)
    assert show.read(run / "episodes" / "000020.jsonl.gz") == [solution()] * 3
    assert "--iteration 3 was not stored" in python("experiments/show.py", run, "--iteration", 3).stderr
    assert "the iteration has the solutions 0 to 2" in python("experiments/show.py", run, "--text", 3).stderr
    assert python("experiments/show.py", run, "--text", 2).stdout.rstrip().endswith("unfinished")
    assert "3 solutions of iteration 20" in python("experiments/show.py", run, "--out", tmp_path / "page.html").stdout
    assert "run, iteration 20" in (tmp_path / "page.html").read_text()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in result([0.1, 0.2])["curve"]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    for folder, rate in ((run, 0.1), (other, 0.2)):
        (folder / "settings.json").write_text(
            json.dumps(dict(dataset="arithmetic", algorithm="vineppo", learning_rate=rate, run_dir=str(folder)))
        )
    done = python("experiments/plot.py", run, other, "--out", tmp_path / "both.png")
    assert done.returncode == 0 and (tmp_path / "both.png").stat().st_size > 20_000, done.stderr
    assert "learning_rate 0.1" in done.stdout and "learning_rate 0.2" in done.stdout and "run_dir" not in done.stdout


# --- the analysis of values ---------------------------------------------------------------------------------------------------------


def test_estimates_never_use_the_rollouts_of_the_truth():
    row = values.estimates([1.0] * 4 + [0.0] * 9, truth_rollouts=4)
    assert row == {"truth": 1.0, "error": 0.0, "K=1": 0.0, "K=3": 0.0, "K=9": 0.0}
    row = values.estimates([1.0, 0.0, 0.0, 0.0] + [1.0] + [0.0] * 8, truth_rollouts=4)
    assert row["truth"] == 0.25 and row["error"] == pytest.approx((0.25 * 0.75 / 3) ** 0.5)  # unbiased
    assert (row["K=1"], row["K=3"], row["K=9"]) == (1.0, pytest.approx(1 / 3), pytest.approx(1 / 9))


def test_accuracy_of_estimators_that_are_known():
    """Values uniform on 0..1, truth by 50 rollouts, estimates by 9: the noise of the truth is taken out, V(1 - V) / 9 is left."""
    rng, rows = random.Random(0), []
    for _ in range(4000):
        v = rng.random()
        row = values.estimates([float(rng.random() < v) for _ in range(59)], 50)
        rows.append(row | {"exact": v, "shifted": v + 0.1, "constant": 0.5})
    exact, shifted, constant, nine = (values.accuracy_of(rows, name) for name in ("exact", "shifted", "constant", "K=9"))
    assert exact["explained_without_noise"] == pytest.approx(1.0, abs=0.005) and exact["explained"] < 0.98
    assert shifted["bias"] == pytest.approx(0.1, abs=0.01) and shifted["correlation"] == pytest.approx(exact["correlation"])
    assert constant["explained"] == pytest.approx(0.0, abs=0.01) and constant["correlation"] == 0.0
    assert nine["explained_without_noise"] == pytest.approx(1 - (1 / 6 / 9) / (1 / 12), abs=0.02)  # E V(1 - V) = 1/6, Var V = 1/12
    assert nine["mae"] > exact["mae"] > 0


def test_ranking_counts_pairs_that_differ_and_splits_ties():
    def row(truth, estimate):
        return {"truth": truth, "error": 0.03, "x": estimate}

    group = [row(0.9, 1.0), row(0.5, 1.0), row(0.1, 0.0), row(0.11, 0.5)]  # the last two do not differ
    found = values.ranking_of([group], "x")
    assert found == dict(pairs=pytest.approx(4.5 / 5), top1=0.5, number_of_pairs=5, number_of_states=1)  # 0.9 and 0.5 are tied
    assert values.ranking_of([[row(0.5, 0.0), row(0.51, 1.0), row(0.49, 0.3)]], "x")["pairs"] is None
    chance = values.ranking_of([group, group[:2]], "truth")
    assert chance["pairs"] == chance["top1"] == 1.0 and chance["number_of_pairs"] == 6


def test_the_limit_of_large_k_takes_out_what_falls_as_one_over_k():
    batches = [{f"K={k}": a + b / k for k in values.KS} for a, b in ((2.0, 3.0), (5.0, 0.0), (1.0, -1.0))]
    assert values.limit_of_large_k(batches) == pytest.approx([2.0, 5.0, 1.0])
    ratio, error = values.ratio_and_error([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], random.Random(0))
    assert ratio == pytest.approx(2.0) and error == pytest.approx(0.0, abs=1e-12)


def test_the_squared_gradient_is_that_of_these_advantages_alone(tiny_model, device):
    """One after the other, as for several estimators on the same responses; against plain autograd."""
    model, plain = ppo.load_sharded(tiny_model, device), AutoModelForCausalLM.from_pretrained(tiny_model)
    episodes = [dict(prompt_ids=[1, 4 + i], response_ids=[5, 6 + i, 7]) for i in range(3)]
    for advantages in ([[1.0, 0.5, -1.0]] * 3, [[0.0] * 3, [2.0, 0.0, 0.0], [0.0, -1.0, 0.0]]):
        plain.zero_grad()
        for e, a in zip(episodes, advantages):
            ids = torch.tensor([e["prompt_ids"] + e["response_ids"]])
            logprobs = (plain(ids).logits[0, 1:-1] / 0.7).log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0]
            (-(logprobs * torch.tensor(a)).sum() / 3).backward()
        expected = sum((p.grad**2).sum() for p in plain.parameters()).item()
        assert values.squared_gradient(model, episodes, advantages, 0.7, device) == pytest.approx(expected, rel=1e-4)


def test_a_run_of_the_comparison_can_be_made_again_by_its_name():
    done = python("experiments/compare.py", "again", "vineppo-K10-s0")
    assert done.returncode == 1 and "there is no run vineppo-K10-s0: name one of " in done.stderr and "vineppo-K9-s0" in done.stderr


def test_values_refuses_what_is_no_checkpoint(tmp_path):
    done = python("experiments/values.py", tmp_path)
    assert done.returncode == 1 and done.stderr.strip() == f"values.py: {tmp_path} is no RUN/checkpoints/N of train.py"


# --- speed ------------------------------------------------------------------------------------------------------------------------


def test_the_plain_trainer_of_the_benchmark_makes_the_same_update(tiny_model, device):
    """It is compared with in time and memory, so it must do the same work: one optimizer step with both."""
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(2, 20) for _ in range(n)]
    episodes = [dict(prompt_ids=ids(5), response_ids=ids(n), advantages=[rng.gauss(0, 1)] * n) for n in (3, 9, 1, 6)]
    options = dict(learning_rate=1e-3, minibatch=4, epochs=1)
    ours, plain = ppo.Trainer(tiny_model, device, total_steps=1, **options), naive.Trainer(tiny_model, device, micro_batch=2, **options)
    before = {name: p.clone() for name, p in plain.model.named_parameters()}
    ours.update(episodes)
    plain.update(episodes)
    assert any(not torch.equal(before[name], p) for name, p in plain.model.named_parameters())
    for (name, a), b in zip(ours.model.named_parameters(), plain.model.parameters()):
        torch.testing.assert_close(a.full_tensor(), b, atol=1e-5, rtol=1e-4, msg=name)


def test_the_benchmark_finds_the_value_prompts_in_the_prefix_cache():
    done = python("experiments/bench.py", "--part", "cache")  # as bench.py starts each of its parts
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout.splitlines()[-1])[0]
    assert "prefix cache" in first["what"] and 0.9 <= first["value"] < 1


def test_the_simulated_ranks_wait_less_where_the_states_are_dealt():
    solutions = [[0, 40, 80]] * 9 + [list(range(0, 901, 30))]  # one problem of ten is long
    (alone, waits), (dealt, waits_less) = (balance.iteration("DeepSeekMath-7B", solutions, spread, 8, 0) for spread in (False, True))
    assert dealt < 0.9 * alone and waits_less < waits
