"""How noisy is the policy gradient, by the source of its advantages, and what does that cost in tokens?

    torchrun --nproc_per_node=2 experiments/gradients.py runs/demo runs/demo/checkpoints/40 [MORE]
    torchrun --nproc_per_node=8 experiments/gradients.py runs/math/checkpoints/1000 --batches 30
    python experiments/gradients.py --draw             # only draws the picture and the tables

RUN/checkpoints/N is a checkpoint of train.py; RUN is the policy that it began from. The program samples
independent batches of responses to training problems, without a nucleus; all estimators get the same
ones. E|g|^2 is the second moment of the plain policy gradient (no whitening, clipping or KL). The signal
is |E g|^2, estimated without bias by the products of different batches. The noise is the rest. The
signal is nearly the same for all estimators; it would be exactly the same if the end of a step never
depended on what follows it, as it does with "#### n", where a state's value is no pure baseline. Most of
the noise may be in directions in which the expected reward does not change. So the second half of the
batches also gives the variance of g . u, the component along u, the mean of the first half's gradients
by K = 9.

    K=1, 2, 3, 9             VinePPO with so many rollouts from each state
    l, m                     --gae_lambda l --baseline_smoothing m: averages of several states' values
    K=2..9                   2 rollouts, and 7 more where those of a state, or of its neighbours in a
                             response, do not all agree (a trial of adaptive K; train.py does not have it)
    exact values             the mean of --exact_rollouts other rollouts: the limit of large K
    RLOO                     no values
    value network            of a PPO run's checkpoint; other runs have none

The tokens of an estimator are those of its rollouts. At the end the program reports for some estimators
whether less noise is worth the time, by the run's own clock (docs/when-it-pays.md). --only "K=2" measures
K=2, K=9 and RLOO alone, which a large model's memory may require: BLOCKS gradients of each estimator stay
in host memory. Each checkpoint adds a line to experiments/results/gradients.jsonl. The picture and the
tables are made from this file alone. Steps are cut by the paper's rules, whatever the run's --step_credit.
"""

import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common

PROMPTS, RESPONSES = 4, 4  # of a batch; prompts: or the next multiple of the ranks
FEW, MOST = 2, 9  # rollouts of adaptive K
PAYING = ("K=9", "K=3, l=m=0.5", "K=2, l=m=0.5")  # does their noise pay, by the clock?
EXACT = {"K=2..9", "K=2..9, l=m=0.5", "exact values"}  # these need the exact values' rollouts
TIMED = ("tokens_sample", "tokens_values", "seconds_sample", "seconds_values", "seconds_train")
BLOCKS = 10  # of batches, for the jackknife
ESTIMATORS = {  # name: (K, lambda, smoothing)
    "K=9": (9, 0.0, 0.0),
    "K=3": (3, 0.0, 0.0),
    "K=2": (2, 0.0, 0.0),
    "K=1": (1, 0.0, 0.0),
    "K=9, l=m=0.5": (9, 0.5, 0.5),
    "K=3, l=m=0.5": (3, 0.5, 0.5),
    "K=2, l=m=0.5": (2, 0.5, 0.5),
    "K=1, l=0.8 m=0.5": (1, 0.8, 0.5),
    "K=2..9": ("adaptive", 0.0, 0.0),
    "K=2..9, l=m=0.5": ("adaptive", 0.5, 0.5),
    "exact values": ("exact", 0.0, 0.0),
}
REMOVED = (
    "shared"  # in the names of results: other responses counted as rollouts, a former option of train.py
)


# --- measuring ---


def measure(checkpoint):
    """For common.measure_checkpoints: the batches, and products of gradients."""
    import torch.distributed as dist

    found, products = batches(checkpoint, checkpoint.training)
    about = dict(responses=prompts_for(dist.get_world_size()) * RESPONSES) | seconds_per_token(
        checkpoint.path
    )
    return about, dict(products=products, batches=common.columns_of(found))


