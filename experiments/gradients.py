"""How noisy is the policy gradient, by where its advantages come from, and what does that cost in tokens?

    torchrun --nproc_per_node=2 experiments/gradients.py runs/demo runs/demo/checkpoints/40 [MORE]
    torchrun --nproc_per_node=8 experiments/gradients.py runs/math/checkpoints/1000 --batches 30
    python experiments/gradients.py --draw             # picture and tables alone

RUN/checkpoints/N is a checkpoint of train.py, RUN the policy that it began from. Independent batches
of responses to training problems are sampled, without a nucleus; all estimators get the same ones.
E|g|^2 is the second moment of the plain policy gradient (no whitening, clipping or KL); the signal is
|E g|^2, estimated without bias by the products of different batches; the noise is what is left. The
signal is the same for all of them. Nearly: where a step ends may depend on what follows it, as with
"#### n", and then a state's value is no pure baseline. Most of the noise may be in directions in which
the expected reward does not change. So the second half of the batches also tells the variance of g . u, the
component along the mean u of the first half's gradients, by K = 9.

    K=1, 2, 3, 9             VinePPO with so many rollouts from each state
    l, m                     --gae_lambda l --baseline_smoothing m: averages of several states' values
    shared                   --share_responses: the other responses count as rollouts, in baselines
    K=2..9                   2 rollouts, and 7 more where those of a state, or of its neighbours in a
                             response, do not all agree (a trial of adaptive K; not in train.py)
    exact values             of --exact_rollouts other rollouts: the limit of large K
    RLOO                     no values
    value network            of a PPO run's checkpoint; other runs have none

Tokens are those of the rollouts that an estimator needs. At the end it says whether their noise is worth
their time, by the run's own clock (docs/when-it-pays.md). --only "K=2" measures it, K=9 and RLOO alone,
which a large model's memory may ask for: BLOCKS gradients of each stay in host memory. It writes
experiments/results/gradients/NAME.json for each checkpoint; the picture and the tables are made from
these files alone. Steps are the paper's, whatever --step_credit the run had.
"""

import json
import math
import random
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import support.startup  # noqa: F401 (before torch is imported)

# isort: split
from experiments import values

RESULTS = ROOT / "experiments" / "results" / "gradients"
PROMPTS, RESPONSES = 4, 4  # of a batch; prompts: or a multiple of the ranks
FEW, MOST = 2, 9  # rollouts of adaptive K
PAYING = ("K=9", "K=3, l=m=0.5", "K=2, l=m=0.5")  # asked whether they pay by the clock
EXACT = {"K=2..9", "K=2..9, l=m=0.5", "exact values"}  # what needs the exact values' rollouts
TIMED = ("tokens_sample", "tokens_values", "seconds_sample", "seconds_values", "seconds_train")
BLOCKS = 10  # of batches, for the jackknife
ESTIMATORS = {  # name: (K, lambda, smoothing, shared)
    "K=9": (9, 0.0, 0.0, False),
    "K=3": (3, 0.0, 0.0, False),
    "K=2": (2, 0.0, 0.0, False),
    "K=1": (1, 0.0, 0.0, False),
    "K=9, l=m=0.5": (9, 0.5, 0.5, False),
    "K=3, l=m=0.5": (3, 0.5, 0.5, False),
    "K=2, l=m=0.5": (2, 0.5, 0.5, False),
    "K=1, l=0.8 m=0.5": (1, 0.8, 0.5, False),
    "K=3, shared": (3, 0.0, 0.0, True),
    "K=3, l=m=0.5, shared": (3, 0.5, 0.5, True),
    "K=2, l=m=0.5, shared": (2, 0.5, 0.5, True),
    "K=1, l=0.8 m=0.5, shared": (1, 0.8, 0.5, True),
    "K=2..9": ("adaptive", 0.0, 0.0, False),
    "K=2..9, l=m=0.5": ("adaptive", 0.5, 0.5, False),
    "exact values": ("exact", 0.0, 0.0, False),
}


# --- measuring ---
# torch, vLLM and the core are imported where they are used: --draw needs none of them


def rollouts_for(k, episodes, known):
    """{State: the rollouts that an estimator uses} of those that were sampled, MOST and then the exact
    values' own.
    """
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


