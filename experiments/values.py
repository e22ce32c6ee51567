"""How good are the values, and what does that do to the gradient? The analysis of the paper's section 6, on the checkpoints of any run.

    torchrun --nproc_per_node=2 experiments/values.py runs/compare/ppo-256-s0/checkpoints/40 [MORE CHECKPOINTS]  # `make analyze`
    torchrun --nproc_per_node=8 experiments/values.py runs/math/checkpoints/500 --truth_rollouts 256
    python experiments/values.py --draw                                                                          # pictures and tables alone

States come from the checkpoint's own solutions of held-out problems, at the temperature it trained at. The ground truth of a state is the mean of
--truth_rollouts rollouts; every estimate is independent of it, since its rollouts are others:

    K = 1, 3, 9 rollouts     as VinePPO estimates
    value network            of a PPO run's checkpoint; other runs have none
    group mean               the share of right ones among 8 other solutions of the problem, for all its states alike
    constant                 the policy's accuracy

It writes experiments/results/values/NAME.json for each checkpoint, and from these alone the pictures and the table. Steps are the paper's, whatever
--step_credit the run had.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "experiments" / "results" / "values"
KS, GROUP = (1, 3, 9), 8
ALTERNATIVES, TRIES = 5, 64  # distinct next steps that are ranked at a state, out of so many sampled continuations


# --- measuring ----------------------------------------------------------------------------------------------------------------------


def rewards_from(engine, grader, states, answers, n, s):
    """Rewards of n rollouts from each of this rank's states, (prompt ids, prefix ids): a list of n for each."""
    import train

    limits = [s.max_tokens - len(prefix) for _, prefix in states]
    groups = engine.generate([prompt + prefix for prompt, prefix in states], n, limits, s.temperature, s.top_p)
    rollouts = [
        dict(text=engine.text(prefix + c.token_ids), finished=c.finished or engine.stops(prefix + c.token_ids), answer=answer)
        for (_, prefix), group, answer in zip(states, groups, answers)
        for c in group
    ]
    graded = train.rewards(grader, rollouts)
    return [graded[i : i + n] for i in range(0, len(graded), n)]


def estimates(rewards, truth_rollouts):
    """{truth, its standard error, K=1, ..} of a state from its rewards: the first truth_rollouts make the truth, the others the estimates."""
    truth, others = rewards[:truth_rollouts], rewards[truth_rollouts:]
    mean = statistics.mean(truth)
    return dict(truth=mean, error=math.sqrt(mean * (1 - mean) / (len(truth) - 1))) | {f"K={k}": statistics.mean(others[:k]) for k in KS}


def network_values(critic, states):
    """The value network's V of each state; a dummy token stands where the next action would. Every rank brings as many states."""
    episodes = [dict(prompt_ids=prompt, response_ids=[*prefix, 0], reward=0.0) for prompt, prefix in states]
    critic.set_advantages(episodes)
    return [e["values"][-1] for e in episodes]


def sample_solutions(engine, grader, batch, s):
    """Solutions with their token boundaries, and the states before each of their steps."""
    import train
    import vine

    episodes = train.sample_responses(engine, grader, batch, s)
    for e in episodes:
        e["boundaries"] = vine.token_boundaries(vine.split_steps(e["text"]), vine.token_starts(e["response_ids"], engine.decode))
    return episodes


def measure_states(engine, grader, critic, batch, s, arguments):
    """One row per state of one solution to each of this rank's problems."""
    import train

    s = dataclasses.replace(s, responses_per_prompt=1 + GROUP)
    everything = sample_solutions(engine, grader, batch, s)
    rows, states, answers = [], [], []
    for i in range(0, len(everything), 1 + GROUP):
        e, others = everything[i], everything[i + 1 : i + 1 + GROUP]
        for t, cut in enumerate(e["boundaries"][:-1]):
            states.append((e["prompt_ids"], e["response_ids"][:cut]))
            answers.append(e["answer"])
            rows.append({"position": t / (len(e["boundaries"]) - 1), "group mean": statistics.mean(o["reward"] for o in others)})
    for row, rewards in zip(rows, rewards_from(engine, grader, states, answers, arguments.truth_rollouts + max(KS), s)):
        row |= estimates(rewards, arguments.truth_rollouts)
    if critic:
        most = max(train.over_ranks([len(states)]))
        padded = states + [(batch[0][1], [])] * (most - len(states))  # FSDP: as many passes on every rank
        for row, value in zip(rows, network_values(critic, padded)):
            row["value network"] = value
    rows = train.over_ranks(rows)
    accuracy = statistics.mean(train.over_ranks([e["reward"] for e in everything]))
    return [row | {"constant": accuracy} for row in rows]


