"""The same policy trained by TRL's GRPOTrainer and by `train.py --algorithm grpo`, in turns.

    .venv/bin/pip install -r experiments/requirements-peers.txt
    .venv/bin/python experiments/peers.py --model runs/sft              # five rounds, on one core
    .venv/bin/python experiments/peers.py --draw                        # only writes the table

Both train the SFT policy on the arithmetic task's problems, with the same rewards, batches, optimizer,
schedule and number of optimizer steps. TRL generates with transformers, since its vLLM mode fails on CPU
at the first weight sync. Its loss is bnpo, the mean over the tokens of a minibatch, as ours is. Its beta
weighs the KL penalty as ours does at the mean length of the responses (docs/differences.md). Each round
trains one seed with both; they take turns in going first.

CPU and wall seconds are those of the median iteration: sampling, rewards and updates, without start,
saving and evaluation. Memory is the process's largest resident set. Accuracies are of the policies after
20 and 60 iterations, on all held-out problems twice (`train.py --eval_only`). Each round adds a line to
experiments/results/peers.jsonl, and the table goes to peers.md. A run that was stopped continues when it
is started again.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common

RESULTS = common.RESULTS / "peers.jsonl"
ITERATIONS, MEASURED_AT = 60, (20, 60)
PROMPTS, RESPONSES, MINIBATCH, EPOCHS = 16, 4, 32, 2  # of an iteration
STEPS = PROMPTS * RESPONSES // MINIBATCH * EPOCHS  # optimizer steps of an iteration
LEARNING_RATE, KL_COEF, MAX_TOKENS = 1e-4, 1e-4, 128
MEAN_LENGTH = 60  # tokens of a response; TRL's penalty is a mean over tokens, ours a sum over each response
NAMES = {"trl": "TRL's GRPOTrainer", "vineppo": "train.py --algorithm grpo"}


# --- one run, in a process of its own ---


class Clock:
    """Wall and CPU seconds of each iteration; CPU seconds are of all threads of the process."""

    def __init__(self, path):
        self.path, self.spent = path, []

    def start(self):
        self.began = perf_counter(), process_time()

    def stop(self):
        wall, cpu = self.began
        self.spent.append((perf_counter() - wall, process_time() - cpu))
        self.path.write_text(json.dumps(self.spent))


def train_with_trl(model, folder, seed):
    from transformers import TrainerCallback

    import data

    class Measure(TrainerCallback):
        """An iteration is STEPS optimizer steps; TRL samples at the first of them."""

        clock = Clock(folder / "clock.json")

        def on_step_begin(self, args, state, control, **_):
            if state.global_step % STEPS == 0:
                self.clock.start()

        def on_step_end(self, args, state, control, model=None, processing_class=None, **_):
            if state.global_step % STEPS == 0:
                self.clock.stop()
                done = state.global_step // STEPS
                if done in MEASURED_AT:
                    model.save_pretrained(folder / str(done))
                    processing_class.save_pretrained(folder / str(done))

    trainer = trl_trainer(model, data.load("arithmetic")[0], folder, seed)
    trainer.add_callback(Measure)
    trainer.train()


def trl_trainer(model, problems, folder, seed=0, **changes):
    """A GRPOTrainer that does what the settings of train_with_vineppo ask of train.py."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from grader import Grader

    grader, tokenizer = Grader(), AutoTokenizer.from_pretrained(model)

    def reward(completions, completion_ids, answer, **_):
        """1.0 for a finished response whose final answer is right."""
        ended = [tokenizer.eos_token_id in ids for ids in completion_ids]
        texts = [text if end else "" for text, end in zip(completions, ended)]
        return [float(right) for right in grader.grade(texts, answer)]

    config = dict(
        output_dir=str(folder), max_steps=ITERATIONS * STEPS, seed=seed, use_cpu=not torch.cuda.is_available(),
        bf16=False, per_device_train_batch_size=MINIBATCH, steps_per_generation=PROMPTS * RESPONSES // MINIBATCH,
        num_generations=RESPONSES, num_iterations=EPOCHS, max_completion_length=MAX_TOKENS, temperature=1.0,
        top_p=1.0, top_k=0, loss_type="bnpo", beta=KL_COEF * MEAN_LENGTH, use_bias_correction_kl=False,
        epsilon=0.2, scale_rewards="group",
        learning_rate=LEARNING_RATE, lr_scheduler_type="linear", warmup_steps=round(0.03 * ITERATIONS * STEPS),
        weight_decay=0.0, max_grad_norm=1.0, gradient_checkpointing=False, save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward,
        args=GRPOConfig(**config | changes),
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems]),
        processing_class=tokenizer,
    )