def advantages(analysis, episodes):
    """{estimator: (token advantages of each episode, tokens of its rollouts)}."""
    from baselines.groups import Group, rloo
    from vine import monte_carlo_value, states_of, step_advantages, token_advantages

    known, passing, found = {}, {}, {}
    for e in episodes:
        e.states = states_of(e, known)
        for state in e.states:
            passing.setdefault(state, []).append(e)
    wanted = analysis.arguments.only or [*ESTIMATORS, "RLOO", "value network"]
    exact = analysis.arguments.exact_rollouts if EXACT & set(wanted) else 0
    analysis.rewards_from(list(known.values()), MOST + exact, top_p=1.0)
    for name, (k, lam, smoothing, shared) in ESTIMATORS.items():
        if name not in wanted:
            continue
        rollouts, per_token = rollouts_for(k, episodes, known.values()), []
        rewards = {state: [r.reward for r in part] for state, part in rollouts.items()}
        for e in episodes:
            plain = [monte_carlo_value(rewards[state]) for state in e.states]
            others = [[o.reward for o in passing[state] if o is not e] for state in e.states]
            both = [monte_carlo_value(rewards[state] + more) for state, more in zip(e.states, others)]
            steps = step_advantages(plain, e.reward, lam, smoothing, both if shared else None)
            per_token.append(token_advantages(e.boundaries, steps))
        found[name] = per_token, sum(len(r.token_ids) for part in rollouts.values() for r in part)
    Group(rloo, RESPONSES).set_advantages(episodes)
    found["RLOO"] = [e.advantages for e in episodes], 0
    if analysis.critic and "value network" in wanted:
        analysis.critic.set_advantages(episodes)
        found["value network"] = [e.advantages for e in episodes], 0
    return found


def bias_of_adaptive(episodes):
    """Mean over the states of (value with adaptive K) - (exact value): 0 but for noise without a stopping rule."""
    known = list({state: None for e in episodes for state in e.states})
    chosen = rollouts_for("adaptive", episodes, known)
    return statistics.mean(
        statistics.mean(r.reward for r in chosen[state])
        - statistics.mean(r.reward for r in state.rollouts[MOST:])
        for state in known
    )


def batches(analysis, problems):
    """(Of each batch: {estimators: {name: |g|^2}, along: {name: g . u, or nothing in the first half},
    tokens: {name: of its rollouts}, response_tokens, bias};
    {name: the products of the gradients' sums over the BLOCKS, [BLOCKS][BLOCKS]}).
    """
    import torch
    import torch.distributed as dist

    from support.ranks import sum_over_ranks

    a, s, out, sums, direction = analysis.arguments, analysis.s, [], {}, None
    rank, world = dist.get_rank(), dist.get_world_size()
    prompts = -(-PROMPTS // world) * world
    for number in range(a.batches):
        rng = random.Random(a.seed * 1_000_003 + number)
        drawn = rng.choices(problems, k=prompts)[rank::world]
        episodes = analysis.solutions(drawn, RESPONSES, top_p=1.0)
        squares, along, tokens = {}, {}, {}
        if number == a.batches // 2:  # u: from here on, where the first half's gradients point
            total = sum(sums["K=9"])
            length = sum_over_ranks((total**2).sum().to(analysis.device)).sqrt().item()
            direction = total / length if length else None  # all rewards were equal
        for name, (per_token, count) in advantages(analysis, episodes).items():
            how = s.temperature, analysis.device
            squares[name] = squared_gradient(analysis.policy, episodes, per_token, *how)
            tokens[name] = count
            gradient = own_gradient(analysis.policy)
            block = sums.setdefault(name, [0.0] * BLOCKS)
            block[number % BLOCKS] = block[number % BLOCKS] + gradient
            if direction is not None:
                along[name] = sum_over_ranks((gradient @ direction).to(analysis.device)).item()
        lengths = sum(len(e.response_ids) for e in episodes)
        bias = bias_of_adaptive(episodes) if EXACT & set(squares) else float("nan")
        numbers = [*tokens.values(), lengths, bias / world]
        totals = sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=analysis.device)).tolist()
        counts = dict(zip(tokens, totals))
        out.append(
            dict(estimators=squares, along=along, tokens=counts, response_tokens=totals[-2])
            | dict(bias_of_adaptive=totals[-1])
        )
        if rank == 0 and (number + 1) % 10 == 0:
            print(f"{number + 1} of {a.batches} batches", flush=True)
    products = {}
    for name, blocks in sums.items():
        blocks = torch.stack(blocks)  # [BLOCKS, this rank's parameters]
        products[name] = sum_over_ranks((blocks @ blocks.T).double().to(analysis.device)).tolist()
    return out, products


