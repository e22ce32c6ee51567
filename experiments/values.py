"""How good are the values? The paper's section 6, on any run. (gradients.py: what that does to the gradient.)

    torchrun --nproc_per_node=2 experiments/values.py runs/compare/arithmetic/ppo-96-s0/checkpoints/40 [MORE]
    torchrun --nproc_per_node=8 experiments/values.py runs/math/checkpoints/1000 --truth_rollouts 256
    python experiments/values.py --draw                # pictures and tables alone

`make analyze` does it for three of the comparison's checkpoints.

States come from the checkpoint's own solutions of held-out problems, sampled at the temperature it
trained at. The ground truth of a state is the mean of --truth_rollouts rollouts. Every estimate is
independent of it, since it has rollouts of its own:

    K = 1, 3, 9 rollouts     as VinePPO estimates
    value network            of a PPO run's checkpoint; other runs have none
    group mean               the share of right ones among 8 other solutions; one for all states of a problem
    constant                 the policy's accuracy

It writes experiments/results/values/NAME.json for each checkpoint; the pictures and the table are
made from these files alone. Steps are the paper's, whatever --step_credit the run had.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import support.startup  # noqa: F401 (before torch is imported)

RESULTS = ROOT / "experiments" / "results" / "values"
KS, GROUP = (1, 3, 9), 8
ALTERNATIVES, TRIES = 5, 64  # distinct next steps ranked at a state, of this many continuations


# --- measuring ---
# torch, vLLM and the core are imported where they are used: --draw needs none of them


class Analysis:
    """Measures a checkpoint. The problems that its methods get are this rank's share."""

    def __init__(self, arguments, device, engine, grader, policy, critic, s):
        """policy, critic: sharded; critic may be None. s: the train.Settings of the run."""
        self.arguments, self.device, self.s = arguments, device, s
        self.engine, self.grader = engine, grader
        self.policy, self.critic = policy, critic

    def solutions(self, problems, n, **changes):
        """n solutions of each problem, as Episodes with rewards and boundaries."""
        from rollout import episodes_for, sample
        from steps import step_boundaries

        episodes = episodes_for(problems, n)
        sample(self.engine, self.grader, episodes, replace(self.s, **changes))
        for e in episodes:
            e.boundaries = step_boundaries("paper", e.text, e.response_ids, self.engine.decode)
        return episodes

    def roll_out(self, states, n, **changes):
        """n rollouts from each of the states, not yet graded."""
        s = replace(self.s, **changes)
        for state in states:
            self.engine.submit(state, n, s.max_tokens - len(state.prefix_ids), s.temperature, s.top_p)
        while self.engine.running:
            for state, completions in self.engine.step():
                state.receive(completions)

    def rewards_from(self, states, n, **changes):
        """Rewards of n rollouts from each of the states: a list of n for each."""
        from grader import set_rewards

        self.roll_out(states, n, **changes)
        set_rewards(self.grader, states)
        return [[rollout.reward for rollout in state.rollouts] for state in states]

    def rows_of(self, states, problems):
        """One row per state: {truth, error, K=1, .., value network}. Every rank calls it.

        problems: at least one, to pad with.
        """
        from episode import State
        from support.ranks import gather_lists

        truth = self.arguments.truth_rollouts
        rows = [estimates(rewards, truth) for rewards in self.rewards_from(states, truth + max(KS))]
        if self.critic:
            most = max(1, *gather_lists([len(states)]))  # FSDP: the same number of passes on every rank
            padding = [State(problems[0].prompt_ids, [])] * (most - len(states))
            for row, value in zip(rows, network_values(self.critic, states + padding)):
                row["value network"] = value
        return rows

    def states(self, problems):
        """One row per state of one solution to each problem, of all ranks."""
        from support.ranks import gather_lists
        from vine import states_of

        everything = self.solutions(problems, 1 + GROUP)
        rows, states = [], []
        for i in range(0, len(everything), 1 + GROUP):
            e, others = everything[i], everything[i + 1 : i + 1 + GROUP]
            found = states_of(e, {})
            states += found
            group_mean = statistics.mean(o.reward for o in others)
            rows += [{"position": t / len(found), "group mean": group_mean} for t in range(len(found))]
        rows = [row | estimated for row, estimated in zip(rows, self.rows_of(states, problems))]
        rows = gather_lists(rows)
        accuracy = statistics.mean(gather_lists([e.reward for e in everything]))
        return [row | {"constant": accuracy} for row in rows]

    def ranking(self, problems):
        """True and estimated values after each of 3 to 5 distinct next steps from a state.

        A list of rows for each of these states, of all ranks. They stand at random places of
        solutions.
        """
        from episode import State
        from steps import step_boundaries
        from support.ranks import gather_lists

        rng = random.Random(self.arguments.seed)
        starts = []
        for e in self.solutions(problems, 1):
            if len(e.boundaries) > 3:
                cut = rng.choice(e.boundaries[:-2])
                starts.append(State(e.prompt_ids, e.response_ids[:cut], e.answer))
        self.roll_out(starts, TRIES, temperature=self.arguments.next_step_temperature or self.s.temperature)
        states, sizes = [], []  # sizes: alternatives at each start that counts
        for start in starts:
            nexts = {}
            for c in start.rollouts:
                ids = start.prefix_ids + c.token_ids
                cuts = step_boundaries("paper", c.text, ids, self.engine.decode)
                cut = next((cut for cut in cuts if cut > len(start.prefix_ids)), len(ids))
                if cut < len(ids):  # a step that ends the response has no state after it
                    nexts.setdefault(tuple(ids[:cut]))
            if len(nexts) >= 3:
                chosen = list(nexts)[:ALTERNATIVES]
                states += [State(start.prompt_ids, list(ids), start.answer) for ids in chosen]
                sizes.append(len(chosen))
        rows = iter(self.rows_of(states, problems))
        return gather_lists([list(islice(rows, size)) for size in sizes])


