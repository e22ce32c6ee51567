"""The comparison: VinePPO, PPO, GRPO, RLOO, RestEM and DPO+ on the arithmetic task, from one SFT policy.

    python experiments/compare.py run          # every run that has no result yet, one process a core; stop it and start it at will
    python experiments/compare.py run --only 'rloo.*'
    python experiments/compare.py draw         # pictures and tables from the results alone
    python experiments/compare.py again NAME   # a run once more, for its checkpoints in runs/compare/NAME; its result stays as it is

`make compare` does both, after sft.py. A finished run leaves experiments/results/compare/NAME.json: its curve, command, settings, and the commit
that made it; a result counts only as long as its command is the planned one. First comes a search for each method's learning rate, on two seeds of
its own: three values, each two to three times the one before, one more below for PPO, whose best was the lowest (each with the critic at the same rate
and at 1e-3). Then come the seeds that count. All RL methods draw 16 responses per iteration (4 problems x 4), make 4 optimizer steps of 8 responses with them, 40
times, and differ in nothing but the advantages. The controls give GRPO and RLOO more responses for as many optimizer steps: 96 per iteration cost
about the seconds of VinePPO's K = 9 and the generated tokens of K = 3, 256 the tokens of K = 9. PPO gets 256, too, so that its value network has more to
learn from (at the rate of the others with 256, the network's 1e-3). Sampling is at temperature 1, but for the runs named T; evaluation is at temperature 1, the first 400 held-out problems once each (standard error of one evaluation: 0.025).
"""

import hashlib
import json
import math
import multiprocessing.connection
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, RUNS = ROOT / "experiments" / "results" / "compare", ROOT / "runs" / "compare"
MODEL = RUNS / "sft"

SEARCH_SEEDS = (100, 101)
RL = "train.py --iterations 40 --prompts_per_iteration 4 --responses_per_prompt 4 --minibatch 8 --save_every 20 --eval_every 10"
MORE_96 = " --prompts_per_iteration 12 --responses_per_prompt 8 --minibatch 48"  # as many optimizer steps
MORE_256 = " --prompts_per_iteration 32 --responses_per_prompt 8 --minibatch 128"
ROUNDS = " --rounds 3 --problems_per_round 256 --responses_per_prompt 4 --batch 32"
EVAL = " --eval_problems 400 --eval_samples 1"
LR, LR_RESTEM, LR_DPO = ("2e-5", "5e-5", "1e-4"), ("1e-4", "3e-4", "1e-3"), ("3e-5", "1e-4", "3e-4")
LR_PPO = [f"{rate}{critic}" for critic in ("", " --critic_learning_rate 1e-3") for rate in ("1e-5", *LR)]
METHODS = {  # name: (command, learning rates to search, number of seeds, whose search it uses)
    "vineppo-K9": (RL + EVAL + " --K 9", LR, 5, None),
    "vineppo-K3": (RL + EVAL + " --K 3", LR, 5, None),
    "vineppo-K1": (RL + EVAL + " --K 1", LR, 5, None),
    "ppo": (RL + EVAL + " --algorithm ppo", LR_PPO, 5, None),
    "grpo": (RL + EVAL + " --algorithm grpo", LR, 5, None),
    "rloo": (RL + EVAL + " --algorithm rloo", LR, 5, None),
    "grpo-96": (RL + EVAL + MORE_96 + " --algorithm grpo", LR, 5, None),
    "rloo-96": (RL + EVAL + MORE_96 + " --algorithm rloo", LR, 5, None),
    "restem": ("-m baselines.restem" + ROUNDS + EVAL, LR_RESTEM, 3, None),
    "dpo": ("-m baselines.dpo" + ROUNDS + EVAL, LR_DPO, 3, None),
    "vineppo-K3-T0.6": (RL + EVAL + " --K 3 --temperature 0.6", LR, 3, "vineppo-K3"),
    "vineppo-K3-T1.2": (RL + EVAL + " --K 3 --temperature 1.2", LR, 3, "vineppo-K3"),
    "rloo-T0.6": (RL + EVAL + " --algorithm rloo --temperature 0.6", LR, 3, "rloo"),
    "rloo-T1.2": (RL + EVAL + " --algorithm rloo --temperature 1.2", LR, 3, "rloo"),
    "grpo-256": (RL + EVAL + MORE_256 + " --algorithm grpo", LR, 2, "grpo-96"),
    "rloo-256": (RL + EVAL + MORE_256 + " --algorithm rloo", LR, 2, "rloo-96"),
    "ppo-256": (RL + EVAL + MORE_256 + " --algorithm ppo --critic_learning_rate 1e-3", LR, 2, "rloo-96"),
}


# --- running ------------------------------------------------------------------------------------------------------------------------