def own_gradient(policy):
    """The policy's gradient, this rank's shards of it, in host memory."""
    import torch

    return torch.cat([parameter.grad.to_local().flatten() for parameter in policy.parameters()]).cpu()


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
    """{sampling: seconds per sampled token, training: per token of a response}, of the run's metrics; {}
    where they are gone or have no iteration.
    """
    metrics = (folder / "metrics.jsonl" for folder in (path, path.parent.parent))
    found = next((file for file in metrics if file.is_file()), None)
    lines = [json.loads(line) for line in found.read_text().splitlines()] if found else []
    total = {name: sum(line.get(name, 0) for line in lines) for name in TIMED}
    sampled = total["tokens_sample"] + total["tokens_values"]
    seconds = total["seconds_sample"] + total["seconds_values"]
    if not sampled:
        return {}
    return dict(sampling=seconds / sampled, training=total["seconds_train"] / total["tokens_sample"])


def measure(a, device, watch):
    """Write the results of each of the checkpoints. a: the program's arguments."""
    import torch.distributed as dist

    for path, analysis, training, _ in values.each_checkpoint(a, device, watch):
        found, products = batches(analysis, training)
        if dist.get_rank() == 0:
            name = values.name_of(path)
            responses = -(-PROMPTS // dist.get_world_size()) * dist.get_world_size() * RESPONSES
            measured = dict(checkpoint=str(path), responses=responses)
            measured |= {k: v for k, v in vars(a).items() if isinstance(v, int | float)}
            measured |= seconds_per_token(path)
            result = dict(measured=measured, settings=asdict(analysis.s), products=products, batches=found)
            values.write(a.results / f"{name}.json", result)
            print(f"{name}: {len(found)} batches", flush=True)


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


def jackknife(estimate):
    """(estimate(None), its standard error from estimate(without=b) for each of the BLOCKS)."""
    left_out = [estimate(b) for b in range(BLOCKS)]
    return estimate(None), math.sqrt((BLOCKS - 1) * statistics.pvariance(left_out))


def noise_ratio(result, above, below):
    """(noise of an estimator over that of another, its standard error); nan where the latter has none.

    The error is that of resampled batches with the signals as they are, a few percent of E|g|^2; an error
    from BLOCKS values would itself be off by a quarter.
    """
    noises = []
    for name in (above, below):
        signal = moments(result, name)[0]
        noises.append([batch["estimators"][name] - signal for batch in result["batches"]])
    return ratio_and_error(*noises, random.Random(0))


def noise_ratio_along(result, above, below):
    """(noise of an estimator over that of another, its standard error), of their gradients' components
    along the signal; nan where they were not measured, or the latter has none.
    """
    squared = []
    for name in (above, below):
        components = components_along(result, name)
        if len(components) < 2:
            return float("nan"), float("nan")
        mean = statistics.mean(components)
        squared.append([(c - mean) ** 2 for c in components])
    return ratio_and_error(*squared, random.Random(0))


def components_along(result, name):
    """g . u of the batches of which it was measured."""
    return [b["along"][name] for b in result["batches"] if b.get("along")]


def noise_over_signal(result, name):
    """Of one batch, along the signal: the variance of g . u over its squared mean."""
    components = components_along(result, name)
    return statistics.variance(components) / statistics.mean(components) ** 2


def more_responses(measured, tokens):
    """How many times more responses RLOO trains on in the time that one takes with values of so many
    tokens per response token. docs/when-it-pays.md derives it.
    """
    sampling, training = measured["sampling"], measured["training"]
    return (sampling * (1 + tokens) + training) / (sampling + training)


def verdict(result, name):
    """Does an estimator pay, by the run's own clock? A sentence."""
    measured, (*_, tokens) = result["measured"], rows_of(result)[name]
    ratio, error = noise_ratio(result, "RLOO", name)
    more = more_responses(measured, tokens)
    says = "cannot be told apart"
    if abs(ratio - more) > 2 * error:
        says = "pays" if ratio > more else "does not pay"
    clock = f"{measured['sampling'] * 1e6:.3g} us a sampled and {measured['training'] * 1e6:.3g} us a trained token"
    costs = f"{tokens:.1f} value tokens per response token, {clock}"
    noise = f"RLOO has {ratio:.2f} ± {error:.2f} times its noise at the same responses"
    return f"{name}: {noise}, and trains on {more:.2f} times as many in its time ({costs}): by the clock it {says}."


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
        bias = [batch["bias_of_adaptive"] for batch in found]
        error = statistics.stdev(bias) / math.sqrt(len(bias))
        about += f"; exact values: {result['measured']['exact_rollouts']} other rollouts"
        about += f"; bias of a value with adaptive K: {statistics.mean(bias):+.4f} ± {error:.4f}"
    head = ["advantages", "E\\|g\\|^2, K = 9 is 1", "noise, K = 9 is 1", "noise along the signal, K = 9 is 1"]
    head = f"| {' | '.join([*head, 'signal', 'value tokens per response token'])} |"
    lines = [f"## {name}", "", f"{about}.", "", head, "|---" * 6 + "|"]
    for estimator, (ratio, its_error, tokens) in rows_of(result).items():
        cells = [f"{ratio:.2f} ± {its_error:.2f}", "", "", ""]
        if "products" in result:  # results of before they were stored have none
            noise, noise_error = noise_ratio(result, estimator, "K=9")
            signal, signal_error = jackknife(lambda b, e=estimator: moments(result, e, b)[0])
            cells[1], cells[3] = f"{noise:.2f} ± {noise_error:.2f}", f"{signal:.3g} ± {signal_error:.2g}"
        along, along_error = noise_ratio_along(result, estimator, "K=9")
        if along == along:  # measured
            cells[2] = f"{along:.2f} ± {along_error:.2f}"
        lines.append(f"| {estimator} | {' | '.join(cells)} | {tokens:.1f} |")
    if "products" in result and "sampling" in result["measured"]:
        paying = [e for e in PAYING if e in found[0]["estimators"]]
        lines += ["", *(f"- {verdict(result, estimator)}" for estimator in paying)]
    told = [n for n in ("K=9", *PAYING[1:], "RLOO") if n in found[0]["estimators"]]
    if components_along(result, "K=9"):
        shares = ", ".join(f"{noise_over_signal(result, n):.2f} ({n})" for n in told)
        lines.append(f"- Along the signal, the variance of one batch over its squared mean: {shares}.")
    return [*lines, ""]


# Okabe and Ito's colours, which the colour-blind can tell apart
GROUPS = {
    "paper": "#0072b2",
    "l, m": "#d55e00",
    "shared": "#009e73",
    "adaptive": "#cc79a7",
    "other": "#000000",
}


def group_of(name):
    if "shared" in name:
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
            axis.axhline(ratio, color="#999999", linewidth=1, linestyle=":")
            continue
        colour = GROUPS[group_of(estimator)]
        axis.errorbar(tokens, ratio, error, marker="o", markersize=4, color=colour, capsize=2)
        text = estimator.split(",")[0]  # the colour tells the rest
        axis.annotate(
            text, (tokens, ratio), xytext=(4, 3), textcoords="offset points", fontsize=6, color=colour
        )
    axis.set(title=name, xlabel="value tokens per response token", ylabel="$E|g|^2$, K = 9 is 1")
    axis.grid(alpha=0.25)


def draw(folder):
    """The picture and the tables beside the folder of the results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not results:
        sys.exit(f"gradients.py: no results in {folder}: name checkpoints to measure")
    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4.2), layout="constrained", squeeze=False
    )
    text = ["# Noise of the gradient and tokens of the values, by experiments/gradients.py", ""]
    for axis, (name, result) in zip(axes[0], results.items()):
        draw_one(axis, name, result)
        text += table(name, result)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=n) for n, c in GROUPS.items()]
    handles.append(plt.Line2D([], [], linestyle=":", color="#999999", label="exact values"))
    axes[0][-1].legend(handles=handles, fontsize=7)
    figure.savefig(folder.parent / "gradients.png", dpi=110)
    plt.close(figure)
    (folder.parent / "gradients.md").write_text("\n".join(text))
    print("\n".join(text))


# --- the program ---


def check(a):
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    if a.batches < BLOCKS or a.exact_rollouts < 2:
        raise ValueError(f"--batches must be at least {BLOCKS} and --exact_rollouts at least 2")
    known = [*ESTIMATORS, "RLOO", "value network"]
    a.only = a.only and ["K=9", *a.only]
    if unknown := [name for name in a.only or () if name not in known]:
        raise ValueError(f"--only {unknown[0]} is not known: use {', '.join(known)}")


def main():
    parser = values.arguments(__doc__, RESULTS)
    size = "of 4 problems (or the next multiple of the ranks) x 4 responses"
    parser.add_argument("--batches", type=int, default=100, help=size)
    only = "measure these, with K=9, instead of all"
    parser.add_argument("--only", nargs="+", metavar="ESTIMATOR", help=only)
    exact = "rollouts per state for exact values"
    parser.add_argument("--exact_rollouts", type=int, default=24, help=exact)
    values.run("gradients", parser.parse_args(), check, measure, draw)


if __name__ == "__main__":
    main()