def estimates(rewards, truth_rollouts):
    """{truth, error: its standard error, K=1, ..} of a state.

    The first truth_rollouts of its rewards make the truth, the others the estimates.
    """
    truth, others = rewards[:truth_rollouts], rewards[truth_rollouts:]
    mean = statistics.mean(truth)
    error = math.sqrt(mean * (1 - mean) / (len(truth) - 1))
    return dict(truth=mean, error=error) | {f"K={k}": statistics.mean(others[:k]) for k in KS}


def network_values(critic, states):
    """The value network's V of each state. Every rank brings the same number of states."""
    from episode import Episode

    # a dummy token in place of the next action
    episodes = [Episode(s.prompt_ids, response_ids=[*s.prefix_ids, 0]) for s in states]
    critic.set_advantages(episodes)
    return [e.token_values[-1] for e in episodes]


def settings_of(path):
    """The train.Settings of a RUN/checkpoints/N, or of a RUN. Older runs had settings that are gone: they
    are left out.
    """
    import train

    run = path if (path / "settings.json").is_file() else path.parent.parent
    names = {f.name for f in fields(train.Settings)}
    stored = json.loads((run / "settings.json").read_text())
    return train.Settings(**{name: value for name, value in stored.items() if name in names})


def model_of(path, s):
    """The folder of the policy: a RUN stands for the one that it began from."""
    return path if (path / "config.json").is_file() else Path(s.model)


def name_of(path):
    return f"{path.parent.parent.name}-{path.name}" if path.parent.name == "checkpoints" else f"{path.name}-0"