def measure_ranking(engine, grader, critic, batch, s, arguments):
    """For states at random places of solutions: the value after each of 3 to 5 distinct next steps, true and estimated."""
    import train
    import vine

    s = dataclasses.replace(s, responses_per_prompt=1)
    rng, states, answers, owners = random.Random(arguments.seed), [], [], []
    solutions = [e for e in sample_solutions(engine, grader, batch, s) if len(e["boundaries"]) > 3]
    starts = [(e, e["response_ids"][: rng.choice(e["boundaries"][:-2])]) for e in solutions]
    limits = [s.max_tokens - len(prefix) for _, prefix in starts]
    groups = engine.generate(
        [e["prompt_ids"] + prefix for e, prefix in starts], TRIES, limits, arguments.next_step_temperature or s.temperature, s.top_p
    )
    for number, ((e, prefix), group) in enumerate(zip(starts, groups)):
        nexts = {}
        for c in group:
            ids = prefix + c.token_ids
            cuts = vine.token_boundaries(vine.split_steps(engine.text(ids)), vine.token_starts(ids, engine.decode))
            cut = next((cut for cut in cuts if cut > len(prefix)), len(ids))
            if cut < len(ids):  # a step that ends the response has no state behind it
                nexts.setdefault(tuple(ids[:cut]))
        if len(nexts) >= 3:
            for ids in list(nexts)[:ALTERNATIVES]:
                states.append((e["prompt_ids"], list(ids)))
                answers.append(e["answer"])
                owners.append(number)
    rows = [dict(state=owner) for owner in owners]
    for row, rewards in zip(rows, rewards_from(engine, grader, states, answers, arguments.truth_rollouts + max(KS), s)):
        row |= estimates(rewards, arguments.truth_rollouts)
    if critic:
        most = max(1, *train.over_ranks([len(states)]))
        padded = states + [(batch[0][1], [])] * (most - len(states))
        for row, value in zip(rows, network_values(critic, padded)):
            row["value network"] = value
    by_state = {}
    for row in rows:
        by_state.setdefault(row.pop("state"), []).append(row)
    return train.over_ranks(list(by_state.values()))


def squared_gradient(model, episodes, advantages, temperature, device):
    """|g|^2 of g = the gradient of -1/N sum_i sum_t A_t log pi(token t) over the N responses of all ranks. advantages: a list per episode."""
    import torch
    import torch.distributed as dist

    import ppo

    world = dist.get_world_size()
    model.zero_grad()  # before the forward pass, after which FSDP's gathered parameters stand in for those that hold the gradients
    batch = ppo.collate([e | {"advantages": a} for e, a in zip(episodes, advantages)], ["advantages"], device)
    m = ppo.micro_batch(batch, range(len(episodes)))
    loss = -(ppo.token_logprobs(model, m, temperature) * m["advantages"]).sum() / (len(episodes) * world)
    (loss * world).backward()  # FSDP averages over the ranks
    return torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).full_tensor().item() ** 2


