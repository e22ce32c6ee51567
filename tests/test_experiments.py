"""The programs in experiments/, and common.py, which they share."""

import json
import math
import multiprocessing
import random
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import EXACT, python
from torch.distributed.tensor import Replicate, Shard
from transformers import AutoModelForCausalLM

import train
from baselines import dpo, restem
from episode import Completion, Episode, State
from experiments import balance, common, compare, gradients, peers, values
from model import load_sharded
from support.run_folder import write_solutions
from support.settings import parse

# --- what they share ---


def test_appending_replaces_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "results" / "x.jsonl"
    assert common.read(path) == []
    common.append(path, dict(name="b", value=1))
    common.append(path, dict(name="a", value=0.1))
    whole = path.read_bytes()
    for cut in range(1, 20):  # a process was killed while it wrote a third line
        path.write_bytes(whole + b'{"name":"c","value":[1,2]}'[:cut])
        assert common.read(path) == [dict(name="b", value=1), dict(name="a", value=0.1)]
    common.append(path, dict(name="b", value=2))
    assert path.read_bytes() == whole + b'{"name":"b","value":2}\n'
    assert common.newest(path) == dict(a=dict(name="a", value=0.1), b=dict(name="b", value=2))


def test_processes_that_append_together_lose_no_line(tmp_path):
    path = tmp_path / "x.jsonl"
    processes = [multiprocessing.Process(target=append_often, args=(path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = common.read(path)
    assert sorted(r["name"] for r in found) == [f"{i}-{j:02}" for i in range(4) for j in range(50)]
    assert all(r["text"] == "x" * 20_000 for r in found)  # longer than a write that the system makes at once


def append_often(path, number):
    for i in range(50):
        common.append(path, dict(name=f"{number}-{i:02}", text="x" * 20_000))


def test_columns_hold_what_the_rows_held():
    rows = [dict(i=0, a=0.5), dict(i=1, n={"K=9": 2, "x": {}}), dict(a=0.0, n={}), dict(i=3, n={"y": 1.5})]
    columns = common.columns_of(rows)
    assert columns == dict(
        i=[0, 1, None, 3],
        a=[0.5, None, 0.0, None],
        n={"K=9": [None, 2, None, None], "y": [None, None, None, 1.5]},
    )
    expected = [dict(i=0, a=0.5, n={}), dict(i=1, n={"K=9": 2}), dict(a=0.0, n={}), dict(i=3, n={"y": 1.5})]
    assert common.rows_of(json.loads(json.dumps(columns))) == expected
    assert common.rows_of(common.columns_of([])) == []


def test_errors_and_intervals():
    assert common.mean_and_error([3.0]) == (3.0, 0.0) == common.interval([3.0])
    mean, error = common.mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx((14 / 3 / 4) ** 0.5))
    assert common.interval([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx(3.182 * error))
    assert common.plus_minus(0.1, 0.05, 2, sign="+") == "+0.10 ± 0.05"


@pytest.mark.parametrize("task", compare.METHODS)
def test_the_tables_in_the_repository_come_from_its_results(task, tmp_path, capsys):
    plan = compare.Plan(task)
    table = plan.results.with_suffix(".md").read_text()
    (tmp_path / plan.results.name).write_text(plan.results.read_text())
    plan.results = tmp_path / plan.results.name
    compare.draw(plan)
    assert capsys.readouterr().out == table == plan.results.with_suffix(".md").read_text()


@pytest.mark.parametrize("program", [values, gradients])
def test_so_do_those_of_the_analyses(program, tmp_path, capsys):
    name = program.__name__.split(".")[-1]
    results = common.RESULTS / f"{name}.jsonl"
    (tmp_path / results.name).write_text(results.read_text())
    program.draw(tmp_path / results.name)
    assert (tmp_path / f"{name}.md").read_text() == results.with_suffix(".md").read_text()


# --- the comparison ---


def result(accuracies, tokens=100, seconds=2.0):
    """A run of ten iterations between evaluations, four steps each."""
    curve = [{"iteration": 0, "accuracy": accuracies[0], "tokens": 0, "seconds": 0.0}]
    for i in range(1, 10 * (len(accuracies) - 1) + 1):
        line = {"iteration": i, "gradient_steps": 4 * i, "reward": i / 100, "kl": i / 10}
        line |= {"tokens": tokens * i, "seconds": seconds * i}
        curve.append(line | ({"accuracy": accuracies[i // 10]} if i % 10 == 0 else {}))
    return dict(start="0", curve=common.columns_of(curve), command="")


@pytest.fixture
def plan(tmp_path):
    """The comparison on arithmetic, its results in a file of the test's."""
    plan = compare.Plan("arithmetic")
    plan.results = tmp_path / "arithmetic.jsonl"
    return plan


def store(plan, results):
    for name, r in results.items():
        common.append(plan.results, r | dict(name=name))


def searches(method, curves):
    """{name: result}: the search of a method: {rate: the curve for both of its seeds}."""
    return {
        compare.search_name(method, rate, s): c for rate, c in curves.items() for s in compare.SEARCH_SEEDS
    }


def search_won_by(method, best):
    """The search's results of three rates, of which the one in the middle is the best."""
    place = compare.LADDER.index(best)
    rates = compare.LADDER[place - 1 : place + 2]
    return searches(method, {rate: result([0, 0.5, 0.6 if rate == best else 0.5]) for rate in rates})


@pytest.mark.parametrize("task", compare.METHODS)
def test_every_planned_command_is_one_that_train_accepts(task):
    plan, steps = compare.Plan(task), {"arithmetic": 160, "worded": 120}[task]
    for method, (command, seeds) in plan.methods.items():
        assert seeds in common.T95 and compare.style_of(plan, method)
        if not command.startswith("-m ") and compare.REMOVED not in command:
            options = [*command.split()[1:], "--learning_rate", "1e-4", *plan.arguments_of("run")]
            s = train.parse_settings(options)
            train.check(s, 1)
            episodes = s.prompts_per_iteration * s.responses_per_prompt
            # all RL methods make as many optimizer steps; the control is whitened as VinePPO is
            assert s.whiten == (not method.startswith(("rloo", "grpo")) or method == "rloo-whitened")
            assert s.iterations * s.epochs * episodes // s.minibatch == steps, method
            count = re.search(r"-(\d+)$", method)
            assert episodes == (int(count[1]) if count else 16) and s.dataset == task


@pytest.mark.parametrize("method, module", [("restem", restem), ("dpo", dpo)])
@pytest.mark.parametrize("task", compare.METHODS)
def test_every_planned_command_of_a_baseline_is_one_that_it_accepts(task, method, module):
    plan = compare.Plan(task)
    options = [*plan.methods[method][0].split()[2:], "--learning_rate", "1e-4", *plan.arguments_of("run")]
    s, given = parse(module.Settings, options, module.__doc__, train.PRESETS, other=dict(model=None))
    assert s.learning_rate == 1e-4 and (s.rounds, s.batch, s.temperature) == (3, 32, 1.0)


def test_the_seeds_that_count_wait_for_the_search_and_use_the_best_rate(plan):
    first = plan.commands({})
    assert all(name.startswith("search-") for name in first)
    found = search_won_by("rloo", "1e-4")
    assert plan.chosen_rate("rloo", found) == "1e-4"
    later = plan.commands(found)
    assert all(later[f"rloo-s{seed}"].endswith(f"--learning_rate 1e-4 --seed {seed}") for seed in range(8))
    assert set(found) < set(later) and "grpo-s0" not in later


def test_a_search_widens_until_its_best_is_at_no_edge(plan):
    accuracy = {"1e-5": 0.3, "2e-5": 0.6, "5e-5": 0.5, "1e-4": 0.4, "2e-4": 0.3}
    found, searched = {}, []
    while plan.chosen_rate("rloo", found) is None:
        (rate, *_) = [r for r, mean in plan.searched("rloo", found).items() if mean is None]
        searched.append(rate)
        found |= searches("rloo", {rate: result([0, accuracy[rate], accuracy[rate]])})
    assert plan.chosen_rate("rloo", found) == "2e-5" and sorted(searched) == sorted(accuracy)


def planned_results(plan, curves):
    """The curves as results of the commands planned for them; the search first: the others follow
    from it.
    """
    found = {}
    for name in sorted(curves, key=lambda name: not name.startswith("search-")):
        found[name] = curves[name] | dict(command=plan.commands(curves).get(name, "an older one"))
    return found


def test_results_of_other_commands_do_not_count(plan):
    search = search_won_by("rloo", "1e-4")
    found = planned_results(plan, search | {f"rloo-s{seed}": result([0, 1]) for seed in (0, 1, 9)})
    found["rloo-s1"]["command"] = found["rloo-s1"]["command"].replace("1e-4", "2e-4")
    store(plan, found)
    assert set(plan.load_results()) == set(found) - {"rloo-s1", "rloo-s9"}
    stale = compare.search_name("rloo", "2e-4", 100)
    store(plan, {stale: found[stale] | dict(command="an older one")})  # a later line of the same name
    # the search is not complete, so no rate is chosen
    assert set(plan.load_results()) == set(search) - {stale}


def test_what_needs_an_option_that_is_gone_is_kept_and_never_run(plan):
    store(plan, planned_results(plan, search_won_by("rloo-mask", "1e-4")))
    later = plan.commands(plan.load_results())
    assert "rloo-mask-s0" in later and "search-K2-averaged-mask-lr1e-4-s100" in later
    missing = plan.missing(re.compile(""))
    assert missing and not any("mask" in name for name in missing)
    with pytest.raises(
        SystemExit, match="rloo-mask-s0 cannot be repeated: train.py no longer has --mask_above"
    ):
        compare.again(plan, "rloo-mask-s0")
    assert "| rloo-mask (option since removed) | 5e-5" in "".join(
        compare.table_of_search(plan, plan.load_results())
    )


def test_evaluations_over_seeds():
    runs = result([0.4, 0.6, 0.5]), result([0.4, 0.8, 0.7], seconds=4.0)
    start, middle, end = compare.evaluations([common.rows_of(run["curve"]) for run in runs])
    assert start["accuracy"] == pytest.approx(0.4) and start["half"] == 0 and start["tokens"] == 0
    assert middle["accuracy"] == pytest.approx(0.7)
    assert middle["half"] == pytest.approx(12.71 * 0.1)  # t(1) s / sqrt(2)
    assert middle["gradient_steps"] == 40 and middle["tokens"] == 1000
    assert middle["seconds"] == 20  # ten iterations of the faster seed
    assert middle["train"] == pytest.approx(statistics.mean(range(5, 16)) / 100)
    assert end["train"] == pytest.approx(0.175)
    assert end["kl"] == pytest.approx(statistics.mean(range(11, 21)) / 10)


def test_pictures_and_tables_come_from_the_results_alone(plan, capsys):
    with pytest.raises(SystemExit, match="no method with all its runs"):
        compare.draw(plan)
    runs = {f"K9-s{seed}": result([0.4, 0.5, 0.6 + seed / 100]) for seed in range(8)}
    runs |= {f"rloo-32-s{seed}": result([0.4, 0.45, 0.5], tokens=10) for seed in range(8)}
    # each seed ends 0.01 above K9's, but for two
    runs |= {f"K3-s{seed}": result([0.4, 0.5, 0.61 + (seed - (seed > 5)) / 100]) for seed in range(8)}
    # by turns 0.05 above K9's and 0.04 below
    ends = [0.6 + seed / 100 + (-0.04, 0.05)[seed % 2] for seed in range(8)]
    runs |= {f"grpo-s{seed}": result([0.4, 0.5, end]) for seed, end in enumerate(ends)}
    runs |= {f"ppo-s{seed}": result([0.4, 0.45, 0.5]) for seed in range(2)}  # not all of PPO's have ended
    for method in ("K9", "K3", "rloo-32", "grpo", "ppo"):
        runs |= search_won_by(method, "1e-4")
    store(plan, planned_results(plan, runs))
    compare.draw(plan)
    tables = plan.results.with_suffix(".md").read_text()
    assert tables == capsys.readouterr().out
    assert "| VinePPO, K = 9 | 1e-4 | 8 | 0.400 | 0.635 ± 0.020 | 0 | 2,000 | 40 |" in tables
    assert "| RLOO, 32 responses | 1e-4 | 8 | 0.400 | 0.500 ± 0.000 | 0 | 200 | 40 |" in tables
    assert "| K3 | grpo | K9 | rloo-32 |" in tables and "| PPO |" not in tables
    pairs = [
        "| K3 |  |  | +0.8 | +14.3 |",  # its own interval and K9's overlap
        "| grpo |  |  |  | +14.0 |",
        "| K9 | -0.8 |  |  | +13.5 |",
        "| rloo-32 | -14.3 | -14.0 | -13.5 |  |",
    ]
    assert "\n".join(pairs) in tables
    for picture in ("arithmetic.png", "arithmetic-more.png"):
        assert plan.results.with_name(picture).stat().st_size > 20_000


# --- the analysis of values ---


def test_an_older_runs_settings_are_read_without_what_is_gone(tmp_path):
    older = dict(dataset="arithmetic", model="runs/sft", K=4, grader_workers=2, keep_checkpoints=2, plan=None)
    (tmp_path / "settings.json").write_text(json.dumps(older))
    (tmp_path / "config.json").write_text("{}")
    s = common.Checkpoint(tmp_path).s
    assert (s.dataset, s.model, s.K) == ("arithmetic", "runs/sft", 4)


def test_estimates_never_use_the_rollouts_of_the_truth():
    row = values.estimates([1.0] * 4 + [0.0] * 9, truth_rollouts=4)
    assert row == {"truth": 1.0, "error": 0.0, "K=1": 0.0, "K=3": 0.0, "K=9": 0.0}
    row = values.estimates([1.0, 0.0, 0.0, 0.0] + [1.0] + [0.0] * 8, truth_rollouts=4)
    assert row["truth"] == 0.25 and row["error"] == pytest.approx((0.25 * 0.75 / 3) ** 0.5)  # unbiased
    assert (row["K=1"], row["K=3"], row["K=9"]) == (1.0, pytest.approx(1 / 3), pytest.approx(1 / 9))


def test_accuracy_of_estimators_that_are_known():
    """Values uniform on 0..1, truth by 50 rollouts, estimates by 9.

    Without the noise of the truth V(1 - V) / 9 is left.
    """
    rng, rows = random.Random(0), []
    for _ in range(4000):
        v = rng.random()
        row = values.estimates([float(rng.random() < v) for _ in range(59)], 50)
        rows.append(row | {"exact": v, "shifted": v + 0.1, "constant": 0.5})
    names = ("exact", "shifted", "constant", "K=9")
    exact, shifted, constant, nine = (values.accuracy_of(rows, name) for name in names)
    assert exact["explained"] < 0.98
    assert exact["explained_without_noise"] == pytest.approx(1.0, abs=0.005)
    assert shifted["bias"] == pytest.approx(0.1, abs=0.01)
    assert shifted["correlation"] == pytest.approx(exact["correlation"])
    assert constant["explained"] == pytest.approx(0.0, abs=0.01) and constant["correlation"] == 0.0
    expected = 1 - (1 / 6 / 9) / (1 / 12)  # E V(1 - V) = 1/6, Var V = 1/12
    assert nine["explained_without_noise"] == pytest.approx(expected, abs=0.02)
    assert nine["mae"] > exact["mae"] > 0


def test_ranking_counts_pairs_that_differ_and_splits_ties():
    def row(truth, estimate):
        return {"truth": truth, "error": 0.03, "x": estimate}

    group = [row(0.9, 1.0), row(0.5, 1.0), row(0.1, 0.0), row(0.11, 0.5)]  # the last two do not differ
    found = values.ranking_of([group], "x")
    # 0.9 and 0.5 are tied
    assert found == dict(pairs=pytest.approx(4.5 / 5), top1=0.5, number_of_pairs=5, number_of_states=1)
    assert values.ranking_of([[row(0.5, 0.0), row(0.51, 1.0), row(0.49, 0.3)]], "x")["pairs"] is None
    chance = values.ranking_of([group, group[:2]], "truth")
    assert chance["pairs"] == chance["top1"] == 1.0 and chance["number_of_pairs"] == 6


def test_a_run_stands_for_the_policy_that_it_began_from(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "40").mkdir(parents=True)
    with pytest.raises(ValueError, match="neither a RUN of train.py nor its RUN/checkpoints/N"):
        common.read_checkpoints([run])
    (run / "settings.json").write_text(json.dumps(dict(dataset="arithmetic", model=str(tmp_path / "sft"))))
    with pytest.raises(ValueError, match="there is no model in .*sft"):
        common.read_checkpoints([run])
    for folder in (tmp_path / "sft", run / "checkpoints" / "40"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
    before, after = common.read_checkpoints([run, run / "checkpoints" / "40"])
    assert (before.model, before.name) == (tmp_path / "sft", "run-0")
    assert (after.model, after.name) == (run / "checkpoints" / "40", "run-40")


# --- the analysis of gradients ---


def test_the_estimators_get_their_own_rollouts_and_count_their_tokens():
    """Two responses share the prompt; 9 rollouts of 2 tokens from each state, and 2 for exact values."""

    def rewards_from(states, n, top_p):
        assert n == 11 and top_p == 1.0
        for state in states:
            # from the prompt the first two rollouts agree, after the 5 they do not, after the 6 neither does
            rewards = {(): [1, 1, 0], (5,): [1, 0, 0], (6,): [0, 0, 0]}[tuple(state.prefix_ids)]
            for reward in [*rewards, 1, 1, 1, 1, 1, 1, 0, 1]:
                state.rollouts.append(Completion([7, 7], "", True, None, reward=float(reward)))

    options = SimpleNamespace(exact_rollouts=2, only=None)
    analysis = SimpleNamespace(arguments=options, critic=None, rewards_from=rewards_from)
    episodes = [Episode([1], response_ids=[i, 8], boundaries=[0, 1, 2], reward=i - 5.0) for i in (5, 6)]
    found = gradients.advantages(analysis, episodes)
    assert set(found) == {*gradients.ESTIMATORS, "RLOO"}
    at = {name: list(per_token) for name, (per_token, _) in found.items()}
    assert at["K=3"] == [pytest.approx([1 / 3 - 2 / 3, 0 - 1 / 3]), pytest.approx([0 - 2 / 3, 1 - 0])]
    assert at["K=1"] == [[0.0, -1.0], [-1.0, 1.0]] and at["exact values"] == [[0.0, -0.5], [0.0, 0.5]]
    target, baseline = 0.5 * 1 / 3 + 0.5 * 0, [2 / 3, 0.5 * 1 / 3 + 0.5 * 2 / 3]
    assert at["K=3, l=m=0.5"][0] == pytest.approx([target - baseline[0], 0 - baseline[1]])
    assert at["RLOO"] == [[-1.0] * 2, [1.0] * 2]
    tokens = {name: count for name, (_, count) in found.items()}
    assert tokens["K=9"] == 3 * 9 * 2 and tokens["K=1"] == 3 * 2 and tokens["exact values"] == 3 * 2 * 2
    # all three disagree, with themselves or the prompt
    assert tokens["K=2..9"] == tokens["K=9"] and tokens["RLOO"] == 0
    assert gradients.bias_of_adaptive(episodes) == pytest.approx((8 / 9 + 7 / 9 + 6 / 9) / 3 - 0.5)


def test_adaptive_k_is_few_where_all_agree():
    states = [State([1], [5] * t) for t in range(4)]
    episode = Episode([1], response_ids=[5] * 4, boundaries=[0, 1, 2, 3, 4], states=states)
    for state, rewards in zip(states, ([1, 1], [1, 1], [1, 1], [0, 0])):
        state.rollouts = [Completion([7], "", True, None, reward=float(r)) for r in [*rewards, *[1] * 9]]
    chosen = gradients.rollouts_for("adaptive", [episode], states)
    assert [len(chosen[state]) for state in states] == [2, 2, 9, 9]


def test_ratios_of_second_moments_and_the_tokens_of_a_response_token(tmp_path):
    batches = [
        dict(estimators={"K=9": a, "RLOO": 2 * a}, tokens={"K=9": 90, "RLOO": 0}, response_tokens=30)
        | dict(bias_of_adaptive=0.1)
        for a in (1.0, 2.0, 4.0)
    ]
    result = dict(measured=dict(responses=16, exact_rollouts=24), batches=batches)
    rows = gradients.rows_of(result)
    assert rows["K=9"] == (1.0, 0.0, 3.0)
    assert rows["RLOO"] == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-12), 0.0)
    stored = result | dict(name="run-40", batches=common.columns_of(batches))
    common.append(tmp_path / "gradients.jsonl", stored)
    gradients.draw(tmp_path / "gradients.jsonl")
    assert "| RLOO | 2.00 ± 0.00 |  |  |  | 0.0 |" in (tmp_path / "gradients.md").read_text()
    assert (tmp_path / "gradients.png").stat().st_size > 10_000


def test_signal_and_noise_of_gradients_that_are_known():
    """400 gradients of 50 parameters: a mean of length 1 and noise, of RLOO three times as much."""
    g = torch.Generator().manual_seed(0)
    mean, batches, products = torch.full((50,), 50**-0.5), [{"estimators": {}} for _ in range(400)], {}
    for name, variance in (("K=9", 2.0), ("RLOO", 6.0)):
        samples = mean + torch.randn(400, 50, generator=g) * (variance / 50) ** 0.5
        blocks = torch.stack([samples[b :: gradients.BLOCKS].sum(0) for b in range(gradients.BLOCKS)])
        products[name] = (blocks @ blocks.T).tolist()
        for batch, sample in zip(batches, samples):
            batch["estimators"][name] = (sample @ sample).item()
    result = dict(products=products, batches=batches)
    for name, variance in (("K=9", 2.0), ("RLOO", 6.0)):
        signal, error = gradients.signal_and_error(result, name)
        assert 0 < error < 0.2 and abs(signal - 1) < 3 * error
        assert gradients.moments(result, name)[1] == pytest.approx(variance, rel=0.1)
    ratio, error = gradients.noise_ratio(result, "RLOO", "K=9")
    assert error < 0.2 and abs(ratio - 3) < 3 * error
    assert math.isnan(gradients.noise_ratio_along(result, "RLOO", "K=9")[0])  # not measured
    for batch, nine, loo in zip(batches[200:], *(3 + s * torch.randn(200, generator=g) for s in (1.0, 2.0))):
        batch["along"] = {"K=9": nine.item(), "RLOO": loo.item()}
    ratio, error = gradients.noise_ratio_along(result, "RLOO", "K=9")
    assert 0.2 < error < 1 and abs(ratio - 4) < 3 * error
    for batch in batches:
        batch |= dict(tokens={"K=9": 100, "RLOO": 0}, response_tokens=10)
    # 10 value tokens to a response token: (11 sampling + training) / (sampling + training) more responses
    for training, more, says in (
        (9.0, 2.0, "pays"),
        (0.25, 9.0, "does not pay"),
        (4.0, 3.0, "cannot be told apart"),
    ):
        result["measured"] = dict(sampling=1.0, training=training)
        assert gradients.more_responses(result["measured"], 10.0) == pytest.approx(more)
        assert gradients.verdict(result, "K=9").endswith(f"by the clock it {says}.")


def test_seconds_per_token_are_the_runs(tmp_path):
    lines = [
        dict(iteration=0, accuracy=0.5),
        dict(tokens_sample=10, tokens_values=90, seconds_sample=1.0, seconds_values=4.0, seconds_train=2.0),
        dict(tokens_sample=10, tokens_values=90, seconds_sample=1.0, seconds_values=4.0, seconds_train=2.0),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = dict(sampling=10 / 200, training=4 / 20)
    assert gradients.seconds_per_token(tmp_path / "elsewhere" / "checkpoints" / "2") == {}
    for path in (tmp_path, tmp_path / "checkpoints" / "2"):
        assert gradients.seconds_per_token(path) == pytest.approx(expected)


def test_the_squared_gradient_is_that_of_these_advantages_alone(tiny_model, device):
    """One after the other, as for several estimators on the same responses; against plain autograd."""
    policy = load_sharded(tiny_model, device, **EXACT)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    episodes = [Episode([1, 4 + i], response_ids=[5, 6 + i, 7]) for i in range(3)]
    for advantages in ([[1.0, 0.5, -1.0]] * 3, [[0.0] * 3, [2.0, 0.0, 0.0], [0.0, -1.0, 0.0]]):
        plain.zero_grad()
        for e, a in zip(episodes, advantages):
            ids = torch.tensor([e.prompt_ids + e.response_ids])
            logprobs = (plain(ids).logits[0, 1:-1] / 0.7).log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0]
            (-(logprobs * torch.tensor(a)).sum() / 3).backward()
        expected = sum((p.grad**2).sum() for p in plain.parameters()).item()
        found = gradients.squared_gradient(policy, episodes, advantages, 0.7, device)
        assert found == pytest.approx(expected, rel=1e-4)


def test_products_of_gradients_count_one_copy_of_two_machines():
    """Of four ranks two each hold a copy: their shards' products add up to the gradient's, whatever the mesh."""
    whole = torch.arange(1.0, 9.0).reshape(4, 2)
    for shape, placements in (((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])):
        total = 0.0
        for rank in range(4):
            mine = whole.chunk(shape[-1])[rank % shape[-1]]
            grad = SimpleNamespace(to_local=lambda mine=mine: mine, placements=placements)
            grad.device_mesh = SimpleNamespace(shape=shape)
            policy = SimpleNamespace(parameters=lambda grad=grad: [SimpleNamespace(grad=grad)])
            gradient = gradients.own_gradient(policy)
            total += (gradient @ gradient).item()
        assert total == pytest.approx((whole**2).sum().item())


def test_the_second_half_of_the_batches_is_measured_along_the_first(device, monkeypatch):
    """Made-up gradients: of K = 9 (3, 4) in the first half, then (1, 1); of RLOO always (0, 5)."""
    made, count, half = {"K=9": (3.0, 4.0), "RLOO": (0.0, 5.0)}, [0], 2 * gradients.BLOCKS

    def own_gradient(_):
        name = list(made)[count[0] % 2]
        later = count[0] >= half and name == "K=9"
        count[0] += 1
        return torch.tensor((1.0, 1.0) if later else made[name])

    monkeypatch.setattr(gradients, "own_gradient", own_gradient)
    monkeypatch.setattr(gradients, "squared_gradient", lambda *_: 25.0)
    monkeypatch.setattr(gradients, "advantages", lambda *_: {name: ([], 1) for name in made})
    analysis = SimpleNamespace(
        arguments=SimpleNamespace(batches=half, seed=0),
        s=SimpleNamespace(temperature=1.0),
        device=device,
        policy=None,
        solutions=lambda *_, **__: [Episode([1], response_ids=[2])],
    )
    found, products = gradients.batches(analysis, [None])
    assert [batch["along"] for batch in found[: half // 2]] == [{}] * (half // 2)
    for batch in found[half // 2 :]:  # u = (0.6, 0.8)
        assert batch["along"] == pytest.approx({"K=9": 1.4, "RLOO": 4.0})
    result = dict(batches=found, products=products)
    assert gradients.components_along(result, "RLOO") == pytest.approx([4.0] * (half // 2))
    assert products["RLOO"][0][0] == pytest.approx(100.0)  # two batches to a block


def test_a_run_of_the_comparison_can_be_made_again_by_its_name(main_of, monkeypatch):
    code, _, said = main_of(compare, "arithmetic", "again", "K10-s0")
    assert code == 1 and "there is no run K10-s0: name one of " in said and "search-K9-lr1e-4-s100" in said
    monkeypatch.setattr(compare.Plan, "load_results", lambda plan: {})
    code, _, said = main_of(compare, "worded", "again", "grpo-s0")
    assert code == 1 and "the learning rate of grpo-s0 has not been searched yet" in said
    assert "compare.py worded run --only search-grpo-lr" in said


def test_peers_takes_ratios_round_by_round(tmp_path, monkeypatch, main_of):
    monkeypatch.setattr(peers, "RESULTS", tmp_path / "peers.jsonl")
    code, _, said = main_of(peers, "--draw")
    assert code == 1 and "there are no results in" in said
    code, _, said = main_of(peers, "--model", tmp_path)
    assert code == 1 and f"--model {tmp_path} is no model's folder" in said
    other = dict(cpu=1.0, gb=1.0, accuracy_20=0.5, accuracy_60=0.5)
    rounds = [
        dict(trl=dict(wall=2.0), vineppo=dict(wall=1.0)),
        dict(trl=dict(wall=4.0), vineppo=dict(wall=4.0)),
    ]
    for r in rounds:
        common.append(peers.RESULTS, {name: found | other for name, found in r.items()})
    assert main_of(peers, "--draw")[0] == 0
    # (1 / 2 + 4 / 4) / 2, not 5 / 6; standard errors of two values: half their difference
    line = "| wall seconds an iteration | 3.000 ± 1.000 | 2.500 ± 1.500 | 0.75 ± 0.25 |"
    assert line in (tmp_path / "peers.md").read_text()


@pytest.mark.parametrize("program", [values, gradients])
def test_what_is_no_checkpoint_is_refused(program, tmp_path, main_of):
    what = f"{tmp_path} is neither a RUN of train.py nor its RUN/checkpoints/N"
    name = program.__name__.split(".")[-1]
    assert main_of(program, tmp_path) == (1, "", f"{name}.py: {what}")


# --- speed ---


def test_the_benchmark_finds_the_value_prompts_in_the_prefix_cache():
    done = python("experiments/bench.py", "--part", "cache")  # as bench.py starts each of its parts
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout.splitlines()[-1])[0]
    assert "prefix cache" in first["what"] and 0.9 <= first["value"] < 1


def test_the_simulated_ranks_wait_less_where_the_states_are_dealt():
    solutions = [[0, 40, 80]] * 9 + [list(range(0, 901, 30))]  # one problem of ten is long

    def draw(problems, rng):
        return balance.responses_of(solutions, problems, rng)

    found = [balance.iteration("DeepSeekMath-7B", draw, evened, 8, 0) for evened in (False, True)]
    (alone, waits, _), (dealt, waits_less, _) = found
    assert dealt < 0.9 * alone and waits_less < waits


def test_the_simulation_takes_the_lengths_that_a_run_has_stored(tmp_path):
    step = dict(text="a", advantage=0.0, value=0.5)
    steps = [step | dict(tokens=3, rollout_tokens=[5, 7]), step | dict(tokens=2, rollout_tokens=[1, 4])]
    other = [steps[0] | dict(text="b"), steps[1]]  # the same prompt, and another state after its first step
    solutions = [dict(prompt="?", steps=steps), dict(prompt="?", steps=other), dict(prompt="?", steps=steps)]
    write_solutions(tmp_path / "episodes" / "000001.jsonl.gz", solutions)
    draw = balance.from_run(tmp_path)
    sequences = list(draw(1, random.Random(0)))
    assert [s.to_go for s in sequences] == [5] * 3 and [len(s.states) for s in sequences] == [2, 1, 0]
    *_, tokens = balance.iteration("Rho-1B", draw, True, 1, 0)
    assert tokens == 64 * (3 * 5 + (5 + 7) + 2 * (1 + 4))  # equal states once
    with pytest.raises(ValueError, match="has stored no iteration"):
        balance.from_run(tmp_path / "episodes")
