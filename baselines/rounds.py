"""What RestEM and DPO+ share: rounds of sampling, training on the graded responses, and evaluating.

Sampling, grading and evaluation are the core's; restem.py and dpo.py bring the function that trains.
"""

import json
import os
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

import data
from grader import Grader
from model import compute_dtype, full_tensors, save_pretrained
from support.checks import check_temperatures
from support.metrics import Phases, evaluation_metrics
from support.pretrained import load_tokenizer
from support.ranks import check_gpus, exit_all, gather_lists, init_distributed, refuse, world_size
from support.settings import parse, setting
from support.supported import check_supported
from support.watch import Watch
from train import PRESETS


@dataclass
class Settings:
    """train.py's values for MATH where it has them; rounds, cap and learning_rate are our choice."""

    dataset: str = setting(
        "arithmetic",
        "math, gsm8k, arithmetic or worded (both built in), or a path to your own data (see data.py)",
    )
    model: str | None = setting(
        "realtreetune/rho-1b-sft-MATH", "Hugging Face folder or hub name to start from"
    )
    run_dir: str | None = setting(None, "folder that the run writes; None: runs/DATASET-METHOD")
    rounds: int = setting(3, "rounds of sampling and training", min=1)
    problems_per_round: int | None = setting(None, "training problems drawn in each round; None: all", min=1)
    responses_per_prompt: int = setting(8, "responses sampled for each of them", min=1)
    cap: int = setting(4, "most examples that a problem gives to a round", min=1)
    seed: int = setting(0, "of the problems, the sampling and the order of the examples")
    prompt_template: str | None = setting(
        None, "prompt with {problem} in it; None: the paper's", is_text=True
    )
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template")
    problem_column: str | None = setting(None, "where the problem stands; None: see docs/data.md")
    answer_column: str | None = setting(None, "where its answer does; a.b for a column in a column")
    system: str | None = setting(None, "text of the system turn, in place of the data's", is_text=True)
    chat_options: str | None = setting(None, 'JSON for the chat template: {"enable_thinking": false}')
    temperature: float = setting(0.6, "sampling temperature", above=0)
    top_p: float = setting(0.9, "nucleus of responses and evaluations", above=0, max=1)
    max_tokens: int = setting(1024, "token limit of a response", min=1)
    max_sequence: int = setting(2048, "token limit of prompt and response together", min=1)
    stop: str | None = setting("\n\n\nProblem:", "string that ends a response, besides EOS", is_text=True)
    learning_rate: float = setting(
        1e-5, "peak in each round; 3 percent linear warm-up, then decay to 0", above=0
    )
    batch: int = setting(64, "examples per optimizer step, over all ranks", min=1)
    micro_batch: int = setting(
        8, "examples per forward pass of a rank; memory and speed, not the result", min=1
    )
    epochs: float = setting(2.0, "passes over a round's examples", above=0)
    eval_problems: int | None = setting(None, "evaluate on the first N test problems; None: all", min=1)
    eval_samples: int = setting(16, "responses per test problem; accuracy is their mean", min=1)
    eval_temperature: float = setting(0.35, "sampling temperature of evaluations", min=0)
    gpu_memory: float = setting(0.6, "share of a GPU for the engine while it samples", above=0, max=1)
    max_sequences: int | None = setting(None, "responses that an engine generates at a time", min=1)
    # what an Engine asks for; no options here
    bfloat16, tensor_parallel_size, trust_remote_code = None, 1, False


def main(method, doc, settings_class, train_round):
    """The program: train_round(s, episodes, policy, device) -> (new policy, optimizer steps, metrics).

    episodes: all ranks' graded responses of the round, the same list on every rank; policy: the sharded
    policy that sampled them, None in the first round (it is s.model then).
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        check_gpus()
        world = world_size()
        s, _ = parse(settings_class, sys.argv[1:], doc, PRESETS, other=dict(model=None))
        check_temperatures(s)
        if s.batch % world:
            raise ValueError(
                f"--batch {s.batch} does not divide over {world} ranks: take a multiple of {world}"
            )
        run = Path(s.run_dir or f"runs/{Path(s.dataset).stem}-{method}")
        if (run / "metrics.jsonl").exists():
            raise ValueError(f"--run_dir {run} holds a run already: name another folder")
        splits = data.load_for(s)
        tokenizer = load_tokenizer(s)
        training, test = data.encode_splits(splits, tokenizer, s, print if first else None)
        for model in filter(None, {s.model, getattr(s, "base_model", None)}):
            ids = (p.prompt_ids for part in (training, test) for p in part)
            check_supported(model, ids, tokenizer=tokenizer)
    except (ValueError, OSError) as error:
        refuse(f"{method}: {str(error).splitlines()[0]}")
    device = init_distributed()
    with Watch() as watch:
        _rounds(s, run, tokenizer, training, test[: s.eval_problems], train_round, device, watch)
    exit_all()


def _rounds(s, run, tokenizer, training, test, train_round, device, watch):
    # after the checks: importing vLLM takes seconds
    from rollout import Engine, episodes_for, evaluate, sample, shut_down

    engine = Engine(s, watch)
    engine.seed(s.seed)
    grader = Grader()
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "settings.json").write_text(json.dumps(asdict(s), indent=1) + "\n")

    def log(line):
        if dist.get_rank() == 0:
            print(" ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
            with open(run / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    accuracy = evaluation_metrics(evaluate(engine, grader, test, s), engine.tensor_parallel)["accuracy"]
    log({"iteration": 0, "accuracy": accuracy})
    policy, gradient_steps, phase = None, 0, Phases(engine)
    for round in range(1, s.rounds + 1):
        phase.reset()
        count = min(s.problems_per_round or len(training), len(training))
        drawn = random.Random(s.seed * 1_000_003 + round).sample(training, count)
        episodes = episodes_for(engine.share(drawn), s.responses_per_prompt)
        with phase("sample"):
            sample(engine, grader, episodes, s)
        episodes = gather_lists(episodes)
        engine.sleep()
        with phase("train"):
            policy, steps, metrics = train_round(s, episodes, policy, device)
        with phase("sync"):
            engine.load_weights(full_tensors(policy))
        with phase("evaluate"):
            evaluated = evaluate(engine, grader, test, s)
        accuracy = evaluation_metrics(evaluated, engine.tensor_parallel)["accuracy"]
        gradient_steps += steps
        line = {
            "iteration": round,
            "accuracy": accuracy,
            "reward": statistics.mean(e.reward for e in episodes),
        }
        line |= {
            "gradient_steps": gradient_steps,
            "tokens_sample": sum(len(e.response_ids) for e in episodes),
        }
        log(line | metrics | {f"seconds_{name}": seconds for name, seconds in phase.seconds.items()})
    save_pretrained(policy, tokenizer, run / "model", compute_dtype(device))
    shut_down(engine, grader)


def by_problem(episodes):
    """The distinct responses of each problem: lists (right ones, wrong ones) of episodes."""
    groups = {}
    for e in episodes:
        right, wrong = groups.setdefault(tuple(e.prompt_ids), ({}, {}))
        (right if e.reward else wrong).setdefault(e.text, e)
    return [(list(right.values()), list(wrong.values())) for right, wrong in groups.values()]