def measure_gradient(engine, grader, model, critic, device, problems, s, arguments, prompts, responses=4):
    """|g|^2 of each unbiased estimator on independent batches of prompts x responses, the same responses for all: [{name: |g|^2}].

    The plain policy gradient: no whitening, no clipping, no KL, no nucleus, so that all estimators have the same
    mean. (Nearly: a step's boundary may depend on what follows it, as that of "#### n" does, and a state's value is then no pure baseline.)
    """
    import torch.distributed as dist

    import vine
    from baselines import groups

    rank, world, out = dist.get_rank(), dist.get_world_size(), []
    s = dataclasses.replace(s, responses_per_prompt=responses, top_p=1.0)
    for number in range(arguments.batches):
        drawn = random.Random(arguments.seed * 1_000_003 + number).choices(problems, k=prompts)[rank::world]
        episodes = sample_solutions(engine, grader, drawn, s)
        numbers = {}
        indices = [vine.number_states(numbers, e["prompt_ids"], e["response_ids"], e["boundaries"]) for e in episodes]
        states = [(list(prompt), list(prefix)) for prompt, prefix in numbers]
        answers = {i: e["answer"] for e, row in zip(episodes, indices) for i in row}
        rewards = rewards_from(engine, grader, states, [answers[i] for i in range(len(states))], max(KS), s)
        advantages = {}
        for k in KS:
            values = [statistics.mean(r[:k]) for r in rewards]
            advantages[f"K={k}"] = [
                vine.token_advantages(e["boundaries"], vine.step_advantages([values[i] for i in row], e["reward"]))
                for e, row in zip(episodes, indices)
            ]
        groups.set_advantages(episodes, groups.rloo, responses)
        advantages["RLOO"] = [e["advantages"] for e in episodes]
        if critic:
            critic.set_advantages(episodes)
            advantages["value network"] = [e["advantages"] for e in episodes]
        line = {name: squared_gradient(model, episodes, lists, s.temperature, device) for name, lists in advantages.items()}
        out.append(line)
    return out


