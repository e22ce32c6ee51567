"""VinePPO, PPO, GRPO, RLOO, RestEM and DPO+ compared on a built-in task, from one SFT policy.

    python experiments/compare.py arithmetic run      # every run without a result, one process per core
    python experiments/compare.py arithmetic run --only 'rloo.*'
    python experiments/compare.py arithmetic draw     # pictures and tables, from the results alone
    python experiments/compare.py arithmetic again NAME       # repeats a run, for its checkpoints

`make compare` does the first and the third, after sft.py. `run` may be stopped and started at any time.
`again` writes runs/compare/TASK/NAME and leaves the results as they are. A finished run adds a line to
experiments/results/TASK.jsonl: its name, its command, hashes of the SFT policy and of the commit, and its
curve. A result counts only as long as its command is the planned one.

First comes a search for each method's learning rate, on two seeds of its own: three values of LADDER,
and the next ones as long as the best value is at an edge. Then come the seeds that count.

All RL methods draw 16 responses per iteration (4 problems x 4), make 4 optimizer steps of 8 responses
with them, and do so 40 times (30 times on the worded task). They differ in the advantages and the
learning rate. The controls that are named by their responses per iteration draw more of them for the same
number of optimizer steps. On arithmetic, 32 responses cost about the seconds of K = 2 averaged, 96 the
seconds of K = 9, and 256 the tokens of K = 9. On the worded task 48 responses cost less than K = 2
averaged, and 288 cost a tenth more than the seconds of K = 9. Another control is RLOO with whitened
advantages. The masked methods used an option that train.py no longer has: their results stay, and they
are not run again. Sampling is at temperature 1. So are the evaluations, in the search as well, on all 500
held-out problems twice.
"""

import hashlib
import multiprocessing.connection
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common

ROOT = common.ROOT
LADDER = ("5e-6", "1e-5", "2e-5", "5e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3")  # learning rates
FIRST = range(3, 6)  # of the ladder, searched for every method
SEARCH_SEEDS = (100, 101)
EVAL = " --eval_problems 500 --eval_samples 2"
RL = (
    "train.py --iterations 40 --prompts_per_iteration 4 --responses_per_prompt 4 --minibatch 8"
    " --save_every 20 --eval_every 10" + EVAL
)
RL_30 = RL.replace("--iterations 40", "--iterations 30")  # the worded task's responses are 3.6 times as long
REMOVED = "--mask_above"  # a former option of train.py
AVERAGED, MASK = " --gae_lambda 0.5 --baseline_smoothing 0.5", f" {REMOVED} 0.9"
WHITENED = " --algorithm rloo --whiten True"
ROUNDS = " --rounds 3 --problems_per_round 256 --responses_per_prompt 4 --batch 32" + EVAL


def responses(prompts, each):
    """Options for so many responses per iteration, in as many optimizer steps."""
    count = prompts * each
    return f" --prompts_per_iteration {prompts} --responses_per_prompt {each} --minibatch {count // 2}"


