"""How good are the values? The paper's section 6, on any run. gradients.py measures what that does to the gradient.

    torchrun --nproc_per_node=2 experiments/values.py runs/compare/arithmetic/ppo-96-s0/checkpoints/40 [MORE]
    torchrun --nproc_per_node=8 experiments/values.py runs/math/checkpoints/1000 --truth_rollouts 256
    python experiments/values.py --draw                # only draws pictures and tables

`make analyze` measures three of the comparison's checkpoints.

The states come from the checkpoint's own solutions of held-out problems, sampled at the temperature of
its training. The ground truth of a state is the mean of --truth_rollouts rollouts. Every estimate has
rollouts of its own, so it is independent of the truth:

    K = 1, 3, 9 rollouts     the estimate of VinePPO
    value network            of a PPO run's checkpoint; other runs have none
    group mean               the share of right ones among 8 other solutions, for all states of a problem
    constant                 the policy's accuracy

Each checkpoint adds a line to experiments/results/values.jsonl. Pictures and tables are made from this
file alone. Steps are cut by the paper's rules, whatever the run's --step_credit.
"""

import math
import os
import random
import statistics
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common

KS, GROUP = (1, 3, 9), 8
ALTERNATIVES, TRIES = 5, 64  # distinct next steps ranked at a state, of this many continuations
NEEDED = 3  # fewer distinct next steps are not ranked


# --- measuring ---


def measure(checkpoint):
    """For measure_checkpoints: rows of states, and groups of rows that are ranked."""
    import torch.distributed as dist

    a, rank, world = checkpoint.arguments, dist.get_rank(), dist.get_world_size()
    states = valued_states(checkpoint, checkpoint.test[: a.problems][rank::world])
    ranking = ranked_states(checkpoint, checkpoint.test[a.problems : a.problems + a.ranked][rank::world])
    return {}, dict(states=states, ranking=ranking)


def valued_states(checkpoint, problems):
    """One row per state of one solution to each problem, of all ranks. problems: this rank's."""
    from support.ranks import gather_lists
    from vine import states_of

    everything = checkpoint.solutions(problems, 1 + GROUP)
    rows, states = [], []
    for i in range(0, len(everything), 1 + GROUP):
        e, others = everything[i], everything[i + 1 : i + 1 + GROUP]
        found = states_of(e, {})  # all are new
        states += found
        group_mean = statistics.mean(o.reward for o in others)
        rows += [{"position": t / len(found), "group mean": group_mean} for t in range(len(found))]
    rows = [row | estimated for row, estimated in zip(rows, rows_of(checkpoint, states, problems))]
    rows = gather_lists(rows)
    accuracy = statistics.mean(gather_lists([e.reward for e in everything]))
    return [row | {"constant": accuracy} for row in rows]


def ranked_states(checkpoint, problems):
    """True and estimated values after each of 3 to 5 distinct next steps from a state.

    A list of rows for each of these states, of all ranks. The states stand at random places of
    solutions. problems: this rank's.
    """
    from episode import State
    from steps import step_boundaries
    from support.ranks import gather_lists

    a, rng, starts = checkpoint.arguments, random.Random(checkpoint.arguments.seed), []
    for e in checkpoint.solutions(problems, 1):
        if len(e.boundaries) > 3:
            cut = rng.choice(e.boundaries[:-2])
            starts.append(State(e.prompt_ids, e.response_ids[:cut], e.answer))
    checkpoint.roll_out(starts, TRIES, temperature=a.next_step_temperature or checkpoint.s.temperature)
    states, sizes = [], []  # sizes: the number of alternatives at each start that is ranked
    for start in starts:
        nexts = {}
        for c in start.rollouts:
            ids = start.prefix_ids + c.token_ids
            cuts = step_boundaries("paper", c.text, ids, checkpoint.engine.decode)
            cut = next((cut for cut in cuts if cut > len(start.prefix_ids)), len(ids))
            if cut < len(ids):  # a step that ends the response has no state after it
                nexts.setdefault(tuple(ids[:cut]))
        if len(nexts) >= NEEDED:
            chosen = list(nexts)[:ALTERNATIVES]
            states += [State(start.prompt_ids, list(ids), start.answer) for ids in chosen]
            sizes.append(len(chosen))
    rows = iter(rows_of(checkpoint, states, problems))
    return gather_lists([list(islice(rows, size)) for size in sizes])