def measure(arguments, device, watch):
    import torch.distributed as dist
    from transformers import AutoTokenizer

    import data
    import ppo
    import train
    from baselines.critic import Critic
    from grader import Grader
    from rollout import Engine

    rank, world = dist.get_rank(), dist.get_world_size()
    engine, grader, prompts = None, Grader(), -(-4 // world) * world  # per batch: 4, or the next multiple of the number of ranks
    for path in arguments.checkpoints:
        run = path.parent.parent
        s = train.Settings(**json.loads((run / "settings.json").read_text()))
        tokenizer = AutoTokenizer.from_pretrained(path)
        training, test = (
            data.encode(p, tokenizer, s.max_sequence - s.max_tokens, s.chat)[0] for p in data.load(s.dataset, s.prompt_template, s.chat)
        )
        if engine is None:
            engine = Engine(
                str(path), max_sequence=s.max_sequence, stop=[s.stop] if s.stop else [],
                bfloat16=s.bfloat16, gpu_memory=s.gpu_memory, max_sequences=s.max_sequences,
            )  # fmt: skip
        engine.sleep()
        model, critic = ppo.load_sharded(path, device, bfloat16=s.bfloat16), None
        if (path / "state" / "critic").is_dir():
            critic = Critic(
                path,
                device,
                total_steps=1,
                learning_rate=1e-9,
                minibatch=world,
                micro_batch_tokens=s.micro_batch_tokens,
                bfloat16=s.bfloat16,
            )
            critic.load(path / "state" / "critic")
        elif s.algorithm == "ppo" and rank == 0:
            print(f"{path} has no state/critic: its value network is left out", flush=True)
        engine.load_weights(ppo.full_tensors(model))
        engine.seed(arguments.seed)
        if len(test) < arguments.problems + arguments.ranked:
            raise ValueError(
                f"--problems {arguments.problems} and --ranked {arguments.ranked} need as many test problems; {s.dataset} has {len(test)}"
            )
        mine = test[: arguments.problems][rank::world]
        states = measure_states(engine, grader, critic, mine, s, arguments)
        ranking = measure_ranking(
            engine, grader, critic, test[arguments.problems : arguments.problems + arguments.ranked][rank::world], s, arguments
        )
        gradient = measure_gradient(engine, grader, model, critic, device, training, s, arguments, prompts)
        if rank == 0:
            arguments.results.mkdir(parents=True, exist_ok=True)
            name = f"{run.name}-{path.name}"
            measured = dict(checkpoint=str(path), responses=4 * prompts) | {
                k: v for k, v in vars(arguments).items() if isinstance(v, int | float)
            }
            result = dict(measured=measured, settings=dataclasses.asdict(s), states=states, ranking=ranking, gradient=gradient)
            content = json.dumps(rounded(result)).replace('{"position"', '\n{"position"').replace('{"K=1"', '\n{"K=1"')
            (arguments.results / f"{name}.json").write_text(content + "\n")
            print(f"{name}: {len(states)} states, {len(ranking)} ranked, {len(gradient)} gradients", flush=True)
    train.shut_down(engine, grader, watch)


def rounded(x):
    """Floats to five digits, everywhere."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else float(f"{x:.5g}") if isinstance(x, float) else x


# --- what came out ------------------------------------------------------------------------------------------------------------------

ESTIMATORS = {  # in the order of the pictures; colours that the colour-blind can tell apart (Okabe and Ito)
    "K=1": "#000000",
    "K=3": "#56b4e9",
    "K=9": "#0072b2",
    "value network": "#e69f00",
    "group mean": "#009e73",
    "constant": "#999999",
    "RLOO": "#d55e00",
}
BINS = 5


def accuracy_of(rows, name):
    """Errors of an estimator over states: mae, bias, correlation, explained variance, and the last with the truth's own noise taken out."""
    truths, values = [row["truth"] for row in rows], [row[name] for row in rows]
    errors = [v - t for v, t in zip(values, truths)]
    noise, variance = statistics.mean(row["error"] ** 2 for row in rows), statistics.pvariance(truths)
    square = statistics.mean(e * e for e in errors)
    flat = min(statistics.pstdev(truths), statistics.pstdev(values)) == 0
    return dict(
        mae=statistics.mean(map(abs, errors)),
        bias=statistics.mean(errors),
        correlation=0.0 if flat else statistics.correlation(truths, values),
        explained=1 - square / variance if variance else float("nan"),  # undefined where all states are worth the same
        explained_without_noise=1 - (square - noise) / (variance - noise) if variance > noise else float("nan"),
    )


def differ(a, b):
    """Whether two truths differ by more than twice the standard error of their difference."""
    return abs(a["truth"] - b["truth"]) > 2 * math.hypot(a["error"], b["error"])


def ranking_of(groups, name):
    """Ranking next steps by an estimate: share of the pairs, and of the states' best steps, that it gets right; ties count in parts.

    Only pairs whose truths differ count, and for the best step only states that have such a pair; a step is a best one if its truth does not
    differ from the highest. Returns dict(pairs, top1, number_of_pairs, number_of_states).
    """
    pairs, firsts = [], []
    for group in groups:
        counted = [(a, b) for i, a in enumerate(group) for b in group[:i] if differ(a, b)]
        pairs += [0.5 if a[name] == b[name] else float((a[name] > b[name]) == (a["truth"] > b["truth"])) for a, b in counted]
        if counted:
            best, highest = max(group, key=lambda row: row["truth"]), max(row[name] for row in group)
            tied = [row for row in group if row[name] == highest]
            firsts.append(statistics.mean(not differ(row, best) for row in tied))
    if not pairs:
        return dict(pairs=None, top1=None, number_of_pairs=0, number_of_states=0)
    return dict(pairs=statistics.mean(pairs), top1=statistics.mean(firsts), number_of_pairs=len(pairs), number_of_states=len(firsts))


def mean_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def ratio_and_error(above, below, rng, draws=400):
    """mean(above) / mean(below) of paired values, and its standard error by resampling the pairs; nan where all of below is 0."""
    if not sum(below):
        return float("nan"), float("nan")
    resampled = []
    for _ in range(draws):
        chosen = rng.choices(range(len(above)), k=len(above))
        if total := sum(below[i] for i in chosen):
            resampled.append(sum(above[i] for i in chosen) / total)
    return sum(above) / sum(below), statistics.stdev(resampled)


def limit_of_large_k(batches):
    """Per batch, a of the least-squares line a + b / K through |g|^2 at the Ks: what is left of it when the values have no noise."""
    x = [1 / k for k in KS]
    mean = statistics.mean(x)
    weights = [1 / len(x) - mean * (v - mean) / sum((u - mean) ** 2 for u in x) for v in x]
    return [sum(w * batch[f"K={k}"] for w, k in zip(weights, KS)) for batch in batches]


def draw(folder):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not results:
        sys.exit(f"values.py: no results in {folder}: name checkpoints to measure")
    text = ["# Values and gradients, by experiments/values.py", ""]
    for name, r in results.items():
        rows, ranked, batches = r["states"], r["ranking"], r["gradient"]
        present = [e for e in ESTIMATORS if e in rows[0]]
        figure, axes = plt.subplot_mosaic(
            [[f"{e}" for e in present], ["position"] * 2 + ["ranking"] * 2 + ["gradient"] * (len(present) - 4)],
            figsize=(2.6 * len(present), 6.4), layout="constrained",
        )  # fmt: skip
        for e in present:
            axes[e].scatter([row["truth"] for row in rows], [row[e] for row in rows], s=9, alpha=0.35, color=ESTIMATORS[e], linewidths=0)
            axes[e].axline((0, 0), slope=1, color="#bbbbbb", linewidth=1)
            axes[e].set(title=e, xlabel="true value", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
            by_bin = [[abs(row[e] - row["truth"]) for row in rows if int(row["position"] * BINS) == b] for b in range(BINS)]
            points = [((b + 0.5) / BINS, statistics.mean(errors)) for b, errors in enumerate(by_bin) if errors]
            axes["position"].plot(*zip(*points), marker="o", markersize=3, color=ESTIMATORS[e], label=e)
        axes[present[0]].set_ylabel("estimate")
        top = 1.4 * axes["position"].get_ylim()[1]  # room for the legend
        axes["position"].set(title="mean absolute error by position", xlabel="position in the solution", ylim=(0, top))
        axes["position"].legend(fontsize=7, ncols=3, loc="upper center")
        able = [e for e in ESTIMATORS if ranked and e in ranked[0][0]]
        found = {e: ranking_of(ranked, e) for e in able}
        chance = ranking_of([[row | {"chance": 0.0} for row in group] for group in ranked], "chance")
        if chance["number_of_pairs"]:
            shown = {e: (found[e]["pairs"], found[e]["top1"], ESTIMATORS[e]) for e in able} | {
                "chance": (chance["pairs"], chance["top1"], "#bbbbbb")
            }
            for i, (pair, top, colour) in enumerate(shown.values()):
                axes["ranking"].bar([i - 0.2, i + 0.2], [pair, top], 0.36, color=colour)
                for x, v in ((i - 0.2, pair), (i + 0.2, top)):
                    axes["ranking"].text(x, v, f"{v:.2f}", ha="center", va="bottom", fontsize=7)
            axes["ranking"].set_xticks(range(len(shown)), shown, fontsize=8)
            axes["ranking"].set(title="next steps ranked right: pairs (left), best (right)", ylim=(0, 1.08))
        names = [e for e in ESTIMATORS if e in batches[0]]
        base = statistics.mean(batch["K=9"] for batch in batches) or 1.0
        for i, e in enumerate(names):
            values = [batch[e] / base for batch in batches]
            mean, error = mean_and_error(values)
            axes["gradient"].scatter(
                [i + 0.25 * ((j * 0.618) % 1 - 0.5) for j in range(len(values))], values, s=6, alpha=0.5, color=ESTIMATORS[e]
            )
            axes["gradient"].errorbar(i, mean, error, marker="_", markersize=18, color="#000000", capsize=4)
        axes["gradient"].set_xticks(range(len(names)), [n.replace("value network", "network") for n in names], fontsize=7)
        axes["gradient"].set(title="$|g|^2$ by batch, K = 9 is 1", yscale="log")
        for axis in axes.values():
            axis.grid(alpha=0.25)
        figure.suptitle(name)
        figure.savefig(folder.parent / f"values-{name}.png", dpi=100)
        plt.close(figure)

        floor = statistics.mean(math.sqrt(2 / math.pi) * row["error"] for row in rows)
        text += [
            f"## {name}",
            "",
            f"{len(rows)} states, {r['measured']['truth_rollouts']} rollouts each for the truth; its own noise alone gives a mean absolute error of {floor:.3f}. Ranking: "
            f"{chance['number_of_pairs']} of {sum(len(g) * (len(g) - 1) // 2 for g in ranked)} pairs of next steps differ by more than twice their "
            f"error, in {chance['number_of_states']} of {len(ranked)} states; they were sampled at temperature "
            f"{r['measured'].get('next_step_temperature', r['settings']['temperature'])}.",
            "",
            "| estimate | mean abs. error | bias | correlation | explained variance | without the truth's noise | pairs ranked | best step |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for e in present:
            m, k = accuracy_of(rows, e), found.get(e, {})
            cells = [f"{k[c]:.2f}" if k.get(c) is not None else "" for c in ("pairs", "top1")]
            text.append(
                f"| {e} | {m['mae']:.3f} | {m['bias']:+.3f} | {m['correlation']:.2f} | {m['explained']:.2f} | "
                f"{m['explained_without_noise']:.2f} | {' | '.join(cells)} |"
            )
        if chance["number_of_pairs"]:
            text.append(f"| chance | | | | | | {chance['pairs']:.2f} | {chance['top1']:.2f} |")
        fifths = [[row for row in rows if int(row["position"] * BINS) == b] for b in range(BINS)]
        text += [
            "",
            f"By fifths of the solution ({', '.join(str(len(f)) for f in fifths)} states): bias; correlation; explained variance.",
            "",
        ]
        text += ["| estimate |" + " | ".join(f"{b}/{BINS}" for b in range(1, BINS + 1)) + " |", "|---|" + "---|" * BINS]
        for e in present:
            parts = [accuracy_of(f, e) if len(f) > 1 else None for f in fifths]
            cells = [f"{m['bias']:+.2f}; {m['correlation']:.2f}; {m['explained']:.2f}" if m else "" for m in parts]
            text.append(f"| {e} | {' | '.join(cells)} |")
        text += [
            "",
            f"Second moment of the gradient, {len(batches)} batches of {r['measured']['responses']} responses, ± one standard error:",
            "",
            "| advantages | E\\|g\\|^2 | ratio to K = 9 | largest batch's share |",
            "|---|---|---|---|",
        ]
        rng, nine = random.Random(0), [batch["K=9"] for batch in batches]
        series = {e: [batch[e] for batch in batches] for e in names} | {"K to infinity (a + b / K)": limit_of_large_k(batches)}
        for e, values in series.items():
            (mean, error), (ratio, ratio_error) = mean_and_error(values), ratio_and_error(values, nine, rng)
            text.append(f"| {e} | {mean:.4g} ± {error:.2g} | {ratio:.2f} ± {ratio_error:.2f} | {max(values) / (sum(values) or 1):.2f} |")
        text.append("")
    (folder.parent / "values.md").write_text("\n".join(text))
    print("\n".join(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/N folders that train.py wrote")
    parser.add_argument("--truth_rollouts", type=int, default=256, help="rollouts per state for the ground truth")
    parser.add_argument("--problems", type=int, default=20, help="held-out problems, one solution of each")
    parser.add_argument("--ranked", type=int, default=20, help="states, of as many other problems, whose next steps are ranked")
    parser.add_argument(
        "--next_step_temperature", type=float, help="at which they are sampled; default: the training's, where few may differ"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=50,
        help="batches of 4 problems (or the next multiple of the ranks) x 4 responses whose gradients are measured",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results; the pictures and the table go beside it")
    parser.add_argument("--draw", action="store_true", help="pictures and tables from the results that are there")
    arguments = parser.parse_args()
    if not arguments.draw:
        import ppo

        missing = [
            p for p in arguments.checkpoints if not ((p / "config.json").is_file() and (p.parent.parent / "settings.json").is_file())
        ]
        world = int(os.environ.get("WORLD_SIZE", 1))
        small = min(arguments.problems, arguments.ranked) < world or min(arguments.batches, arguments.truth_rollouts) < 2
        engines = {
            tuple(json.loads((p.parent.parent / "settings.json").read_text())[k] for k in ("dataset", "stop", "max_sequence", "chat"))
            for p in (arguments.checkpoints if not missing else ())
        }
        if missing or small or not arguments.checkpoints:
            what = (
                "name RUN/checkpoints/N folders; at least 2 batches and truth rollouts, and as many problems and ranked as there are ranks"
            )
            what = f"{missing[0]} is no RUN/checkpoints/N of train.py" if missing else what
            ppo.refuse(f"values.py: {what}")
        if len(engines) > 1:
            ppo.refuse("values.py: the runs differ in dataset, stop, max_sequence or chat: measure them one by one, into one --results")
        from watch import Watch

        device = ppo.init_distributed()
        with Watch() as watch:
            measure(arguments, device, watch)
    if os.environ.get("RANK", "0") == "0":
        draw(arguments.results)


if __name__ == "__main__":
    main()