def load_results():
    """{name: result} of the finished runs whose command is the one that is planned now."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for _ in ("the search", "the seeds that count, at the rate that the search then chooses"):
        commands = planned(results)
        results = {name: result for name, result in results.items() if result["command"] == commands.get(name)}
    return results


def search_name(method, rate, seed):
    return f"search-{method}-lr{rate.replace(' --critic_learning_rate ', '-critic')}-s{seed}"


def last_accuracy(result):
    """The mean of the last two evaluations."""
    return statistics.mean([line["accuracy"] for line in result["curve"] if "accuracy" in line][-2:])


def chosen_rate(method, results):
    """The searched learning rate with the highest accuracy over the search's seeds; None while runs of the search are missing."""
    method = METHODS[method][3] or method
    names = {rate: [search_name(method, rate, seed) for seed in SEARCH_SEEDS] for rate in METHODS[method][1]}
    if any(name not in results for group in names.values() for name in group):
        return None
    return max(names, key=lambda rate: statistics.mean(last_accuracy(results[name]) for name in names[rate]))


def planned(results):
    """{name: command} of all runs whose learning rate is known by now, in the order to run them."""
    runs = {}
    for method, (command, rates, seeds, search) in METHODS.items():
        if search is None:
            for rate in rates:
                for seed in SEARCH_SEEDS:
                    runs[search_name(method, rate, seed)] = f"{command} --learning_rate {rate} --seed {seed}"
        rate = chosen_rate(method, results)
        for seed in range(seeds) if rate else ():
            runs[f"{method}-s{seed}"] = f"{command} --learning_rate {rate} --seed {seed}"
    return runs


def execute(name, command):
    """One run in this process, its output to log.txt in its folder. The process was forked when torch and vLLM were imported already."""
    import runpy

    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    program, *arguments = command.removeprefix("-m ").split()
    sys.argv = [program, *arguments, "--model", str(MODEL.relative_to(ROOT)), "--run_dir", str(folder.relative_to(ROOT))]
    if program.endswith(".py"):
        import train

        train.main()
    else:
        runpy.run_module(program, run_name="__main__")


def again(name):
    """A run of the plan as it is now, on one thread as all of them, whatever its result; if it was stopped it goes on."""
    commands = planned(load_results())
    if name not in commands:
        sys.exit(f"compare.py: there is no run {name}: name one of {', '.join(commands)}")
    command = [sys.executable, *commands[name].split(), "--model", MODEL.relative_to(ROOT), "--run_dir", (RUNS / name).relative_to(ROOT)]
    sys.exit(subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)


def curve_of(folder):
    """What the pictures need of a run's metrics, with the generated tokens and the seconds of training summed up to each iteration."""
    curve, tokens, seconds = [], 0, 0.0
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        tokens += line.get("tokens_sample", 0) + line.get("tokens_values", 0)
        seconds += sum(line.get(f"seconds_{phase}", 0.0) for phase in ("sample", "values", "train", "sync"))
        kept = {
            k: line[k] for k in ("iteration", "gradient_steps", "accuracy", "reward", "kl", "entropy", "explained_variance") if k in line
        }
        curve.append(kept | {"tokens": tokens, "seconds": round(seconds, 2)})
    return curve