def train_with_vineppo(model, folder, seed):
    import train

    class Measured(train.Run):
        clock = Clock(folder / "clock.json")

        def iterations(self):
            for iteration in super().iterations():
                self.clock.start()
                yield iteration

        def finished(self, episodes, metrics):
            self.clock.stop()
            super().finished(episodes, metrics)
            if self.done in MEASURED_AT:
                shutil.copytree(self.folder / "checkpoints" / str(self.done), folder / str(self.done))

    train.Run = Measured
    sys.argv = ["train.py", *f"""--dataset arithmetic --algorithm grpo --model {model} --run_dir {folder / "run"}
        --seed {seed} --iterations {ITERATIONS} --prompts_per_iteration {PROMPTS}
        --responses_per_prompt {RESPONSES} --minibatch {MINIBATCH} --epochs {EPOCHS} --max_tokens {MAX_TOKENS}
        --learning_rate {LEARNING_RATE} --kl_coef {KL_COEF} --eval_every 0 --save_every 20
        --store_every 0""".split()]  # fmt: skip
    train.main()


# --- rounds ---


def run_round(model, folder, seed):
    """{name: {wall, cpu, gb, accuracy_20, accuracy_60}} of one seed."""
    found = {}
    for name in list(NAMES)[:: -1 if seed % 2 else 1]:
        place = folder / f"{name}-{seed}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        spent, peak = one_run(name, model, place, seed)
        wall, cpu = (statistics.median(column) for column in zip(*spent))
        found[name] = dict(wall=wall, cpu=cpu, gb=peak)
        for done in MEASURED_AT:
            found[name][f"accuracy_{done}"] = accuracy_of(place / str(done))
        shutil.rmtree(place)
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    return found


def one_run(name, model, place, seed):
    """(the clock's seconds, largest resident set in GB) of a run in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--model", model, "--folder", place, "--seed", seed]
    with open(place / "log.txt", "w") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment(), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"peers.py: {name} failed; see {place / 'log.txt'}")
    return json.loads((place / "clock.json").read_text()), usage.ru_maxrss / 1e6


def accuracy_of(model):
    command = [sys.executable, "train.py", "--dataset", "arithmetic", "--eval_only", "--model", str(model)]
    done = subprocess.run(command, cwd=common.ROOT, env=environment(), capture_output=True, text=True)
    found = re.search(r"accuracy (\d\.\d+)", done.stdout)
    if not found:
        sys.exit(f"peers.py: the evaluation of {model} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(found[1])


def environment():
    """The environment variables of a process on one core."""
    return os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", VLLM_CPU_KVCACHE_SPACE="1")


def run(model, rounds, folder):
    for seed in range(len(common.read(RESULTS)), rounds):
        common.append(RESULTS, run_round(model, folder, seed))


def draw():
    """Write the table: means over the rounds with their standard error; the ratios are taken in each round."""
    results = common.read(RESULTS)
    if not results:
        sys.exit(f"peers.py: there are no results in {RESULTS}: name a --model to measure")

    def cell(values, digits):
        return common.plus_minus(*common.mean_and_error(values), digits)

    labels = {"wall": "wall seconds an iteration", "cpu": "CPU seconds an iteration", "gb": "peak memory, GB"}
    labels |= {f"accuracy_{n}": f"accuracy after {n} iterations" for n in MEASURED_AT}
    rows = []
    for key, label in labels.items():
        values = {name: [r[name][key] for r in results] for name in NAMES}
        ratios = [ours / theirs for ours, theirs in zip(values["vineppo"], values["trl"])]
        rows.append([label, *(cell(values[name], 3) for name in NAMES), cell(ratios, 2)])
    table = common.table(["", *NAMES.values(), "ours over TRL's"], rows)
    about = f"{len(results)} rounds on one core, mean ± standard error."
    common.write_page(RESULTS.with_suffix(".md"), [about, "", *table])


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="the SFT policy, as `sft.py --dataset arithmetic` makes it")
    parser.add_argument("--rounds", type=int, default=5)
    folder = "folder of the runs, which is emptied"
    parser.add_argument("--folder", type=Path, default=common.ROOT / "runs" / "peers", help=folder)
    parser.add_argument("--draw", action="store_true", help="only write the table")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        programs = {"trl": train_with_trl, "vineppo": train_with_vineppo}
        return programs[a.one](a.model, a.folder, a.seed)
    if not a.draw:
        if not a.model or not (Path(a.model) / "config.json").is_file():
            sys.exit(
                f"peers.py: --model {a.model} is no model's folder: make one with sft.py --dataset arithmetic"
            )
        try:
            import trl  # noqa: F401
        except ImportError as error:
            sys.exit(f"peers.py: {error}: pip install -r experiments/requirements-peers.txt")
        run(a.model, a.rounds, a.folder)
    draw()


if __name__ == "__main__":
    main()