def prompts_for(world):
    """PROMPTS, or the next multiple of the number of ranks."""
    return -(-PROMPTS // world) * world


def rollouts_for(k, episodes, known):
    """{State: the rollouts that an estimator uses}. MOST rollouts were sampled, and then the exact values' own."""
    if k == "exact":
        return {state: state.rollouts[MOST:] for state in known}
    if k != "adaptive":
        return {state: state.rollouts[:k] for state in known}
    first = {state: {r.reward for r in state.rollouts[:FEW]} for state in known}
    unsure = {state for state in known if len(first[state]) > 1}
    for e in episodes:
        for before, after in zip(e.states, e.states[1:]):
            if first[before] != first[after]:
                unsure |= {before, after}
    return {state: state.rollouts[: MOST if state in unsure else FEW] for state in known}


def advantages(checkpoint, episodes):
    """{estimator: (token advantages of each episode, tokens of its rollouts)}."""
    from baselines.groups import Group, rloo
    from vine import averaged_advantages, monte_carlo_value, states_of, token_advantages

    known, found = {}, {}
    for e in episodes:
        states_of(e, known)
    wanted = checkpoint.arguments.only or [*ESTIMATORS, "RLOO", "value network"]
    exact = checkpoint.arguments.exact_rollouts if EXACT & set(wanted) else 0
    checkpoint.rewards_from(list(known.values()), MOST + exact, top_p=1.0)
    for name, (k, lam, smoothing) in ESTIMATORS.items():
        if name not in wanted:
            continue
        rollouts, per_token = rollouts_for(k, episodes, known.values()), []
        values = {state: monte_carlo_value([r.reward for r in part]) for state, part in rollouts.items()}
        for e in episodes:
            steps, _, _ = averaged_advantages([values[state] for state in e.states], e.reward, lam, smoothing)
            per_token.append(token_advantages(e.boundaries, steps))
        found[name] = per_token, sum(len(r.token_ids) for part in rollouts.values() for r in part)
    Group(rloo, RESPONSES).set_advantages(episodes)
    found["RLOO"] = [e.advantages for e in episodes], 0
    if checkpoint.critic and "value network" in wanted:
        checkpoint.critic.set_advantages(episodes)
        found["value network"] = [e.advantages for e in episodes], 0
    return found


def bias_of_adaptive(episodes):
    """Mean over the states of (value with adaptive K) - (exact value): 0, except for noise, without a stopping rule."""
    known = list({state: None for e in episodes for state in e.states})
    chosen = rollouts_for("adaptive", episodes, known)
    return statistics.mean(
        statistics.mean(r.reward for r in chosen[state])
        - statistics.mean(r.reward for r in state.rollouts[MOST:])
        for state in known
    )


def batches(checkpoint, problems):
    """(For each batch: {estimators: {name: |g|^2}, along: {name: g . u, or nothing in the first half},
    tokens: {name: of its rollouts}, response_tokens, bias_of_adaptive, where that is measured};
    {name: the products of the gradients' sums over the BLOCKS, [BLOCKS][BLOCKS]}).
    """
    import torch
    import torch.distributed as dist

    from support.ranks import sum_over_ranks

    a, policy, device = checkpoint.arguments, checkpoint.policy, checkpoint.device
    rank, world = dist.get_rank(), dist.get_world_size()
    out, sums, direction = [], {}, None
    for number in range(a.batches):
        rng = random.Random(a.seed * 1_000_003 + number)
        drawn = rng.choices(problems, k=prompts_for(world))[rank::world]
        episodes = checkpoint.solutions(drawn, RESPONSES, top_p=1.0)
        squares, along, tokens = {}, {}, {}
        if number == a.batches // 2:  # u: from here on, where the first half's gradients point
            total = sum(sums["K=9"])
            length = sum_over_ranks((total**2).sum().to(device)).sqrt().item()
            direction = total / length if length else None  # all rewards were equal
        for name, (per_token, count) in advantages(checkpoint, episodes).items():
            squares[name] = squared_gradient(policy, episodes, per_token, checkpoint.s.temperature, device)
            tokens[name] = count
            gradient = own_gradient(policy)
            block = sums.setdefault(name, [0.0] * BLOCKS)
            block[number % BLOCKS] = block[number % BLOCKS] + gradient
            if direction is not None:
                along[name] = sum_over_ranks((gradient @ direction).to(device)).item()
        lengths = sum(len(e.response_ids) for e in episodes)
        biased = bool(EXACT & set(squares))
        bias = bias_of_adaptive(episodes) if biased else 0.0
        numbers = torch.tensor([*tokens.values(), lengths, bias / world], dtype=torch.float64, device=device)
        *counts, lengths, bias = sum_over_ranks(numbers).tolist()
        batch = dict(
            estimators=squares, along=along, tokens=dict(zip(tokens, counts)), response_tokens=lengths
        )
        out.append(batch | (dict(bias_of_adaptive=bias) if biased else {}))
        if rank == 0 and (number + 1) % 10 == 0:
            print(f"{number + 1} of {a.batches} batches", flush=True)
    products = {}
    for name, blocks in sums.items():
        blocks = torch.stack(blocks)  # [BLOCKS, this rank's parameters]
        products[name] = sum_over_ranks((blocks @ blocks.T).double().to(device)).tolist()
    return out, products


def own_gradient(policy):
    """This rank's shards of the policy's gradient, in host memory.

    Several machines hold a copy each, so the shards are scaled: products of two gradients, summed over all ranks,
    are those of one copy.
    """
    import torch

    shards = [parameter.grad for parameter in policy.parameters()]
    mesh, placements = shards[0].device_mesh, shards[0].placements
    copies = math.prod(size for size, place in zip(mesh.shape, placements) if place.is_replicate())
    return torch.cat([shard.to_local().flatten() for shard in shards]).cpu() / copies**0.5


def squared_gradient(policy, episodes, advantages, temperature, device):
    """|g|^2 of g = the gradient of -1/N sum_i sum_t A_t log pi(token t), i over the N responses.

    episodes: this rank's; N counts all ranks'. advantages: a list per episode, of a number per
    token.
    """
    import torch
    import torch.distributed as dist

    from learner import micro_batch

    world = dist.get_world_size()
    # before the forward pass: after it FSDP's gathered parameters stand in for those that hold the gradients
    policy.zero_grad()
    flat = [a for one in advantages for a in one]
    flat = torch.tensor(flat, dtype=torch.float32, device=device)  # [N], in the order of the episodes
    m = micro_batch(episodes, range(len(episodes)), device)
    loss = -(policy(m, temperature) * flat[m.tokens]).sum() / (len(episodes) * world)
    (loss * world).backward()  # FSDP averages over the ranks
    return torch.nn.utils.clip_grad_norm_(policy.parameters(), float("inf")).full_tensor().item() ** 2


def seconds_per_token(path):
    """{sampling: seconds per sampled token, training: seconds per token of a response}, from the run's metrics.

    {} where the metrics are gone or have no iteration.
    """
    metrics = (folder / "metrics.jsonl" for folder in (path, path.parent.parent))
    found = next((file for file in metrics if file.is_file()), None)
    lines = common.read(found) if found else []
    total = {name: sum(line.get(name, 0) for line in lines) for name in TIMED}
    sampled = total["tokens_sample"] + total["tokens_values"]
    seconds = total["seconds_sample"] + total["seconds_values"]
    if not sampled:
        return {}
    return dict(sampling=seconds / sampled, training=total["seconds_train"] / total["tokens_sample"])


# --- what came out ---


def ratio_and_error(above, below, rng, draws=400):
    """mean(above) / mean(below) of paired values, and its standard error by resampling the pairs.

    nan where all of below is 0.
    """
    if not sum(below):
        return float("nan"), float("nan")
    resampled = []
    for _ in range(draws):
        chosen = rng.choices(range(len(above)), k=len(above))
        if total := sum(below[i] for i in chosen):
            resampled.append(sum(above[i] for i in chosen) / total)
    return sum(above) / sum(below), statistics.stdev(resampled)


def moments(result, name, without=None):
    """(signal, noise) of an estimator: |E g|^2 and E|g|^2 - |E g|^2; without one of the BLOCKS.

    With the batches' gradients g_i, i = 1..n: signal = (|sum g_i|^2 - sum |g_i|^2) / (n (n - 1)).
    """
    blocks = [b for b in range(BLOCKS) if b != without]
    squares = [
        batch["estimators"][name] for i, batch in enumerate(result["batches"]) if i % BLOCKS != without
    ]
    n, of_squares, products = len(squares), sum(squares), result["products"][name]
    of_sum = sum(products[i][j] for i in blocks for j in blocks)
    signal = (of_sum - of_squares) / (n * (n - 1))
    return signal, of_squares / n - signal


def signal_and_error(result, name):
    """(signal of an estimator, its standard error by the jackknife over the BLOCKS)."""
    left_out = [moments(result, name, without=b)[0] for b in range(BLOCKS)]
    return moments(result, name)[0], math.sqrt((BLOCKS - 1) * statistics.pvariance(left_out))


def noise_ratio(result, above, below):
    """(noise of one estimator over the noise of another, its standard error); nan where the other has none.

    The error is that of resampled batches with the signals as they are, a few percent of E|g|^2; an error
    from BLOCKS values would itself be off by a quarter.
    """
    noises = []
    for name in (above, below):
        signal = moments(result, name)[0]
        noises.append([batch["estimators"][name] - signal for batch in result["batches"]])
    return ratio_and_error(*noises, random.Random(0))


def noise_ratio_along(result, above, below):
    """As noise_ratio, for the gradients' components along the signal; nan also where they were not measured."""
    squared = []
    for name in (above, below):
        components = components_along(result, name)
        if len(components) < 2:
            return float("nan"), float("nan")
        mean = statistics.mean(components)
        squared.append([(c - mean) ** 2 for c in components])
    return ratio_and_error(*squared, random.Random(0))


def components_along(result, name):
    """g . u of the batches in which it was measured."""
    return [b["along"][name] for b in result["batches"] if b.get("along")]


def noise_over_signal(result, name):
    """The variance of g . u over its squared mean: the noise of one batch along the signal."""
    components = components_along(result, name)
    return statistics.variance(components) / statistics.mean(components) ** 2


def more_responses(measured, tokens):
    """How many responses RLOO trains on in the time of one response whose values take `tokens` per response token.

    docs/when-it-pays.md derives it.
    """
    sampling, training = measured["sampling"], measured["training"]
    return (sampling * (1 + tokens) + training) / (sampling + training)


def verdict(result, name):
    """A sentence: does an estimator pay, by the run's own clock?"""
    measured, (*_, tokens) = result["measured"], rows_of(result)[name]
    ratio, error = noise_ratio(result, "RLOO", name)
    more = more_responses(measured, tokens)
    says = "cannot be told apart"
    if abs(ratio - more) > 2 * error:
        says = "pays" if ratio > more else "does not pay"
    return (
        f"{name}: RLOO has {common.plus_minus(ratio, error, 2)} times its noise at the same responses, and trains on"
        f" {more:.2f} times as many in its time ({tokens:.1f} value tokens per response token,"
        f" {measured['sampling'] * 1e6:.3g} us a sampled and {measured['training'] * 1e6:.3g} us a trained token):"
        f" by the clock it {says}."
    )


def rows_of(result):
    """{estimator: (E|g|^2 over that of K = 9, its standard error, value tokens per response token)}."""
    found, rng = result["batches"], random.Random(0)
    nine = [batch["estimators"]["K=9"] for batch in found]
    lengths = sum(batch["response_tokens"] for batch in found)
    rows = {}
    for name in found[0]["estimators"]:
        ratio, error = ratio_and_error([batch["estimators"][name] for batch in found], nine, rng)
        rows[name] = ratio, error, sum(batch["tokens"][name] for batch in found) / lengths
    return rows


def table(name, result):
    """Lines of Markdown of one checkpoint."""
    found = result["batches"]
    about = f"{len(found)} batches of {result['measured']['responses']} responses"
    if EXACT & set(found[0]["estimators"]):
        bias = common.mean_and_error([batch["bias_of_adaptive"] for batch in found])
        about += f"; exact values: {result['measured']['exact_rollouts']} other rollouts"
        about += f"; bias of a value with adaptive K: {common.plus_minus(*bias, 4, sign='+')}"
    head = ["advantages", "E\\|g\\|^2, K = 9 is 1", "noise, K = 9 is 1", "noise along the signal, K = 9 is 1"]
    rows = []
    for estimator, (ratio, its_error, tokens) in rows_of(result).items():
        cells = [common.plus_minus(ratio, its_error, 2), "", "", ""]
        if "products" in result:  # older results have none
            cells[1] = common.plus_minus(*noise_ratio(result, estimator, "K=9"), 2)
            signal, signal_error = signal_and_error(result, estimator)
            cells[3] = f"{signal:.3g} ± {signal_error:.2g}"
        along, along_error = noise_ratio_along(result, estimator, "K=9")
        if not math.isnan(along):
            cells[2] = common.plus_minus(along, along_error, 2)
        removed = " (option since removed)" if REMOVED in estimator else ""
        rows.append([estimator + removed, *cells, f"{tokens:.1f}"])
    lines = [f"## {name}", "", f"{about}.", ""]
    lines += common.table([*head, "signal", "value tokens per response token"], rows)
    if "products" in result and "sampling" in result["measured"]:
        paying = [e for e in PAYING if e in found[0]["estimators"]]
        lines += ["", *(f"- {verdict(result, estimator)}" for estimator in paying)]
    if components_along(result, "K=9"):
        listed = [n for n in (*PAYING, "RLOO") if n in found[0]["estimators"]]
        shares = ", ".join(f"{noise_over_signal(result, n):.2f} ({n})" for n in listed)
        lines.append(f"- Along the signal, the variance of one batch over its squared mean: {shares}.")
    return [*lines, ""]


GROUPS = {
    "paper": common.BLUE,
    "l, m": common.VERMILION,
    "shared": common.GREEN,
    "adaptive": common.PURPLE,
    "other": common.BLACK,
}


def group_of(name):
    if REMOVED in name:
        return "shared"
    if ".." in name:
        return "adaptive"
    if "l=" in name:
        return "l, m"
    return "paper" if name.startswith("K=") else "other"


def draw_one(axis, name, result):
    """E|g|^2 against value tokens, a point for each estimator."""
    for estimator, (ratio, error, tokens) in rows_of(result).items():
        if estimator == "exact values":
            axis.axhline(ratio, color=common.GREY, linewidth=1, linestyle=":")
            continue
        colour = GROUPS[group_of(estimator)]
        axis.errorbar(tokens, ratio, error, marker="o", markersize=4, color=colour, capsize=2)
        text = estimator.split(",")[0]  # the colour tells the rest
        axis.annotate(
            text, (tokens, ratio), xytext=(4, 3), textcoords="offset points", fontsize=6, color=colour
        )
    axis.set(title=name, xlabel="value tokens per response token", ylabel="$E|g|^2$, K = 9 is 1")
    axis.grid(alpha=0.25)


def draw(path):
    """Write the picture and the tables beside the file of the results."""
    plt, results = common.pyplot(), common.results_to_draw("gradients.py", path)
    size = dict(figsize=(5 * len(results), 4.2), layout="constrained")
    figure, axes = plt.subplots(1, len(results), squeeze=False, **size)
    text = ["# Noise of the gradient and tokens of the values, by experiments/gradients.py", ""]
    for axis, (name, result) in zip(axes[0], results.items()):
        result["batches"] = common.rows_of(result["batches"])
        draw_one(axis, name, result)
        text += table(name, result)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=n) for n, c in GROUPS.items()]
    handles.append(plt.Line2D([], [], linestyle=":", color=common.GREY, label="exact values"))
    axes[0][-1].legend(handles=handles, fontsize=7)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
    common.write_page(path.with_suffix(".md"), text)


# --- the program ---


def check(a):
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    if a.batches < BLOCKS or a.exact_rollouts < 2:
        raise ValueError(
            f"--batches {a.batches} must be at least {BLOCKS}, and --exact_rollouts {a.exact_rollouts} at least 2"
        )
    known = [*ESTIMATORS, "RLOO", "value network"]
    if unknown := [name for name in a.only or () if name not in known]:
        raise ValueError(f"--only {unknown[0]} is no estimator: choose from {', '.join(known)}")
    a.only = a.only and ["K=9", *a.only]


def main():
    parser = common.checkpoint_parser(__doc__, common.RESULTS / "gradients.jsonl")
    size = "batches of 4 problems (or the next multiple of the ranks) x 4 responses"
    parser.add_argument("--batches", type=int, default=100, help=size)
    only = "measure these and K=9 alone; default: all"
    parser.add_argument("--only", nargs="+", metavar="ESTIMATOR", help=only)
    exact = "rollouts per state for exact values"
    parser.add_argument("--exact_rollouts", type=int, default=24, help=exact)
    common.measure_checkpoints("gradients.py", parser.parse_args(), check, measure, draw)


if __name__ == "__main__":
    main()