def networks_of(path, s, device):
    """(policy, critic or None) of a checkpoint, sharded."""
    import torch.distributed as dist

    from baselines.critic import Critic
    from model import load_sharded

    loading, critic = dict(bfloat16=s.bfloat16), None
    policy = load_sharded(path, device, **loading)
    if (path / "state" / "critic").is_dir():
        learning = dict(total_steps=1, learning_rate=1e-9, minibatch=dist.get_world_size())
        critic = Critic(path, device, loading=loading, micro_batch_tokens=s.micro_batch_tokens, **learning)
        critic.load(path / "state")
    elif s.algorithm == "ppo" and dist.get_rank() == 0:
        print(f"{path} has no state/critic: its value network is left out", flush=True)
    return policy, critic


def problems_of(path, s, needed):
    """(training problems, test problems), encoded. Raises ValueError for fewer than `needed` of the latter."""
    import data
    from support.pretrained import read_tokenizer
    from support.run_folder import first_day

    tokenizer, limit, day = read_tokenizer(path), s.max_sequence - s.max_tokens, first_day(Path(s.run_dir))
    splits = data.load(s.dataset, s.prompt_template, s.chat)
    training, test = (data.encode(problems, tokenizer, limit, s.chat, day)[0] for problems in splits)
    if len(test) < needed:
        what = "--problems and --ranked together"
        raise ValueError(f"{what} need {needed} test problems; {s.dataset} has {len(test)}")
    return training, test


def each_checkpoint(a, device, watch, needed=0):
    """(path, Analysis, training problems, test problems) of each of a.checkpoints, with its weights in
    the engine. needed: test problems. On all ranks; ends the engine at last.
    """
    from grader import Grader
    from model import full_tensors
    from rollout import Engine, shut_down

    engine, grader = None, Grader()
    for path in a.checkpoints:
        s = settings_of(path)
        model = model_of(path, s)
        training, test = problems_of(model, s, needed)
        if engine is None:
            engine = Engine(
                str(model), max_sequence=s.max_sequence, stop=[s.stop] if s.stop else [], bfloat16=s.bfloat16,
                gpu_memory=s.gpu_memory, max_sequences=s.max_sequences, on_step=watch.beat,
            )  # fmt: skip
        engine.sleep()
        policy, critic = networks_of(model, s, device)
        engine.load_weights(full_tensors(policy))
        engine.seed(a.seed)
        yield path, Analysis(a, device, engine, grader, policy, critic, s), training, test
    shut_down(engine, grader, watch)


def measure(a, device, watch):
    """Write the results of each of the checkpoints. a: the program's arguments."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    for path, analysis, _, test in each_checkpoint(a, device, watch, a.problems + a.ranked):
        states = analysis.states(test[: a.problems][rank::world])
        ranking = analysis.ranking(test[a.problems : a.problems + a.ranked][rank::world])
        if rank == 0:
            name = name_of(path)
            measured = dict(checkpoint=str(path))
            measured |= {k: v for k, v in vars(a).items() if isinstance(v, int | float)}
            found = dict(states=states, ranking=ranking)
            write(a.results / f"{name}.json", dict(measured=measured, settings=asdict(analysis.s)) | found)
            print(f"{name}: {len(states)} states, {len(ranking)} ranked", flush=True)


def write(path, result):
    """JSON, with a line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(rounded(result))
    for first in ('{"position"', '{"estimators"'):
        content = content.replace(first, f"\n{first}")
    path.write_text(content + "\n")