METHODS = {  # name: (command, number of seeds)
    "arithmetic": {
        "K9": (RL + " --K 9", 8),
        "K3": (RL + " --K 3", 8),
        "K3-averaged": (RL + " --K 3" + AVERAGED, 8),
        "K2-averaged": (RL + " --K 2" + AVERAGED, 8),
        "rloo": (RL + " --algorithm rloo", 8),
        "grpo": (RL + " --algorithm grpo", 8),
        "ppo": (RL + " --algorithm ppo", 8),
        "ppo-critic": (RL + " --algorithm ppo --critic_learning_rate 1e-3", 8),
        "rloo-32": (RL + " --algorithm rloo" + responses(8, 4), 8),
        "rloo-96": (RL + " --algorithm rloo" + responses(12, 8), 8),
        "K2-averaged-mask": (RL + " --K 2" + AVERAGED + MASK, 8),
        "rloo-mask": (RL + " --algorithm rloo" + MASK, 8),
        "restem": ("-m baselines.restem" + ROUNDS, 3),
        "dpo": ("-m baselines.dpo" + ROUNDS, 3),
        "rloo-256": (RL + " --algorithm rloo" + responses(32, 8), 8),
        "ppo-96": (RL + " --algorithm ppo --critic_learning_rate 1e-3" + responses(12, 8), 8),
        "rloo-whitened": (RL + WHITENED, 8),
    },
    "worded": {
        "K2-averaged": (RL_30 + " --K 2" + AVERAGED, 8),
        "rloo": (RL_30 + " --algorithm rloo", 8),
        "rloo-48": (RL_30 + " --algorithm rloo" + responses(12, 4), 8),
        "K9": (RL_30 + " --K 9", 8),
        "rloo-288": (RL_30 + " --algorithm rloo" + responses(36, 8), 8),
        "ppo-critic": (RL_30 + " --algorithm ppo --critic_learning_rate 1e-3", 8),
        "grpo": (RL_30 + " --algorithm grpo", 8),
        "rloo-whitened": (RL_30 + WHITENED, 8),
        "K3": (RL_30 + " --K 3", 8),
        "ppo": (RL_30 + " --algorithm ppo", 8),
        "restem": ("-m baselines.restem" + ROUNDS, 3),
        "dpo": ("-m baselines.dpo" + ROUNDS, 3),
    },
}


class Plan:
    """The comparison on one task: its methods, the file of its results and the folder of its runs."""

    def __init__(self, task):
        self.task, self.methods = task, METHODS[task]
        self.results = common.RESULTS / f"{task}.jsonl"
        self.runs = ROOT / "runs" / "compare" / task
        self.model = self.runs / "sft"

    def load_results(self):
        """{name: result} of the finished runs whose command is the one that is planned now."""
        results = common.newest(self.results)
        while True:  # what a search leads to is planned only as long as the search's results count
            commands = self.commands(results)
            kept = {name: r for name, r in results.items() if r["command"] == commands.get(name)}
            if len(kept) == len(results):
                return kept
            results = kept

    def searched(self, method, results):
        """{learning rate: mean accuracy of its search runs}; None where one of them is missing."""
        found, low, high = {}, FIRST[0], FIRST[-1]

        def accuracy(i):
            runs = [results.get(search_name(method, LADDER[i], seed)) for seed in SEARCH_SEEDS]
            return statistics.mean(map(last_accuracy, runs)) if all(runs) else None

        for i in FIRST:
            found[i] = accuracy(i)
        while None not in found.values():
            best = max(found, key=found.get)
            if low < best < high or best in (0, len(LADDER) - 1):
                break
            low, high = min(low, best - 1), max(high, best + 1)
            found |= {i: accuracy(i) for i in (low, high) if i not in found}
        return {LADDER[i]: found[i] for i in sorted(found)}

    def chosen_rate(self, method, results):
        """The learning rate with the highest accuracy in the search; None while the search is not complete."""
        found = self.searched(method, results)
        return None if None in found.values() else max(found, key=found.get)

    def commands(self, results):
        """{name: command} of all runs whose learning rate is known by now, in the order in which to run them."""
        runs = {}
        for method, (command, seeds) in self.methods.items():
            for rate in self.searched(method, results):
                for seed in SEARCH_SEEDS:
                    name = search_name(method, rate, seed)
                    runs[name] = f"{command} --learning_rate {rate} --seed {seed}"
            rate = self.chosen_rate(method, results)
            for seed in range(seeds) if rate else ():
                runs[f"{method}-s{seed}"] = f"{command} --learning_rate {rate} --seed {seed}"
        return runs

    def missing(self, only):
        """{name: command} of the planned runs without a result whose name matches `only`, a compiled expression."""
        results, found = self.load_results(), {}
        for name, command in self.commands(results).items():
            if name not in results and only.search(name) and REMOVED not in command:
                found[name] = command
        return found

    def arguments_of(self, name):
        """The options that are added to the planned command of a run."""
        model, folder = self.model.relative_to(ROOT), (self.runs / name).relative_to(ROOT)
        return ["--dataset", self.task, "--model", str(model), "--run_dir", str(folder)]


