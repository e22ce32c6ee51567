"""The comparison: VinePPO, PPO, GRPO, RLOO, RestEM and DPO+ on the arithmetic task, from one SFT policy.

    python experiments/compare.py run          # every run that has no result yet, one process a core; stop it and start it at will
    python experiments/compare.py run --only 'rloo.*'
    python experiments/compare.py draw         # pictures and tables from the results alone

`make compare` does both, after sft.py. A finished run leaves experiments/results/compare/NAME.json: its curve, settings, and the commit that made
it. First comes a search for each method's learning rate, on seeds of its own, three values for every method; then the seeds that count.
All RL methods draw 16 responses per iteration (4 problems x 4), make 4 optimizer steps of 8 responses with them, 40 times, and differ in nothing
but the advantages. The controls give GRPO and RLOO more responses: 96 per iteration cost about the seconds of VinePPO's K = 9, 256 about its
generated tokens. All sample at temperature 1, in training and in evaluation (the first 400 held-out problems, once each).
"""

import hashlib
import json
import multiprocessing.connection
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, RUNS, MODEL = ROOT / "experiments" / "results" / "compare", ROOT / "runs" / "compare", ROOT / "runs" / "sft"

SEEDS, SEARCH_SEEDS = range(5), (100, 101)
RL = "train.py --iterations 40 --prompts_per_iteration 4 --responses_per_prompt 4 --minibatch 8 --save_every 20 --eval_every 10"
MORE_96 = " --prompts_per_iteration 12 --responses_per_prompt 8 --minibatch 48"  # as many optimizer steps
MORE_256 = " --prompts_per_iteration 32 --responses_per_prompt 8 --minibatch 128"
ROUNDS = " --rounds 3 --problems_per_round 256 --responses_per_prompt 4 --batch 32"
EVAL = " --eval_problems 400 --eval_samples 1"
LR, LR_RESTEM, LR_DPO = ("2e-5", "5e-5", "1e-4"), ("1e-4", "3e-4", "1e-3"), ("3e-5", "1e-4", "3e-4")
METHODS = {  # name: (command, learning rates to search, number of seeds, whose search it uses)
    "vineppo-K9": (RL + EVAL + " --K 9", LR, 5, None),
    "vineppo-K3": (RL + EVAL + " --K 3", LR, 5, None),
    "vineppo-K1": (RL + EVAL + " --K 1", LR, 5, None),
    "ppo": (RL + EVAL + " --algorithm ppo", [f"{lr}{c}" for c in ("", " --critic_learning_rate 1e-3") for lr in LR], 5, None),
    "grpo": (RL + EVAL + " --algorithm grpo", LR, 5, None),
    "rloo": (RL + EVAL + " --algorithm rloo", LR, 5, None),
    "grpo-96": (RL + EVAL + MORE_96 + " --algorithm grpo", LR, 5, None),
    "rloo-96": (RL + EVAL + MORE_96 + " --algorithm rloo", LR, 5, None),
    "restem": ("-m baselines.restem" + ROUNDS + EVAL, LR_RESTEM, 3, None),
    "dpo": ("-m baselines.dpo" + ROUNDS + EVAL, LR_DPO, 3, None),
    "grpo-256": (RL + EVAL + MORE_256 + " --algorithm grpo", LR, 3, "grpo-96"),
    "rloo-256": (RL + EVAL + MORE_256 + " --algorithm rloo", LR, 3, "rloo-96"),
    "vineppo-K3-T0.6": (RL + EVAL + " --K 3 --temperature 0.6", LR, 3, "vineppo-K3"),
    "vineppo-K3-T1.2": (RL + EVAL + " --K 3 --temperature 1.2", LR, 3, "vineppo-K3"),
    "rloo-T0.6": (RL + EVAL + " --algorithm rloo --temperature 0.6", LR, 3, "rloo"),
    "rloo-T1.2": (RL + EVAL + " --algorithm rloo --temperature 1.2", LR, 3, "rloo"),
}


# --- running ------------------------------------------------------------------------------------------------------------------------


def load_results():
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


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
    """{name: command} of the runs that have no result yet and whose learning rate is known, in the order to run them."""
    runs = {}
    for method, (command, rates, seeds, search) in METHODS.items():
        if search is None:
            for rate in rates:
                for seed in SEARCH_SEEDS:
                    runs[search_name(method, rate, seed)] = f"{command} --learning_rate {rate} --seed {seed}"
        rate = chosen_rate(method, results)
        for seed in range(seeds) if rate else ():
            runs[f"{method}-s{seed}"] = f"{command} --learning_rate {rate} --seed {seed}"
    return {name: command for name, command in runs.items() if name not in results}


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
    if not (MODEL / "model.safetensors").is_file():
        sys.exit(f"compare.py: there is no SFT policy in {MODEL}: run `python sft.py --dataset arithmetic --out runs/sft` first")
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
    running, failed = {}, set()  # running: process -> name
    while True:
        for name, command in planned(load_results()).items():
            if re.match(only, name) and name not in failed and name not in running.values() and len(running) < cores:
                print(f"{time.strftime('%H:%M:%S')} {name}: {command}", flush=True)
                process = context.Process(target=execute, args=(name, command))
                process.start()
                running[process] = name
        if not running:
            break
        ended = multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [p for p in running if p.sentinel in ended]:
            process.join()
            name = running.pop(process)
            if process.exitcode == 0:
                settings = json.loads((RUNS / name / "settings.json").read_text())
                result = dict(name=name, start=start, commit=commit, settings=settings, curve=curve_of(RUNS / name))
                draft = RESULTS / f"{name}.unfinished"
                draft.write_text(json.dumps(result).replace('{"iteration"', '\n{"iteration"') + "\n")
                draft.rename(RESULTS / f"{name}.json")
            else:
                failed.add(name)
                print(f"{name} failed; see {RUNS / name / 'log.txt'}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"compare.py: {len(failed)} runs failed; the rest is done")


def draw():
    pass


def main():
    if sys.argv[1:2] == ["run"] and len(sys.argv) in (2, 4) and sys.argv[2:3] in ([], ["--only"]):
        run(sys.argv[3] if len(sys.argv) == 4 else "")
    elif sys.argv[1:] == ["draw"]:
        draw()
    else:
        sys.exit("usage: python experiments/compare.py run [--only REGEX] | draw")


if __name__ == "__main__":
    main()