def run(only):
    try:
        wanted = re.compile(only)
    except re.error as error:
        sys.exit(f"compare.py: --only {only} is no regular expression: {error}")

    def missing():
        results = load_results()
        return {name: command for name, command in planned(results).items() if name not in results and wanted.search(name)}

    if not missing():
        return print(f"nothing to run: every run of that name is in {RESULTS}")
    if not (MODEL / "model.safetensors").is_file():
        sys.exit(f"compare.py: there is no SFT policy in {MODEL}: run `python sft.py --dataset arithmetic --out {MODEL}` first")
    start = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()[:12]
    others = {result["start"] for result in load_results().values()} - {start}
    if others:
        sys.exit(
            f"compare.py: {RESULTS} holds results that began from another SFT policy ({others.pop()}, not {start}): move them away first"
        )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for name, value in dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", VLLM_CPU_KVCACHE_SPACE="1").items():
        os.environ.setdefault(name, value)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "rollout", "baselines.rounds", "sft"])
    cores = len(os.sched_getaffinity(0))
    RESULTS.mkdir(parents=True, exist_ok=True)
    running, failed = {}, set()  # running: process -> (name, command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("compare.py: stopped; the runs that had ended are kept"))
    while True:
        for name, command in missing().items():
            if name not in failed and name not in [n for n, _ in running.values()] and len(running) < cores:
                print(f"{time.strftime('%H:%M:%S')} {name}: {command}", flush=True)
                process = context.Process(target=execute, args=(name, command), daemon=True)  # ends with this one
                process.start()
                running[process] = name, command
        if not running:
            break
        ended = multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [p for p in running if p.sentinel in ended]:
            process.join()
            name, command = running.pop(process)
            if process.exitcode == 0:
                settings = json.loads((RUNS / name / "settings.json").read_text())
                result = dict(name=name, command=command, start=start, commit=commit, settings=settings, curve=curve_of(RUNS / name))
                draft = RESULTS / f"{name}.unfinished"
                draft.write_text(json.dumps(result).replace('{"iteration"', '\n{"iteration"') + "\n")
                draft.rename(RESULTS / f"{name}.json")
            else:
                failed.add(name)
                print(f"{name} failed; see {RUNS / name / 'log.txt'}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"compare.py: {len(failed)} runs failed; the rest is done")


# --- what came out ------------------------------------------------------------------------------------------------------------------

T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 95 % two-sided, by the number of seeds
STYLE = {  # colours that the colour-blind can tell apart (Okabe and Ito); the controls are the same colours, broken
    "vineppo-K9": ("VinePPO, K = 9", dict(color="#0072b2")),
    "vineppo-K3": ("VinePPO, K = 3", dict(color="#56b4e9")),
    "vineppo-K1": ("VinePPO, K = 1", dict(color="#000000")),
    "ppo": ("PPO", dict(color="#e69f00")),
    "grpo": ("GRPO", dict(color="#009e73")),
    "rloo": ("RLOO", dict(color="#d55e00")),
    "grpo-96": ("GRPO, 96 responses", dict(color="#009e73", linestyle="--")),
    "rloo-96": ("RLOO, 96 responses", dict(color="#d55e00", linestyle="--")),
    "grpo-256": ("GRPO, 256 responses (2 seeds)", dict(color="#009e73", linestyle=":")),
    "rloo-256": ("RLOO, 256 responses (2 seeds)", dict(color="#d55e00", linestyle=":")),
    "ppo-256": ("PPO, 256 responses (2 seeds)", dict(color="#e69f00", linestyle=":")),
    "restem": ("RestEM", dict(color="#cc79a7")),
    "dpo": ("DPO+", dict(color="#999999")),
}


def interval(values):
    """(mean, half the width of its 95 % t interval; 0 with one value)."""
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), half


def seeds_of(method, results):
    return [results[f"{method}-s{seed}"]["curve"] for seed in range(METHODS[method][2]) if f"{method}-s{seed}" in results]


def evaluations(curves):
    """The seeds' evaluations together: [{name: mean}] with accuracy's interval, and the kl since the evaluation before.

    seconds: the iterations done times the median iteration of the fastest seed, since other work on the machine slows some of the runs. train:
    the mean reward within five iterations of the evaluation, which is the accuracy on the problems drawn there.
    """
    points = []
    pace = min(statistics.median(after["seconds"] - before["seconds"] for before, after in zip(curve, curve[1:])) for curve in curves)
    for number in range(min(sum("accuracy" in line for line in curve) for curve in curves)):
        rows = []
        for curve in curves:
            places = [i for i, line in enumerate(curve) if "accuracy" in line]
            since = curve[places[number - 1] + 1 : places[number] + 1] if number else []
            near = [
                line["reward"] for line in curve if "reward" in line and abs(line["iteration"] - curve[places[number]]["iteration"]) <= 5
            ]
            mean = {"kl": statistics.mean(line["kl"] for line in since)} if since and "kl" in since[0] else {}
            mean |= {"train": statistics.mean(near)}
            rows.append(dict(gradient_steps=0) | curve[places[number]] | mean)
        accuracy, half = interval([row["accuracy"] for row in rows])
        point = {
            k: statistics.mean(row[k] for row in rows) for k in ("gradient_steps", "tokens", "train", "kl") if all(k in r for r in rows)
        }
        points.append(point | dict(accuracy=accuracy, half=half, seconds=pace * rows[0]["iteration"]))
    return points


def reach(points, target, axis):
    """Where the mean accuracy first reaches the target, between the evaluations on a straight line; None if it never does."""
    if points[0]["accuracy"] >= target:
        return 0.0
    for before, after in zip(points, points[1:]):
        if before["accuracy"] < target <= after["accuracy"]:
            share = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[axis] + share * (after[axis] - before[axis])
    return None