def search_name(method, rate, seed):
    return f"search-{method}-lr{rate}-s{seed}"


def last_accuracy(result):
    """The mean of the last two evaluations."""
    return statistics.mean(accuracies(result)[-2:])


def accuracies(result):
    """The accuracies of a run's evaluations, the first before training."""
    return [accuracy for accuracy in result["curve"]["accuracy"] if accuracy is not None]


# --- running ---


def execute(plan, name, command):
    """Do one run, in a process forked from one that has imported torch and vLLM; its output goes to log.txt."""
    folder = plan.runs / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    program, *options = command.removeprefix("-m ").split()
    sys.argv = [program, *options, *plan.arguments_of(name)]
    runpy.run_module(program.removesuffix(".py"), run_name="__main__")


def again(plan, name):
    """Repeat a run of the plan, on one thread as the others. It resumes if it was stopped."""
    results = plan.load_results()
    commands, method = plan.commands(results), name.rsplit("-s", 1)[0]
    if method in plan.methods and not plan.chosen_rate(method, results):
        sys.exit(
            f"compare.py: the learning rate of {name} has not been searched yet:"
            f" first run `python experiments/compare.py {plan.task} run --only search-{method}-lr`"
        )
    if name not in commands:
        sys.exit(f"compare.py: there is no run {name}: name one of {', '.join(commands)}")
    if REMOVED in commands[name]:
        sys.exit(f"compare.py: {name} cannot be repeated: train.py no longer has {REMOVED}")
    command = [sys.executable, *commands[name].split(), *plan.arguments_of(name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


def curve_of(folder):
    """What the pictures need of a run's metrics: for each line some of its numbers, and sums up to it.

    tokens: generated tokens; value_tokens: those for the values; seconds: seconds of training.
    """
    curve, tokens, value_tokens, seconds = [], 0, 0, 0.0
    names = ("iteration", "gradient_steps", "accuracy", "reward", "kl", "entropy", "explained_variance")
    for line in common.read(folder / "metrics.jsonl"):
        value_tokens += line.get("tokens_values", 0)
        tokens += line.get("tokens_sample", 0) + line.get("tokens_values", 0)
        seconds += sum(line.get(f"seconds_{phase}", 0.0) for phase in ("sample", "values", "train", "sync"))
        kept = {k: line[k] for k in names if k in line}
        costs = {"tokens": tokens, "value_tokens": value_tokens, "seconds": round(seconds, 2)}
        curve.append(kept | costs)
    return curve


def identity_of_start(plan):
    """A hash of the SFT policy's weights. Exits if there is no policy, or if results began from another one."""
    weights = plan.model / "model.safetensors"
    if not weights.is_file():
        sys.exit(
            f"compare.py: there is no SFT policy in {plan.model}:"
            f" first run `python sft.py --dataset {plan.task} --out {plan.model}`"
        )
    start = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    others = {result["start"] for result in plan.load_results().values()} - {start}
    if others:
        sys.exit(
            f"compare.py: results in {plan.results} began from another SFT policy ({others.pop()}, not {start}):"
            " move that file away"
        )
    return start


def store(plan, name, command, start, commit):
    """Add the result of a finished run."""
    about = dict(name=name, command=command, start=start, commit=commit)
    common.append(plan.results, about | dict(curve=common.columns_of(curve_of(plan.runs / name))))


def stopped(*_):
    sys.exit("compare.py: stopped; the results of the runs that had ended are kept")


def run(plan, only):
    """Do all runs that are missing, one process per core."""
    try:
        only = re.compile(only)
    except re.error as error:
        sys.exit(f"compare.py: --only {only} is no regular expression: {error}")
    if not plan.missing(only):
        return print(f"there is nothing to run: every planned run that matches is in {plan.results}")
    start = identity_of_start(plan)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    variables = dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", VLLM_CPU_KVCACHE_SPACE="1")
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "rollout", "baselines.rounds", "sft"])
    cores = len(os.sched_getaffinity(0))
    running, failed = {}, set()  # running: process -> (name, command)
    signal.signal(signal.SIGTERM, stopped)
    while True:
        for name, command in plan.missing(only).items():
            begun = failed | {n for n, _ in running.values()}
            if name not in begun and len(running) < cores:
                print(f"{time.strftime('%H:%M:%S')} {name}: {command}", flush=True)
                # daemon: it ends with this process
                process = context.Process(target=execute, args=(plan, name, command), daemon=True)
                process.start()
                running[process] = name, command
        if not running:
            break
        ended = multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [p for p in running if p.sentinel in ended]:
            process.join()
            name, command = running.pop(process)
            if process.exitcode == 0:
                store(plan, name, command, start, commit)
            else:
                failed.add(name)
                print(f"{name} failed; see {plan.runs / name / 'log.txt'}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"compare.py: {len(failed)} runs failed; the others are done")


# --- what came out ---

# the controls' lines are broken
STYLE = {
    "K9": ("VinePPO, K = 9", dict(color=common.BLUE)),
    "K3": ("VinePPO, K = 3", dict(color=common.SKY)),
    "K3-averaged": ("VinePPO, K = 3, averaged", dict(color=common.SKY, linestyle="--")),
    "K2-averaged": ("VinePPO, K = 2, averaged", dict(color=common.PURPLE)),
    "K2-averaged-mask": ("VinePPO, K = 2, averaged, masked", dict(color=common.PURPLE, linestyle="--")),
    "ppo": ("PPO", dict(color=common.ORANGE)),
    "ppo-critic": ("PPO, critic at 1e-3", dict(color=common.ORANGE, linestyle="-.")),
    "grpo": ("GRPO", dict(color=common.GREEN)),
    "rloo": ("RLOO", dict(color=common.VERMILION)),
    "rloo-whitened": ("RLOO, whitened", dict(color="#7f3f00")),
    "rloo-mask": ("RLOO, masked", dict(color=common.VERMILION, linestyle="-.")),
    "restem": ("RestEM", dict(color=common.BLACK)),
    "dpo": ("DPO+", dict(color=common.GREY)),
}
BROKEN = "--", ":", (0, (1, 3))  # line styles of a method's controls, fewer responses first


def style_of(plan, method):
    """(name, style of its line) of a method. A control is named by its responses per iteration."""
    if method in STYLE:
        return STYLE[method]
    base, count = method.rsplit("-", 1)
    controls = [m for m in plan.methods if re.fullmatch(rf"{base}-\d+", m)]
    controls.sort(key=lambda m: int(m.rsplit("-", 1)[1]))
    name, style = STYLE[base]
    return f"{name}, {count} responses", style | dict(linestyle=BROKEN[controls.index(method)])


def row_name(plan, method, name):
    """The name of a method's row, marked where its option is gone."""
    return f"{name} (option since removed)" if REMOVED in plan.methods[method][0] else name


def seeds_of(plan, method, results):
    """The results of a method's finished runs."""
    names = [f"{method}-s{seed}" for seed in range(plan.methods[method][1])]
    return [results[name] for name in names if name in results]


def evaluations(curves):
    """The evaluations of several seeds' curves: [{name: mean over the seeds}].

    half: half the width of the accuracy's interval. kl: the mean since the evaluation before. seconds: the
    iterations done times the median iteration of the fastest seed, since other work on the machine slows
    some of the runs. train: the mean reward within five iterations of the evaluation, which is the accuracy
    on the problems drawn there.
    """
    pace = min(map(median_iteration, curves))
    count = min(sum("accuracy" in line for line in curve) for curve in curves)
    points = []
    for number in range(count):
        rows = [evaluation(curve, number) for curve in curves]
        accuracy, half = common.interval([row["accuracy"] for row in rows])
        names = ("gradient_steps", "tokens", "value_tokens", "train", "kl")
        names = [k for k in names if all(k in row for row in rows)]
        point = {k: statistics.mean(row[k] for row in rows) for k in names}
        points.append(point | dict(accuracy=accuracy, half=half, seconds=pace * rows[0]["iteration"]))
    return points


def median_iteration(curve):
    """Seconds of a curve's median iteration."""
    return statistics.median(after["seconds"] - before["seconds"] for before, after in zip(curve, curve[1:]))


def evaluation(curve, number):
    """The line of one evaluation of a curve, with train and kl as `evaluations` explains them."""
    places = [i for i, line in enumerate(curve) if "accuracy" in line]
    line = curve[places[number]]
    since = curve[places[number - 1] + 1 : places[number] + 1] if number else []
    near = [other for other in curve if abs(other["iteration"] - line["iteration"]) <= 5]
    found = dict(gradient_steps=0) | line
    if since and "kl" in since[0]:
        found["kl"] = statistics.mean(other["kl"] for other in since)
    return found | {"train": statistics.mean(other["reward"] for other in near if "reward" in other)}


def column(points, name):
    return [point[name] for point in points]


def draw_costs(plt, plan, methods):
    """TASK.png: accuracy against gradient steps, tokens and seconds."""
    from matplotlib import ticker

    figure, axes = plt.subplots(1, 3, figsize=(15, 5.5), layout="constrained", sharey=True)
    panels = [
        ("gradient_steps", "gradient steps", "linear"),
        ("tokens", "generated tokens", "log"),
        ("seconds", "seconds on one core", "log"),
    ]
    dots = dict(marker="o", markersize=3, capsize=2, elinewidth=0.7)
    for axis, (name, label, scale) in zip(axes, panels):
        for method, points in methods.items():
            points = points[0 if scale == "linear" else 1 :]
            text, style = style_of(plan, method)
            x, y, half = (column(points, k) for k in (name, "accuracy", "half"))
            axis.errorbar(x, y, half, label=text, **dots, **style)
        axis.set(xlabel=label, xscale=scale)
        if scale == "log":
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy at temperature 1")
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(plan.results.with_suffix(".png"), dpi=110)


def draw_more(plt, plan, methods):
    """TASK-more.png: held-out accuracy against training accuracy, and against KL."""
    figure, (train, kl) = plt.subplots(1, 2, figsize=(10, 5.5), layout="constrained")
    for method, points in methods.items():
        points = points[1:]
        if points and "kl" in points[0]:  # not RestEM and DPO+
            text, style = style_of(plan, method)
            accuracy, dots = column(points, "accuracy"), dict(marker="o", markersize=3)
            train.plot(column(points, "train"), accuracy, label=text, **dots, **style)
            kl.plot(column(points, "kl"), accuracy, **dots, **style)
    train.axline((0.5, 0.5), slope=1, color="#bbbbbb", linewidth=1)
    train.set(xlabel="accuracy on the training problems, as they are drawn", ylabel="held-out accuracy")
    kl.set(xlabel="KL to the SFT policy, nats per response", ylabel="held-out accuracy")
    for axis in (train, kl):
        axis.grid(alpha=0.3)
    labels = train.get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(plan.results.with_name(f"{plan.task}-more.png"), dpi=110)


def table_of_methods(plan, methods, results):
    """Lines of Markdown: what each method reaches, and what it costs."""
    about = (
        "Accuracy on 500 held-out problems, twice each, mean over the seeds and its 95 % t interval."
        " Seconds: the fastest seed's median iteration on one core, two runs side by side, times the iterations."
    )
    head = ["method", "learning rate", "seeds", "accuracy at the start", "at the end"]
    rows = []
    for method, points in methods.items():
        start, end, count = points[0], points[-1], len(seeds_of(plan, method, results))
        rate = re.search(r" --learning_rate (\S+)", results[f"{method}-s0"]["command"])[1]
        name = row_name(plan, method, style_of(plan, method)[0])
        reached = common.plus_minus(end["accuracy"], end["half"], 3)
        costs = [f"{end.get(name, 0):,.0f}" for name in ("value_tokens", "tokens", "seconds")]
        rows.append([name, rate, count, f"{start['accuracy']:.3f}", reached, *costs])
    return [about, "", *common.table([*head, "value tokens", "tokens", "seconds"], rows)]


def table_of_pairs(plan, methods, results):
    """Lines of Markdown: the difference of each two methods at the end, where it is not 0.

    The difference is taken seed by seed: the RL runs of one seed draw the same problems and begin with the
    same accuracy. RestEM's and DPO+'s seeds have nothing in common with theirs, which makes the interval no
    less valid.
    """
    ends = {m: [accuracies(result)[-1] for result in seeds_of(plan, m, results)] for m in methods}
    order = sorted(methods, key=lambda m: -methods[m][-1]["accuracy"])
    about = (
        "How many points of accuracy the row's method ends above the column's, mean over the seeds that both"
        " have; empty where the 95 % t interval of the differences, seed by seed, contains 0. The best comes first."
    )
    rows = []
    for method in order:
        cells = []
        for other in order:
            gap, half = common.interval([a - b for a, b in zip(ends[method], ends[other])])
            cells.append(f"{100 * gap:+.1f}" if abs(gap) > half else "")
        rows.append([row_name(plan, method, method), *cells])
    return [about, "", *common.table(["", *order], rows)]


def table_of_search(plan, results):
    """Lines of Markdown: the accuracy of each learning rate that was searched."""
    rows = []
    for method in plan.methods:
        found = plan.searched(method, results)
        if None not in found.values():
            cells = ", ".join(f"{rate}: {value:.3f}" for rate, value in found.items())
            rows.append([row_name(plan, method, method), cells])
    about = "The search: mean of the last two evaluations over the seeds 100 and 101."
    return [about, "", *common.table(["method", "learning rates"], rows)]


def draw(plan):
    """Write pictures and tables, from the results alone, of the methods whose seeds have all ended."""
    results, methods = plan.load_results(), {}
    for method, (_, seeds) in plan.methods.items():
        curves = [common.rows_of(result["curve"]) for result in seeds_of(plan, method, results)]
        if len(curves) == seeds:
            methods[method] = evaluations(curves)
    if not methods:
        sys.exit(
            f"compare.py: {plan.results} has no method with all its runs:"
            f" first run `python experiments/compare.py {plan.task} run`"
        )
    plt = common.pyplot()
    draw_costs(plt, plan, methods)
    draw_more(plt, plan, methods)
    lines = [*table_of_methods(plan, methods, results), "", *table_of_pairs(plan, methods, results)]
    common.write_page(plan.results.with_suffix(".md"), [*lines, "", *table_of_search(plan, results)])


def main():
    parser = common.parser(__doc__)
    parser.add_argument("task", choices=METHODS)
    programs = parser.add_subparsers(dest="program", required=True, metavar="run | draw | again")
    only = "only the runs whose name matches this regular expression"
    programs.add_parser("run").add_argument("--only", default="", metavar="REGEX", help=only)
    programs.add_parser("draw")
    programs.add_parser("again").add_argument("name", metavar="NAME", help="the run that is repeated")
    a = parser.parse_args()
    if a.program == "run":
        run(Plan(a.task), a.only)
    elif a.program == "draw":
        draw(Plan(a.task))
    else:
        again(Plan(a.task), a.name)


if __name__ == "__main__":
    main()