def rows_of(checkpoint, states, problems):
    """One row per state: {truth, error, K=1, .., value network}. All ranks call it.

    problems: at least one, to pad with.
    """
    from episode import State
    from support.ranks import gather_lists

    truth = checkpoint.arguments.truth_rollouts
    rows = [estimates(rewards, truth) for rewards in checkpoint.rewards_from(states, truth + max(KS))]
    if checkpoint.critic:
        most = max(1, *gather_lists([len(states)]))  # FSDP: the same number of passes on every rank
        padding = [State(problems[0].prompt_ids, [])] * (most - len(states))
        for row, value in zip(rows, network_values(checkpoint.critic, states + padding)):
            row["value network"] = value
    return rows


def estimates(rewards, truth_rollouts):
    """{truth, error: its standard error, K=1, ..} of a state.

    The first truth_rollouts of its rewards make the truth, the others the estimates.
    """
    truth, others = rewards[:truth_rollouts], rewards[truth_rollouts:]
    mean, error = common.mean_and_error(truth)
    return dict(truth=mean, error=error) | {f"K={k}": statistics.mean(others[:k]) for k in KS}


def network_values(critic, states):
    """The value network's V of each state. Every rank brings the same number of states."""
    from episode import Episode

    # a dummy token stands for the next action
    episodes = [Episode(s.prompt_ids, response_ids=[*s.prefix_ids, 0]) for s in states]
    critic.set_advantages(episodes)
    return [e.token_values[-1] for e in episodes]


# --- what came out ---

ESTIMATORS = {  # in the order of the pictures
    "K=1": common.BLACK,
    "K=3": common.SKY,
    "K=9": common.BLUE,
    "value network": common.ORANGE,
    "group mean": common.GREEN,
    "constant": common.GREY,
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


def picture(plt, name, result):
    """The figure of one checkpoint."""
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
    head = ["estimate", "mean abs. error", "bias", "correlation", "explained variance"]
    head += ["without the truth's noise", "pairs ranked", "best step"]
    lines = []
    for e in present(rows):
        m, of_it = accuracy_of(rows, e), ranking.get(e, {})
        shares = [f"{of_it[c]:.2f}" if of_it.get(c) is not None else "" for c in ("pairs", "top1")]
        cells = [f"{m['mae']:.3f}", f"{m['bias']:+.3f}", f"{m['correlation']:.2f}", f"{m['explained']:.2f}"]
        lines.append([e, *cells, f"{m['explained_without_noise']:.2f}", *shares])
    chance = ranking["chance"]
    if chance["number_of_pairs"]:
        lines.append(["chance", *[""] * 5, f"{chance['pairs']:.2f}", f"{chance['top1']:.2f}"])
    return common.table(head, lines)


def table_of_positions(rows):
    """Lines of Markdown: the errors by fifths of the solution."""
    parts, lines = in_bins(rows), []
    sizes = ", ".join(str(len(part)) for part in parts)
    for e in present(rows):
        cells = []
        for part in parts:
            m = accuracy_of(part, e) if len(part) > 1 else None
            cells.append(f"{m['bias']:+.2f}; {m['correlation']:.2f}; {m['explained']:.2f}" if m else "")
        lines.append([e, *cells])
    about = f"By fifths of the solution ({sizes} states): bias; correlation; explained variance."
    return [about, "", *common.table(["estimate", *(f"{b}/{BINS}" for b in range(1, BINS + 1))], lines)]


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


def draw(path):
    """Write pictures and tables beside the file of the results."""
    plt, text = common.pyplot(), ["# Values, by experiments/values.py", ""]
    for name, result in common.results_to_draw("values.py", path).items():
        figure = picture(plt, name, result)
        figure.savefig(path.with_name(f"{path.stem}-{name}.png"), dpi=100)
        plt.close(figure)
        text += tables(name, result)
    common.write_page(path.with_suffix(".md"), text)


# --- the program ---


def check(a):
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if min(a.problems, a.ranked) < world or a.truth_rollouts < 2:
        raise ValueError(
            f"--problems {a.problems} and --ranked {a.ranked} must be at least {world}, the number of ranks,"
            f" and --truth_rollouts {a.truth_rollouts} at least 2"
        )


def main():
    parser = common.checkpoint_parser(__doc__, common.RESULTS / "values.jsonl")
    add = parser.add_argument
    add("--truth_rollouts", type=int, default=256, help="rollouts per state for the ground truth")
    add("--problems", type=int, default=20, help="held-out problems, one solution of each")
    add("--ranked", type=int, default=20, help="other problems, a state of each, whose next steps are ranked")
    add("--next_step_temperature", type=float, help="temperature of the next steps; default: the training's")
    a = parser.parse_args()
    common.measure_checkpoints("values.py", a, check, measure, draw, needed=a.problems + a.ranked)


if __name__ == "__main__":
    main()