def draw():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = load_results()
    methods = {method: evaluations(seeds_of(method, results)) for method in METHODS if seeds_of(method, results)}
    if not methods:
        sys.exit(f"compare.py: no finished runs in {RESULTS}: `python experiments/compare.py run` makes them")

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained", sharey=True)
    panels = [
        ("gradient_steps", "gradient steps", "linear"),
        ("tokens", "generated tokens", "log"),
        ("seconds", "seconds on one core", "log"),
    ]
    for axis, (name, label, scale) in zip(axes, panels):
        for method, (text, style) in STYLE.items():
            for points in [methods[method]] if method in methods else []:
                points = points if scale == "linear" else points[1:]
                x, y, half = ([point[k] for point in points] for k in (name, "accuracy", "half"))
                half = half if len(seeds_of(method, results)) > 2 else None  # two seeds' intervals would fill the picture
                axis.errorbar(x, y, half, label=text, marker="o", markersize=3, capsize=2, elinewidth=0.7, **style)
        axis.set(xlabel=label, xscale=scale)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy at temperature 1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(RESULTS.parent / "compare.png", dpi=110)

    figure, (train, kl, temperature) = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    for method, (text, style) in STYLE.items():
        points = methods.get(method, [])[1:]
        if points and "kl" in points[0]:  # not RestEM and DPO+
            train.plot([p["train"] for p in points], [p["accuracy"] for p in points], label=text, marker="o", markersize=3, **style)
            kl.plot([p["kl"] for p in points], [p["accuracy"] for p in points], marker="o", markersize=3, **style)
    train.axline((0.5, 0.5), slope=1, color="#bbbbbb", linewidth=1)
    train.set(xlabel="accuracy on the training problems, as they are drawn", ylabel="held-out accuracy")
    kl.set(xlabel="KL to the SFT policy, nats per response", ylabel="held-out accuracy")
    for base in ("vineppo-K3", "rloo"):
        found = [(t, methods[name][-1]) for t, name in ((0.6, f"{base}-T0.6"), (1.0, base), (1.2, f"{base}-T1.2")) if name in methods]
        if found:
            t, points = zip(*found)
            temperature.errorbar(t, [p["accuracy"] for p in points], [p["half"] for p in points], marker="o", capsize=3, **STYLE[base][1])
    temperature.set(xlabel="sampling temperature in training", ylabel="held-out accuracy at temperature 1, at the end")
    for axis in (train, kl, temperature):
        axis.grid(alpha=0.3)
    figure.legend(*train.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(RESULTS.parent / "compare-more.png", dpi=110)

    target = max((point["accuracy"] for point in methods.get("ppo", [])), default=None)
    lines = [
        "Accuracy on 400 held-out problems, mean over the seeds and its 95 % t interval. Best: the highest of a method's mean evaluations, a maximum"
        " over noisy points. Seconds: the fastest seed's median iteration on one core, two runs side by side.",
        f"To PPO's best: where the mean curve first reaches {target:.3f}." if target else "",
        "",
        "| method | learning rate | seeds | accuracy at the end | best | steps to PPO's best | tokens | seconds | tokens in all | seconds in all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, points in methods.items():
        end, best = points[-1], max(point["accuracy"] for point in points)
        cost = [reach(points, target, axis) if target else None for axis in ("gradient_steps", "tokens", "seconds")]
        text = STYLE[method][0] if method in STYLE else method
        command = next(r["command"] for name, r in results.items() if re.fullmatch(rf"{method}-s\d+", name))
        rate = re.search(r" --learning_rate (\S+)", command)[1]
        critic = re.search(r" --critic_learning_rate (\S+)", command)
        rate += f", critic {critic[1]}" if critic else ""
        lines.append(
            f"| {text} | {rate} | {len(seeds_of(method, results))} | {end['accuracy']:.3f} ± {end['half']:.3f} | {best:.3f} | "
            + " | ".join("never" if c is None else f"{c:,.0f}" for c in cost)
            + f" | {end['tokens']:,.0f} | {end['seconds']:,.0f} |"
        )
    lines += [
        "",
        "The search: mean of the last two evaluations over the seeds 100 and 101.",
        "",
        "| method | learning rates |",
        "|---|---|",
    ]
    for method, (_, rates, _, search) in METHODS.items():
        if search is None and chosen_rate(method, results):
            found = {
                rate: statistics.mean(last_accuracy(results[search_name(method, rate, seed)]) for seed in SEARCH_SEEDS) for rate in rates
            }
            cells = ", ".join(f"{rate.replace(' --critic_learning_rate ', ', critic ')}: {value:.3f}" for rate, value in found.items())
            lines.append(f"| {method} | {cells} |")
    (RESULTS.parent / "compare.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    if sys.argv[1:2] == ["run"] and len(sys.argv) in (2, 4) and sys.argv[2:3] in ([], ["--only"]):
        run(sys.argv[3] if len(sys.argv) == 4 else "")
    elif sys.argv[1:] == ["draw"]:
        draw()
    elif sys.argv[1:2] == ["again"] and len(sys.argv) == 3:
        again(sys.argv[2])
    else:
        sys.exit("usage: python experiments/compare.py run [--only REGEX] | draw | again NAME")


if __name__ == "__main__":
    main()