def rounded(x):
    """Floats to five digits, everywhere."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


# --- what came out ---

ESTIMATORS = {  # in the order of the pictures; Okabe and Ito's colours, which the colour-blind can tell apart
    "K=1": "#000000",
    "K=3": "#56b4e9",
    "K=9": "#0072b2",
    "value network": "#e69f00",
    "group mean": "#009e73",
    "constant": "#999999",
}
BINS = 5


def accuracy_of(rows, name):
    """Errors of an estimator over states.

    mae, bias, correlation, explained (variance), and explained_without_noise: with the noise of the
    truth taken out.
    """
    truths, values = [row["truth"] for row in rows], [row[name] for row in rows]
    errors = [v - t for v, t in zip(values, truths)]
    noise, variance = statistics.mean(row["error"] ** 2 for row in rows), statistics.pvariance(truths)
    square, nan = statistics.mean(e * e for e in errors), float("nan")
    flat = min(statistics.pstdev(truths), statistics.pstdev(values)) == 0
    return dict(
        mae=statistics.mean(map(abs, errors)),
        bias=statistics.mean(errors),
        correlation=0.0 if flat else statistics.correlation(truths, values),
        explained=1 - square / variance if variance else nan,  # undefined where all states are worth the same
        explained_without_noise=1 - (square - noise) / (variance - noise) if variance > noise else nan,
    )


def differ(a, b):
    """Whether two truths differ by more than twice the standard error of their difference."""
    return abs(a["truth"] - b["truth"]) > 2 * math.hypot(a["error"], b["error"])


def ranking_of(groups, name):
    """Ranking next steps by an estimate: the shares of pairs and of best steps that it gets right.

    Ties count in parts. Only pairs whose truths differ count, and for the best step only states
    that have such a pair; a step is a best one if its truth does not differ from the highest.
    Returns dict(pairs, top1, number_of_pairs, number_of_states).
    """
    pairs, firsts = [], []
    for group in groups:
        counted = [(a, b) for i, a in enumerate(group) for b in group[:i] if differ(a, b)]
        for a, b in counted:
            right = (a[name] > b[name]) == (a["truth"] > b["truth"])
            pairs.append(0.5 if a[name] == b[name] else float(right))
        if counted:
            best, highest = max(group, key=lambda row: row["truth"]), max(row[name] for row in group)
            tied = [row for row in group if row[name] == highest]
            firsts.append(statistics.mean(not differ(row, best) for row in tied))
    shares = dict(pairs=None, top1=None)
    if pairs:
        shares = dict(pairs=statistics.mean(pairs), top1=statistics.mean(firsts))
    return shares | dict(number_of_pairs=len(pairs), number_of_states=len(firsts))


def present(rows):
    """The estimators that the rows have values of."""
    return [e for e in ESTIMATORS if rows and e in rows[0]]


def ranking_by_estimator(groups):
    """{estimator: ranking_of}, and "chance" for an estimate that is the same everywhere."""
    found = {e: ranking_of(groups, e) for e in present(groups[0] if groups else [])}
    blind = [[row | {"chance": 0.0} for row in group] for group in groups]
    return found | {"chance": ranking_of(blind, "chance")}


def in_bins(rows):
    """The rows in BINS parts, by their position in the solution."""
    return [[row for row in rows if int(row["position"] * BINS) == b] for b in range(BINS)]


# --- pictures ---


def draw_scatter(axes, rows):
    """The estimates against the truth, an axis for each estimator."""
    for e in present(rows):
        truths, values = [row["truth"] for row in rows], [row[e] for row in rows]
        axes[e].scatter(truths, values, s=9, alpha=0.35, color=ESTIMATORS[e], linewidths=0)
        axes[e].axline((0, 0), slope=1, color="#bbbbbb", linewidth=1)
        axes[e].set(title=e, xlabel="true value", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    axes[present(rows)[0]].set_ylabel("estimate")


def draw_errors(axis, rows):
    """The mean absolute error by position."""
    for e in present(rows):
        by_bin = [[abs(row[e] - row["truth"]) for row in part] for part in in_bins(rows)]
        points = [((b + 0.5) / BINS, statistics.mean(errors)) for b, errors in enumerate(by_bin) if errors]
        axis.plot(*zip(*points), marker="o", markersize=3, color=ESTIMATORS[e], label=e)
    top = 1.4 * axis.get_ylim()[1]  # room for the legend
    axis.set(title="mean absolute error by position", xlabel="position in the solution", ylim=(0, top))
    axis.legend(fontsize=7, ncols=3, loc="upper center")


def draw_ranking(axis, groups):
    """How often the estimators rank next steps right."""
    found = ranking_by_estimator(groups)
    if not found["chance"]["number_of_pairs"]:
        return
    for i, (name, of_it) in enumerate(found.items()):
        shares = [of_it["pairs"], of_it["top1"]]
        axis.bar([i - 0.2, i + 0.2], shares, 0.36, color=ESTIMATORS.get(name, "#bbbbbb"))
        for x, v in zip((i - 0.2, i + 0.2), shares):
            axis.text(x, v, f"{v:.2f}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(found)), found, fontsize=8)
    axis.set(title="next steps ranked right: pairs (left), best (right)", ylim=(0, 1.08))


def picture(name, result):
    """The figure of one checkpoint."""
    import matplotlib.pyplot as plt

    names = present(result["states"])
    width = len(names)
    below = ["position"] * 2 + ["ranking"] * (width - 2)
    size = dict(figsize=(2.6 * width, 6.4), layout="constrained")
    figure, axes = plt.subplot_mosaic([names, below], **size)
    draw_scatter(axes, result["states"])
    draw_errors(axes["position"], result["states"])
    draw_ranking(axes["ranking"], result["ranking"])
    for axis in axes.values():
        axis.grid(alpha=0.25)
    figure.suptitle(name)
    return figure


# --- tables ---


def table_of_states(rows, ranking):
    """Lines of Markdown: the errors of the estimators, and how well they rank.

    ranking: see ranking_by_estimator.
    """
    errors = "mean abs. error | bias | correlation | explained variance | without the truth's noise"
    lines = [f"| estimate | {errors} | pairs ranked | best step |", "|---|---|---|---|---|---|---|---|"]
    for e in present(rows):
        m, of_it = accuracy_of(rows, e), ranking.get(e, {})
        shares = [f"{of_it[c]:.2f}" if of_it.get(c) is not None else "" for c in ("pairs", "top1")]
        cells = [f"{m['mae']:.3f}", f"{m['bias']:+.3f}", f"{m['correlation']:.2f}", f"{m['explained']:.2f}"]
        cells += [f"{m['explained_without_noise']:.2f}", *shares]
        lines.append(f"| {e} | {' | '.join(cells)} |")
    chance = ranking["chance"]
    if chance["number_of_pairs"]:
        lines.append(f"| chance | | | | | | {chance['pairs']:.2f} | {chance['top1']:.2f} |")
    return lines


def table_of_positions(rows):
    """Lines of Markdown: the errors by fifths of the solution."""
    parts = in_bins(rows)
    sizes, what = ", ".join(str(len(part)) for part in parts), "bias; correlation; explained variance"
    lines = [f"By fifths of the solution ({sizes} states): {what}.", ""]
    lines.append("| estimate |" + " | ".join(f"{b}/{BINS}" for b in range(1, BINS + 1)) + " |")
    lines.append("|---|" + "---|" * BINS)
    for e in present(rows):
        cells = []
        for part in parts:
            m = accuracy_of(part, e) if len(part) > 1 else None
            cells.append(f"{m['bias']:+.2f}; {m['correlation']:.2f}; {m['explained']:.2f}" if m else "")
        lines.append(f"| {e} | {' | '.join(cells)} |")
    return lines


def tables(name, result):
    """The lines of Markdown of one checkpoint."""
    rows, groups = result["states"], result["ranking"]
    measured, ranking = result["measured"], ranking_by_estimator(groups)
    floor = statistics.mean(math.sqrt(2 / math.pi) * row["error"] for row in rows)
    of_all = sum(len(g) * (len(g) - 1) // 2 for g in groups)
    chance = ranking["chance"]
    temperature = measured.get("next_step_temperature", result["settings"]["temperature"])
    about = (
        f"{len(rows)} states, {measured['truth_rollouts']} rollouts each for the truth; its own noise alone gives a"
        f" mean absolute error of {floor:.3f}. Ranking: {chance['number_of_pairs']} of {of_all} pairs of next steps"
        f" differ by more than twice their error, in {chance['number_of_states']} of {len(groups)} states; they were"
        f" sampled at temperature {temperature}."
    )
    return [f"## {name}", "", about, "", *table_of_states(rows, ranking), "", *table_of_positions(rows), ""]


def draw(folder):
    """Pictures and tables beside the folder of the results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not results:
        sys.exit(f"values.py: no results in {folder}: name checkpoints to measure")
    text = ["# Values, by experiments/values.py", ""]
    for name, result in results.items():
        figure = picture(name, result)
        figure.savefig(folder.parent / f"values-{name}.png", dpi=100)
        plt.close(figure)
        text += tables(name, result)
    (folder.parent / "values.md").write_text("\n".join(text))
    print("\n".join(text))


