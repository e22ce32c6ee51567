"""VinePPO (arXiv 2410.01679): PPO for LLM reasoning whose values are measured by rollouts instead of predicted by a network.

    python train.py --dataset arithmetic --model runs/sft                  # one process, GPU or CPU; `make demo` does it all
    torchrun --nproc_per_node=2 train.py --dataset arithmetic --model runs/sft
    torchrun --nproc_per_node=8 train.py --dataset math                    # the paper's Rho-1B run on GPUs
    torchrun --nproc_per_node=8 train.py --dataset math --model realtreetune/deepseekmath-7b-sft-MATH-v2 --max_sequence 2499
    torchrun --nproc_per_node=8 train.py --dataset math --algorithm ppo    # what the paper compares with: ppo, grpo, rloo
    python train.py --dataset gsm8k --model MODEL --eval_only              # accuracy alone

Read it after this file in the order in which data flows: rollout.py (sample) -> vine.py (steps, values, advantages) -> grader.py
(rewards) -> ppo.py (the update). What differs from the paper is listed in README.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning thread teams ruin each other on few cores; read when torch is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import dataclasses
import json
import random
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

import data
import plan
import ppo
import run_folder
import vine
from baselines import credit, groups
from baselines.critic import Critic
from experiments import show
from grader import Grader
from watch import Watch

logging.disable_progress_bar()  # transformers' own bars, one a file


def setting(default, help, choices=None):
    help += "" if default is None or default is False else f" (default: {default})"
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


@dataclass
class Settings:
    # the run
    dataset: str = setting("arithmetic", "math, gsm8k, arithmetic (built in), or a path to your own file or folder")
    model: str | None = setting(
        None, "Hugging Face folder or hub name to start from; default: the paper's SFT model for math and gsm8k, runs/sft for arithmetic"
    )
    algorithm: str = setting("vineppo", "where the advantages come from; all else is the same", ["vineppo", "ppo", "grpo", "rloo"])
    run_dir: str | None = setting(None, "folder of settings.json, metrics.jsonl, checkpoints and the final model; default runs/DATASET")
    resume: bool = setting(
        False, "refuse to start anew: go on from a checkpoint in --run_dir, as the same command does by itself where there is one"
    )
    iterations: int | None = setting(None, "rounds of sampling and update")
    seed: int = setting(0, "of the problems, the sampling and the minibatches")
    # problems and prompts
    prompt_template: str | None = setting(None, "prompt text with {problem} in it; default: the paper's")
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template")
    # advantages
    K: int | None = setting(None, "vineppo: rollouts that estimate the value of each state")
    max_valued_steps: int | None = setting(None, "vineppo: states from this step on get no rollouts (25 on GSM8K; default: no cap)")
    step_credit: str | None = setting(None, "vineppo: what a step is; paper, newline, sentence, or tokens:100 for chunks of 100")
    gae_lambda: float | None = setting(None, "ppo: lambda of GAE")
    gamma: float | None = setting(None, "ppo: discount per token")
    critic_learning_rate: float | None = setting(None, "ppo: peak of the value network's; default: --learning_rate")
    # sampling
    prompts_per_iteration: int | None = setting(None, "problems drawn in each iteration, with replacement")
    responses_per_prompt: int | None = setting(None, "responses sampled for each of them")
    temperature: float | None = setting(None, "sampling temperature of responses and rollouts; the trainer divides its logits by it too")
    top_p: float | None = setting(None, "nucleus of responses and rollouts")
    max_tokens: int | None = setting(None, "token limit of a response; a rollout may use what its state has left of it")
    max_sequence: int | None = setting(None, "token limit of prompt and response together; longer prompts are skipped and counted")
    stop: str | None = setting(None, "string that ends a response, besides EOS")
    # the update
    learning_rate: float | None = setting(None, "peak; 3 percent linear warm-up, then linear decay to 0")
    minibatch: int | None = setting(None, "responses per optimizer step, over all ranks")
    micro_batch_tokens: int | None = setting(None, "tokens per forward pass of a rank; changes memory and speed, not the result")
    epochs: int = setting(2, "passes over an iteration's responses")
    clip: float = setting(0.2, "range of the probability ratio, 1 - clip .. 1 + clip")
    kl_coef: float = setting(1e-4, "weight of the KL penalty to the initial policy")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    # evaluation and saving
    eval_every: int | None = setting(None, "iterations between evaluations; 0: never")
    eval_only: bool = setting(False, "evaluate --model on the test problems and exit")
    eval_problems: int | None = setting(None, "the first so many test problems; default: all of them")
    eval_samples: int | None = setting(None, "responses per test problem; accuracy is their mean")
    eval_temperature: float | None = setting(None, "sampling temperature of evaluations")
    eval_top_p: float | None = setting(None, "nucleus of evaluations")
    save_every: int | None = setting(None, "iterations between checkpoints; 0: only the final model")
    keep_checkpoints: int = setting(2, "the newest so many stay, each with the state to resume from; 0: all")
    store_every: int | None = setting(None, "iterations between stored responses and rollouts, for experiments/show.py; 0: never")
    report_to: str = setting("none", "also send the metrics to", ["none", "tensorboard", "wandb"])
    # the machine
    bfloat16: bool | None = setting(None, "compute in bfloat16, weights and optimizer in float32; default: on GPUs only")
    activation_checkpointing: bool | None = setting(None, "recompute activations in the backward pass: less memory, a third more time")
    hybrid_sharding: bool = setting(False, "several machines: shard the trainer within each, replicate it across")
    tensor_parallel_size: int = setting(1, "so many ranks of a machine share one engine's model")
    hang_timeout: float = setting(90.0, "seconds without a sign of progress after which a rank is taken to hang and the run ends")
    max_logprob_gap: float | None = setting(
        None, "engine and trainer disagree above this mean difference of log-probabilities; default: 0.001, in bfloat16 0.05"
    )
    strict: bool = setting(False, "stop when engine and trainer disagree, instead of a warning")
    trust_remote_code: bool = setting(False, "let a hub model run code of its own")
    plan: int | None = setting(None, "print what each GPU needs if there are so many, 8 to a machine, and exit")
    gpu_memory: float = setting(0.6, "share of each GPU for the engine's weights and KV cache while it samples")
    max_sequences: int | None = setting(None, "responses that an engine writes at a time; default: vLLM's for the device")
    grader_workers: int = setting(2, "processes per rank that compare symbolic answers")


PAPER = dict(  # Rho-1B on MATH; arXiv 2410.01679 and the released configs (rho1b, deepseekmath7b)
    model="realtreetune/rho-1b-sft-MATH", iterations=1000, prompts_per_iteration=64, responses_per_prompt=8, K=9, step_credit="paper", gae_lambda=1.0, gamma=1.0, temperature=0.6, top_p=0.9, max_tokens=1024,
    max_sequence=2048, stop="\n\n\nProblem:", learning_rate=1e-6, minibatch=64, micro_batch_tokens=8192, eval_every=25, eval_samples=16,
    eval_temperature=0.35, eval_top_p=0.9, save_every=50, store_every=50, activation_checkpointing=True,
)  # fmt: skip
OWN_SETTINGS = dict(
    vineppo=("K", "max_valued_steps", "step_credit"), ppo=("gae_lambda", "gamma", "critic_learning_rate")
)  # of one algorithm
DEFAULTS = {
    "math": PAPER,
    "gsm8k": PAPER | dict(model="realtreetune/rho-1b-sft-GSM8K", iterations=650, max_valued_steps=25),
    "arithmetic": PAPER | dict(
        model="runs/sft", iterations=80, prompts_per_iteration=32, responses_per_prompt=2, K=4, temperature=1.0, top_p=1.0, max_tokens=128, max_sequence=160, stop=None,
        learning_rate=1e-4, minibatch=32, micro_batch_tokens=4096, eval_every=20, eval_samples=2, eval_temperature=1.0, eval_top_p=1.0,
        save_every=40, store_every=20, activation_checkpointing=False,
    ),
}  # fmt: skip


def parse_settings(argv):
    """Settings of a command line; what it leaves open comes from DEFAULTS, for a path of one's own from the paper's MATH settings."""
    table = "".join(
        f"  --{name:24}" + "".join(f"{str(DEFAULTS[d].get(name))!r:>32}" for d in DEFAULTS) + "\n" for name in DEFAULTS["gsm8k"]
    )
    parser = HfArgumentParser(
        Settings,
        description=__doc__,
        epilog=f"defaults by --dataset:     {''.join(f'{d:>32}' for d in DEFAULTS)}\n{table}your own data: as math, with a --model of your own",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    (settings,) = parser.parse_args_into_dataclasses(argv)
    if settings.eval_only and any(x is not None for x in (settings.iterations, settings.eval_every, settings.save_every)):
        raise ValueError("--eval_only trains nothing: leave out --iterations, --eval_every and --save_every")
    for algorithm, names in OWN_SETTINGS.items():
        for name in names if algorithm != settings.algorithm else ():
            if getattr(settings, name) is not None:
                raise ValueError(f"--{name} does nothing with --algorithm {settings.algorithm}: it belongs to {algorithm}")
    for name, value in DEFAULTS.get(settings.dataset, PAPER).items():
        if getattr(settings, name) is None and not (name == "model" and settings.dataset not in DEFAULTS):
            setattr(settings, name, value)
    settings.run_dir = settings.run_dir or f"runs/{Path(settings.dataset).resolve().stem or 'data'}"
    return settings


def need(condition, message):
    if not condition:
        raise ValueError(message)


def check_ranges(s):
    """Raise ValueError for a setting that is out of its range by itself. Also for the baselines' settings: names that they lack are passed over."""
    positive = (
        "prompts_per_iteration responses_per_prompt K max_valued_steps max_tokens minibatch micro_batch micro_batch_tokens tensor_parallel_size eval_problems eval_samples "
        "max_sequences plan grader_workers rounds problems_per_round cap batch"
    )
    for names, fits, words in (
        (positive, lambda v: v >= 1, "must be at least 1"),
        (
            "eval_every save_every store_every keep_checkpoints clip kl_coef eval_temperature beta penalty",
            lambda v: v >= 0,
            "must not be negative",
        ),
        ("epochs temperature learning_rate critic_learning_rate hang_timeout max_logprob_gap", lambda v: v > 0, "must be above 0"),
        ("gae_lambda gamma", lambda v: 0 <= v <= 1, "must be between 0 and 1"),
        ("top_p eval_top_p gpu_memory", lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    ):
        for name in names.split():
            value = getattr(s, name, None)
            need(value is None or fits(value), f"--{name} {value} {words}")
    need(s.eval_temperature > 0 or s.eval_samples == 1, "--eval_temperature 0 gives one and the same response: add --eval_samples 1")
    need(s.max_tokens < s.max_sequence, f"--max_tokens {s.max_tokens} leaves no room for a prompt in --max_sequence {s.max_sequence}")


def check(s, world):
    """Raise ValueError for settings that cannot work on `world` ranks, before anything is loaded."""
    check_ranges(s)
    credit.check(s.step_credit)
    need(
        s.responses_per_prompt > 1 or s.algorithm not in ("grpo", "rloo"),
        f"--algorithm {s.algorithm} compares the responses to a problem: --responses_per_prompt {s.responses_per_prompt} must be at least 2",
    )
    need(s.eval_only or s.iterations >= 1, f"--iterations {s.iterations} trains nothing: take at least 1, or --eval_only to evaluate alone")
    need(not (s.eval_only and s.resume), "--eval_only and --resume exclude each other: name the checkpoint's folder with --model")
    need(
        s.prompts_per_iteration % world == 0,
        f"--prompts_per_iteration {s.prompts_per_iteration} does not divide over {world} ranks: take a multiple of {world}",
    )
    need(s.minibatch % world == 0, f"--minibatch {s.minibatch} does not divide over {world} ranks: take a multiple of {world}")
    episodes = s.prompts_per_iteration * s.responses_per_prompt
    need(
        episodes % s.minibatch == 0,
        f"--minibatch {s.minibatch} does not divide the iteration's {episodes} responses (prompts_per_iteration x responses_per_prompt)",
    )
    need(
        world % s.tensor_parallel_size == 0,
        f"--tensor_parallel_size {s.tensor_parallel_size} does not divide the {world} ranks: take a divisor of them",
    )
    if s.report_to != "none":
        try:
            __import__({"tensorboard": "tensorboard", "wandb": "wandb"}[s.report_to])
        except ImportError:
            raise ValueError(f"--report_to {s.report_to}: the package is not installed (pip install {s.report_to})") from None


def load_tokenizer(s):
    """The tokenizer of --model; raises ValueError where there is no such model, or one that is too short."""
    if not s.model:
        raise ValueError(f"--model is missing: --dataset {s.dataset} has no model of its own")
    try:
        trust = getattr(s, "trust_remote_code", False)  # the baselines have no such setting
        limit = getattr(AutoConfig.from_pretrained(s.model, trust_remote_code=trust), "max_position_embeddings", None)
        tokenizer = AutoTokenizer.from_pretrained(s.model, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        hint = "run `python sft.py` first, or " if s.model == DEFAULTS["arithmetic"]["model"] else ""
        reason = str(error).split("\n")[0]
        raise ValueError(f"--model {s.model} cannot be loaded: {hint}name a Hugging Face folder or hub model ({reason})") from None
    if Path(s.model).is_dir() and not list(Path(s.model).glob("*.safetensors")):
        raise ValueError(f"--model {s.model} has no weights in safetensors files: others are pickles, which can run code, and are not read")
    if limit and s.max_sequence > limit:
        raise ValueError(f"--max_sequence {s.max_sequence} is more than the {limit} positions of --model {s.model}")
    return tokenizer


MAY_CHANGE = [  # settings that may change in the middle of a run: of the machine, and of what is evaluated, saved and said
    "run_dir", "resume", "report_to", "micro_batch_tokens", "hybrid_sharding", "tensor_parallel_size", "hang_timeout", "max_logprob_gap", "strict",
    "trust_remote_code", "activation_checkpointing", "gpu_memory", "max_sequences", "grader_workers", "plan", "keep_checkpoints",
]  # fmt: skip


def start_of(s, run):
    """(iterations done, checkpoint folder or None, the settings that changed) of what the run folder holds of this run.

    Raises ValueError if it holds another run, or nothing that --resume could go on from. A run that was killed before its first checkpoint
    starts again.
    """
    done, folder = run_folder.newest_checkpoint(run)
    if s.resume and not folder:
        raise ValueError(f"--resume: {run} holds no checkpoint (--save_every writes them)")
    known = folder / "state" / "settings.json" if folder else run / "settings.json"
    if not known.exists():
        return 0, None, []
    before = json.loads(known.read_text())
    changed = {name: value for name, value in dataclasses.asdict(s).items() if name in before and before[name] != value}
    told = lambda names: "; ".join(f"--{name} was {before[name]}, now {changed[name]}" for name in names)
    fixed = [name for name in changed if name not in MAY_CHANGE and not name.startswith(("eval_", "save_", "store_"))]
    if fixed:
        raise ValueError(f"--run_dir {run} holds a run with other settings: {told(fixed)}: name another folder, or take them back")
    return done, folder, [told([name]) for name in changed if name not in ("run_dir", "resume")]


# --- one iteration --------------------------------------------------------------------------------------------------------------


def sample_responses(engine, grader, batch, s, values=None):
    """Responses to the (Problem, prompt ids) of this rank: one dict each, with its text and reward R in {0, 1}.

    values: a Values, which is given each response as soon as it ends, while longer ones are still being written.
    """
    episodes = [
        dict(prompt=problem.prompt, answer=problem.answer, prompt_ids=ids) for problem, ids in batch for _ in range(s.responses_per_prompt)
    ]
    for i, e in enumerate(episodes):
        engine.submit(("response", i), e["prompt_ids"], 1, s.max_tokens, s.temperature, s.top_p, logprobs=True)
    missing = len(episodes)
    while missing:
        for (kind, what), completions in engine.step():  # what: the episode's number, or the state
            if kind == "rollouts":
                values.take(what, completions)
                continue
            e, (c,) = episodes[what], completions
            e |= dict(response_ids=c.token_ids, text=engine.text(c.token_ids), finished=c.finished, engine_logprobs=c.logprobs)
            missing -= 1
            if values:
                values.begin(e)
        if values:
            values.submit()
    for episode, reward in zip(episodes, rewards(grader, episodes)):
        episode["reward"] = reward
    return episodes


def rewards(grader, responses):
    """1.0 for a finished response whose answer is right, else 0.0. responses: dicts with text, finished and answer."""
    return [float(x) for x in grader.grade(*to_grade(responses))]


class Values:
    """VinePPO's Monte Carlo values of an iteration, each from K rollouts, which may begin as soon as the response ends that the state belongs to.

    A state is sent to the engine as the very token ids that were sampled up to it; the rollouts serve its value alone. States for which the
    engine has no room wait here, so that spread() can deal them to ranks whose problems are shorter.
    """

    def __init__(self, engine, grader, s):
        self.engine, self.grader, self.s = engine, grader, s
        self.numbers = {}  # (prompt ids, prefix ids) -> number of a state of this rank's responses
        self.waiting = deque()  # states, also other ranks': dicts as begin makes them
        self.rollouts = []  # dicts as take makes them

    def begin(self, e):
        """Queue the states of a response, an episode of sample_responses, but for those that are known already."""
        s, engine, known = self.s, self.engine, len(self.numbers)
        e["boundaries"] = credit.token_boundaries(s.step_credit, e["text"], e["response_ids"], engine.decode)
        e["states"] = vine.number_states(self.numbers, e["prompt_ids"], e["response_ids"], e["boundaries"], s.max_valued_steps)
        for i, cut in zip(e["states"], e["boundaries"]):
            if i is not None and i >= known:
                state = dict(
                    number=i, group=engine.group, prompt_ids=e["prompt_ids"], prefix=e["response_ids"][:cut], answer=e["answer"],
                    left=len(e["response_ids"]) - cut,  # tokens of the response behind the state
                )  # fmt: skip
                self.waiting.append(state)

    def submit(self):
        """Send the engine as many of the states that wait as it has room for. After each of its steps."""
        s = self.s
        while self.waiting and self.engine.has_room():
            state = self.waiting.popleft()
            limit = s.max_tokens - len(state["prefix"])  # what the state leaves of the response's token limit
            self.engine.submit(("rollouts", state), state["prompt_ids"] + state["prefix"], s.K, limit, s.temperature, s.top_p)

    def take(self, state, completions):
        """The K rollouts from a state. Their grading begins."""
        prefix = state["prefix"]
        new = [
            dict(
                text=self.engine.text(prefix + c.token_ids), finished=c.finished or self.engine.stops(prefix + c.token_ids),
                answer=state["answer"], state=state["number"], group=state["group"], tokens=len(c.token_ids),
            )
            for c in completions
        ]  # fmt: skip
        self.rollouts += new
        self.grader.start(*to_grade(new))

    def spread(self):
        """Once all ranks have their responses: deal the states that wait so that all engines have equally much to do. All ranks call it.

        The rollouts from a state are taken to be as long as what its own response has behind it.
        """
        under_way = sum(state["left"] for (_, state), _ in self.engine.running.values())
        groups = over_ranks([(under_way, list(self.waiting))] if self.engine.leads else [])
        self.waiting = deque(even_out(*zip(*groups), lambda state: state["left"])[self.engine.group])

    def wait(self):
        """Until the rollouts have ended and are graded."""
        self.submit()
        while self.engine.running:
            for (_, state), completions in self.engine.step():
                self.take(state, completions)
            self.submit()
        for r, reward in zip(self.rollouts, rewards(self.grader, self.rollouts)):
            r["reward"] = reward

    def set_advantages(self, episodes):
        """After wait, on all ranks. Returns the values of this rank's states and what they cost, and the rollouts for show.py."""
        group, by_state = self.engine.group, [[] for _ in self.numbers]
        dealt = over_ranks([r for r in self.rollouts if r["group"] != group] if self.engine.leads else [])
        rollouts = [r for r in self.rollouts + dealt if r["group"] == group]
        for r in rollouts:
            by_state[r["state"]].append(r["reward"])
        values = vine.monte_carlo_values(by_state)
        for e in episodes:
            e["values"] = [None if i is None else values[i] for i in e["states"]]
            e["advantages"] = vine.token_advantages(e["boundaries"], vine.step_advantages(e["values"], e["reward"]))
        return dict(values=values, tokens=sum(r["tokens"] for r in rollouts), rollouts=rollouts)


def even_out(loads, queues, cost):
    """Move items from queues of those who have too much to do to those who have too little, until all have equally much: the new queues.

    loads: the cost of what each has begun already; queues: a list of items for each; cost(item): an int of at least 1. Neighbours in a queue,
    which share a prefix, mostly stay together.
    """
    queues, moved = [list(queue) for queue in queues], []
    loads = [load + sum(map(cost, queue)) for load, queue in zip(loads, queues)]
    mean = sum(loads) / len(loads)
    for i, queue in enumerate(queues):
        while queue and loads[i] - cost(queue[-1]) >= mean:
            loads[i] -= cost(queue[-1])
            moved.append(queue.pop())
    for i, queue in enumerate(queues):
        while moved and loads[i] < mean:
            loads[i] += cost(moved[-1])
            queue.append(moved.pop())
    return queues


def to_grade(responses):
    """(texts, gold answers) for the grader; an unfinished response has no answer."""
    return [r["text"] if r["finished"] else "" for r in responses], [r["answer"] for r in responses]


def evaluate(engine, grader, problems, s, watch):
    """Accuracy on (Problem, prompt ids), the mean over eval_samples responses each; the number of responses; this rank's tokens.

    None, 0, 0 if the run is to stop; all ranks call it.
    """
    mine, responses = problems[engine.group :: engine.groups], []
    with watch.droppable():
        completions = engine.generate([ids for _, ids in mine], s.eval_samples, s.max_tokens, s.eval_temperature, s.eval_top_p)
        responses = [
            dict(text=engine.text(c.token_ids), finished=c.finished, answer=problem.answer, tokens=len(c.token_ids))
            for (problem, _), group in zip(mine, completions)
            for c in group
        ]
        graded = rewards(grader, responses)
    if watch.stopping():
        return None, 0, 0
    scores = over_ranks(graded if engine.leads else [])
    return statistics.mean(scores), len(scores), sum(r["tokens"] for r in responses) * engine.leads


def over_ranks(items):
    """The ranks' lists, concatenated."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


class Phases:
    """Wall-clock seconds of the phases of an iteration; says so on screen when one takes long."""

    LONG = 120  # seconds

    def __init__(self, watch):
        self.seconds, self.watch = {}, watch

    @contextmanager
    def __call__(self, name):
        start = time.perf_counter()
        notice = threading.Timer(self.LONG, lambda: dist.get_rank() == 0 and tqdm.write(f"{name} takes longer than {self.LONG} s"))
        notice.daemon = True
        notice.start()
        try:
            with self.watch.phase(name):
                yield
        finally:
            notice.cancel()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


# --- the run --------------------------------------------------------------------------------------------------------------------


def reporter(s, run, done):
    """A function (iteration, metrics) that sends metrics to Weights & Biases or TensorBoard, where asked for. done: iterations so far."""
    if s.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run, purge_step=done + 1)
        return lambda iteration, metrics: [writer.add_scalar(name, value, iteration) for name, value in metrics.items()]
    if s.report_to == "wandb":
        import wandb

        wandb.init(project="vineppo", name=run.name, config=dataclasses.asdict(s))
        return lambda iteration, metrics: wandb.log(metrics, step=iteration)
    return lambda iteration, metrics: None


def main():
    first = os.environ.get("RANK", "0") == "0"
    try:
        s = parse_settings(sys.argv[1:])
        check(s, s.plan or int(os.environ.get("WORLD_SIZE", 1)))
        if s.plan:
            config = AutoConfig.from_pretrained(s.model, trust_remote_code=s.trust_remote_code)
            text, fits = plan.report(config, s, s.plan, min(s.plan, 8))
            print(text)
            sys.exit(not fits)
        run, start = Path(s.run_dir), (0, None, [])
        if not s.eval_only:
            start = start_of(s, run)
            if run_folder.whole(run / "model"):
                return print(f"{run} is finished: its model is {run / 'model'}; name another --run_dir for a new run") if first else None
        problems = data.load(s.dataset, s.prompt_template, s.chat)
        tokenizer = load_tokenizer(s)
        (train, too_long), (test, test_too_long) = [data.encode(p, tokenizer, s.max_sequence - s.max_tokens, s.chat) for p in problems]
        if not train or not test:
            raise ValueError(f"every prompt is longer than --max_sequence - --max_tokens = {s.max_sequence - s.max_tokens} tokens")
        lock, lines = None, []
        if first and not s.eval_only:
            lock = run_folder.lock(run)
            start = start_of(s, run)  # once more: a run that was ending may have saved since
            lines = run_folder.read_metrics(run, start[0])
    except (ValueError, OSError) as error:
        ppo.refuse(f"train.py: {error}")
    if too_long + test_too_long and first:
        print(f"skipped {too_long + test_too_long} problems: their prompts are longer than --max_sequence - --max_tokens")
    device = ppo.init_distributed()
    found = [start, lines]
    dist.broadcast_object_list(found)  # as rank 0 saw them
    start, lines = found
    with Watch(s.hang_timeout, s.tensor_parallel_size) as watch:
        code = train_run(s, run, start, lines, tokenizer, train, test[: s.eval_problems], device, watch)
    if lock:
        lock.close()
    sys.exit(code)


def train_run(s, run, start, lines, tokenizer, train, test, device, watch):
    """The run from `start` (see start_of) with the metrics `lines` so far. Returns the exit code."""
    from rollout import Engine  # after the checks: importing vLLM takes seconds

    rank, world = dist.get_rank(), dist.get_world_size()
    say = tqdm.write if rank == 0 else lambda *_: None
    engine = Engine(
        s.model, max_sequence=s.max_sequence, stop=[s.stop] if s.stop else [], bfloat16=s.bfloat16, gpu_memory=s.gpu_memory,
        max_sequences=s.max_sequences, tensor_parallel=s.tensor_parallel_size, trust_remote_code=s.trust_remote_code, on_step=watch.step,
    )  # fmt: skip
    grader = Grader(s.grader_workers, on_graded=watch.beat)
    if s.eval_only:
        engine.seed(s.seed)
        accuracy, samples, _ = evaluate(engine, grader, test, s, watch)
        if accuracy is not None:
            say(
                f"accuracy {accuracy:.4f} ({len(test)} problems, {samples} responses, temperature {s.eval_temperature}, top_p {s.eval_top_p})"
            )
        if watch.error:
            raise watch.error
        return watch.exit_code() + shut_down(engine, grader, watch)

    engine.sleep()
    episodes_per_iteration = s.prompts_per_iteration * s.responses_per_prompt
    learner = dict(
        total_steps=s.iterations * s.epochs * (episodes_per_iteration // s.minibatch), minibatch=s.minibatch, micro_batch_tokens=s.micro_batch_tokens,
        epochs=s.epochs, max_grad_norm=s.max_grad_norm, bfloat16=s.bfloat16, checkpoint_activations=s.activation_checkpointing, hybrid=s.hybrid_sharding,
        seed=s.seed, trust_remote_code=s.trust_remote_code,
    )  # fmt: skip
    trainer = ppo.Trainer(
        s.model, device, learning_rate=s.learning_rate, clip=s.clip, kl_coef=s.kl_coef, temperature=s.temperature,
        whiten_advantages=s.algorithm in ("vineppo", "ppo"), **learner,
    )  # fmt: skip
    critic = None
    if s.algorithm == "ppo":
        critic = Critic(
            s.model, device, learning_rate=s.critic_learning_rate or s.learning_rate, gamma=s.gamma, gae_lambda=s.gae_lambda, **learner
        )
    for network in filter(None, (trainer.model, trainer.reference, critic and critic.model)):
        for module in network.modules():
            if isinstance(module, FSDPModule):  # each layer is a sign of progress
                module.register_forward_pre_hook(lambda *_: watch.beat())
    set_advantages = {
        "vineppo": lambda episodes: values.set_advantages(episodes),
        "ppo": lambda episodes: critic.set_advantages(episodes),
        "grpo": lambda episodes: groups.set_advantages(episodes, groups.grpo, s.responses_per_prompt),
        "rloo": lambda episodes: groups.set_advantages(episodes, groups.rloo, s.responses_per_prompt),
    }[s.algorithm]
    done, folder, changed = start
    if folder:
        trainer.load(folder / "state" / "policy")
        if critic:
            critic.load(folder / "state" / "critic")
        say("; ".join([f"goes on after iteration {done} of {folder}", *changed]))

    def save():
        """checkpoints/`done`."""

        def write(draft):
            trainer.save(draft / "state" / "policy")
            if critic:
                critic.save(draft / "state" / "critic")
            ppo.save_pretrained(trainer.model, tokenizer, draft, trainer.compute_dtype)
            if rank == 0:
                run_folder.write_text(draft / "state" / "settings.json", settings)

        run_folder.write_checkpoint(run, done, write, s.keep_checkpoints)

    engine.load_weights(watch.each(ppo.full_tensors(trainer.model)))
    settings = json.dumps(dataclasses.asdict(s), indent=1) + "\n"
    report = reporter(s, run, done) if rank == 0 else None
    stopped, saved, warned, accuracy = False, done, False, None
    watch.graceful = True
    if s.eval_every and (done % s.eval_every == 0 or done == s.iterations) and "accuracy" not in (lines[-1] if lines else {}):
        # before training, or where the run was stopped in the middle of an evaluation
        engine.seed(s.seed, done, 1)
        with watch.phase("evaluate"):
            accuracy, _, _ = evaluate(engine, grader, test, s, watch)
        stopped = accuracy is None
        if not stopped:
            lines = [*lines[:-1], (lines[-1] if done else {"iteration": 0}) | {"accuracy": rounded(accuracy)}]
            say(f"accuracy before training {accuracy:.3f}" if not done else f"accuracy {accuracy:.3f}")
    if rank == 0:
        run_folder.write_text(run / "settings.json", settings)
        log = run_folder.open_metrics(run, lines)
        if lines and accuracy is not None:
            report(done, {"accuracy": accuracy})

    progress = tqdm(range(done, s.iterations), initial=done, total=s.iterations, disable=rank != 0, unit="it", dynamic_ncols=True)
    for iteration in progress if not stopped else ():
        phases, cache, aborted = Phases(watch), engine.prefix_cache_counts(), engine.aborted
        values = Values(engine, grader, s) if s.algorithm == "vineppo" else None
        grader.counts = dict.fromkeys(grader.counts, 0)
        engine.seed(s.seed, iteration)
        drawn = random.Random(s.seed * 1_000_003 + iteration).choices(train, k=s.prompts_per_iteration)  # with replacement, as the paper
        with watch.droppable(), phases("sample"):
            episodes = sample_responses(engine, grader, drawn[engine.group :: engine.groups], s, values)
        if stopped := watch.stopping():
            break  # these responses are sampled again when the run goes on
        if values:
            with phases("values"):
                values.spread()
            with watch.droppable(), phases("values"):
                values.wait()
            if stopped := watch.stopping():
                break
        share = episodes_per_iteration // world
        episodes = episodes[rank % s.tensor_parallel_size * share :][:share]  # ranks that share an engine share its responses out
        if critic:
            engine.sleep()  # the network takes its turn on the GPU
        with phases("values"):
            vined = set_advantages(episodes)
        tokens = dict(sample=sum(len(e["response_ids"]) for e in episodes), values=vined["tokens"] if vined and engine.leads else 0)
        tokens["train"] = s.epochs * (tokens["sample"] + sum(len(e["prompt_ids"]) for e in episodes))
        cache = [after - before for after, before in zip(engine.prefix_cache_counts(), cache)]
        engine.sleep()
        with phases("train"):
            update = trainer.update(episodes) | (critic.update(episodes) if critic else {})
        warned = check_update(update, s, trainer.compute_dtype, say, warned)
        with phases("sync"):
            engine.load_weights(watch.each(ppo.full_tensors(trainer.model)))
        if s.store_every and (iteration == 0 or (iteration + 1) % s.store_every == 0):
            solutions = over_ranks(show.record(episodes, vined and vined["rollouts"], engine.decode))
            if rank == 0:
                show.write(run / "episodes" / f"{iteration + 1:06}.jsonl.gz", solutions)
        done = iteration + 1
        if s.eval_every and (done % s.eval_every == 0 or done == s.iterations):
            engine.seed(s.seed, done, 1)
            with phases("evaluate"):
                measured, _, tokens["evaluate"] = evaluate(engine, grader, test, s, watch)
            stopped = measured is None
            if not stopped:
                accuracy = update["accuracy"] = measured

        rollouts = (vined, grader.counts, cache, engine.aborted - aborted) if engine.leads else None
        metrics = iteration_metrics(done, episodes, rollouts, update, phases.seconds, tokens)
        if metrics["aborted"]:
            say(f"iteration {done}: the engine gave up {metrics['aborted']} responses or rollouts; they count as unfinished")
        if rank == 0:
            log.write(json.dumps({name: rounded(value) for name, value in metrics.items()}) + "\n")
            report(done, metrics)
        progress.set_postfix(
            reward=f"{metrics['reward']:.2f}", acc="-" if accuracy is None else f"{accuracy:.3f}", kl=f"{metrics['kl']:.3f}",
            tok_s=f"{metrics['tokens_per_second']:.0f}",
        )  # fmt: skip
        if s.save_every and done % s.save_every == 0:
            save()
            saved = done
        if stopped:
            break
    progress.close()
    if stopped:
        if done > saved:
            save()
        say(f"stopped after iteration {done}; the same command goes on from there" if done else "stopped; there was nothing to save yet")
        if watch.error:
            raise watch.error
        return watch.exit_code() + shut_down(engine, grader, watch)
    run_folder.write_folder(run / "model", lambda draft: ppo.save_pretrained(trainer.model, tokenizer, draft, trainer.compute_dtype))
    say(f"wrote {run / 'model'}" + ("" if accuracy is None else f"; accuracy {accuracy:.3f}"))
    return shut_down(engine, grader, watch)


def rounded(value):
    """A float to six digits for metrics.jsonl, None if it is not finite: JSON has no such numbers."""
    return value if not isinstance(value, float) else float(f"{value:.6g}") if abs(value) < float("inf") else None


def check_update(update, s, dtype, say, warned):
    """Say what is wrong with an update's metrics; raises RuntimeError with --strict. Returns whether the gap was told of by now."""
    for name in ("skipped_steps", "critic_skipped_steps"):
        if update.get(name):
            say(f"{update[name]} {name.replace('_', ' ')}: a loss or gradient was not finite, or the mean ratio was too large")
    limit = s.max_logprob_gap or (0.05 if dtype == torch.bfloat16 else 0.001)
    if not update["logprob_gap"] <= limit:
        text = (
            f"ENGINE AND TRAINER DISAGREE: their log-probabilities of the sampled tokens differ by {update['logprob_gap']:.2g} on average, "
            f"more than {limit:g} (--max_logprob_gap). Likely causes: the new weights did not reach the engine; cached prefixes of older weights; "
            "an architecture that vLLM and transformers compute differently (attention window, rope scaling); low-precision kernels."
        )
        if s.strict:
            raise RuntimeError(text)
        if not warned:
            say(text)
        return True
    return warned


def iteration_metrics(iteration, episodes, rollouts, update, seconds, tokens):
    """One line of metrics.jsonl, over all ranks; every rank calls it. rollouts: None on a rank whose engine is counted by another."""
    episodes = over_ranks([{k: e.get(k) for k in ("reward", "finished", "advantages", "states")} for e in episodes])
    vined, *others = rollouts or (None,)
    vined = vined and vined | dict(rollouts=len(vined["rollouts"]))
    vineds, counts, caches, aborted = zip(*over_ranks([(vined, *others)] if rollouts else []))
    ranks, tokens = zip(*over_ranks([(seconds, tokens)]))
    mean = lambda values: statistics.mean(values) if (values := list(values)) else 0.0
    advantages = [a for e in episodes for a in e["advantages"]]
    busy = [rank["sample"] + rank["values"] for rank in ranks]
    seconds = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    tokens = {name: sum(rank[name] for rank in tokens) for name in tokens[0]}
    metrics = dict(
        iteration=iteration,
        reward=mean(e["reward"] for e in episodes),
        unfinished=mean(not e["finished"] for e in episodes),
        aborted=sum(aborted),
        zero_advantages=mean(a == 0 for a in advantages),  # share of the action tokens
        prefix_cache_hit_rate=sum(found for _, found in caches) / max(1, sum(looked_up for looked_up, _ in caches)),  # of prompt tokens
        tokens_per_second=(tokens["sample"] + tokens["values"]) / (seconds["sample"] + seconds["values"]),
        idle=1 - mean(busy) / (seconds["sample"] + seconds["values"]),  # share of the rollouts' time that a rank waits for the slowest
    )
    if vineds[0]:
        values = [v for rank in vineds for v in rank["values"]]
        metrics |= dict(
            steps_per_response=mean(len(e["states"]) for e in episodes),
            states=len(values),
            rollouts=sum(rank["rollouts"] for rank in vineds),
            value_mean=mean(values),
            value_std=statistics.pstdev(values) if values else 0.0,
        )
    return (
        metrics
        | update
        | {f"seconds_{name}": value for name, value in seconds.items()}  # of the slowest rank
        | {f"tokens_{name}": value for name, value in tokens.items()}
        | {f"answers_{name}": sum(rank[name] for rank in counts) for name in counts[0]}
    )


def shut_down(engine, grader, watch):
    """End what the run started, on all ranks together. Returns 0."""
    watch.close()
    grader.close()
    dist.barrier()
    engine.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    main()