# --- the program ---


def check_checkpoints(paths):
    """Raise ValueError for folders that cannot be measured together, before anything is loaded."""
    engines = set()
    for path in paths:
        try:
            s = settings_of(path)
        except OSError:
            raise ValueError(f"{path} is neither a RUN of train.py nor its RUN/checkpoints/N") from None
        if not (model_of(path, s) / "config.json").is_file():
            raise ValueError(f"{path}: there is no model in {model_of(path, s)}")
        engines.add((s.dataset, s.stop, s.max_sequence, s.chat))
    if not paths:
        raise ValueError("name RUN/checkpoints/N folders of train.py")
    if len(engines) > 1:
        what = "dataset, stop, max_sequence or chat"
        raise ValueError(f"the runs differ in {what}: measure them one by one, into one --results")


def check(a):
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if min(a.problems, a.ranked) < world or a.truth_rollouts < 2:
        least = "at least 2 truth rollouts, and as many problems and ranked as there are ranks"
        raise ValueError(f"too few to measure anything: {least}")


def arguments(doc, results):
    """A parser with what gradients.py takes, too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    folders = "RUN/checkpoints/N folders that train.py wrote, or RUN for the policy that it began from"
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=folders)
    add("--seed", type=int, default=0, help="of the sampling")
    beside = "folder of the results; the pictures and the tables go beside it"
    add("--results", type=Path, default=results, help=beside)
    add("--draw", action="store_true", help="pictures and tables from the results that are there")
    return parser


def run(name, a, check, measure, draw):
    """A program that measures checkpoints: check(a) or one line, measure(a, device, watch), draw(folder)."""
    if a.draw:
        return draw(a.results)
    import model  # noqa: F401 (check_supported needs its attention)
    from support.ranks import check_gpus, exit_all, init_distributed, refuse
    from support.supported import check_supported
    from support.watch import Watch

    try:
        check_gpus()
        check_checkpoints(a.checkpoints)
        check(a)
        for folder in {str(model_of(path, settings_of(path))) for path in a.checkpoints}:
            check_supported(folder)
    except ValueError as error:
        refuse(f"{name}.py: {error}")
    device = init_distributed()
    with Watch() as watch:
        measure(a, device, watch)
    if os.environ["RANK"] == "0":
        draw(a.results)
    exit_all()


def main():
    parser = arguments(__doc__, RESULTS)
    add = parser.add_argument
    add("--truth_rollouts", type=int, default=256, help="rollouts per state for the ground truth")
    add("--problems", type=int, default=20, help="held-out problems, one solution of each")
    ranked = "states, of as many other problems, whose next steps are ranked"
    add("--ranked", type=int, default=20, help=ranked)
    temperature = "at which they are sampled; default: the training's, where few may differ"
    add("--next_step_temperature", type=float, help=temperature)
    run("values", parser.parse_args(), check, measure, draw)


if __name__ == "__main__":
    main()
