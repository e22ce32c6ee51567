"""What RestEM and DPO+ share: rounds of sampling many responses with the policy, training on the graded ones, and evaluating.

Sampling, grading and evaluation are train.py's; how a round trains is the one function that restem.py and dpo.py bring.
"""

import json
import os
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import AutoConfig, HfArgumentParser

import data
import ppo
import train
from grader import Grader
from train import setting
from watch import Watch


@dataclass
class Settings:
    dataset: str = setting("arithmetic", "math, gsm8k, arithmetic (built in), or a path to your own file or folder")
    model: str | None = setting(None, "Hugging Face folder or hub name to start from; default: the one of train.py")
    run_dir: str | None = setting(None, "folder of settings.json, metrics.jsonl and the final model; default runs/DATASET-METHOD")
    rounds: int = setting(3, "rounds of sampling and training")
    problems_per_round: int | None = setting(None, "training problems drawn in each round; default: all of them")
    responses_per_prompt: int = setting(8, "responses sampled for each of them")
    cap: int = setting(4, "most examples that a problem gives to a round")
    seed: int = setting(0, "of the problems, the sampling and the order of the examples")
    prompt_template: str | None = setting(None, "prompt text with {problem} in it; default: the paper's")
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template")
    temperature: float | None = setting(None, "sampling temperature")
    top_p: float | None = setting(None, "nucleus")
    max_tokens: int | None = setting(None, "token limit of a response")
    max_sequence: int | None = setting(None, "token limit of prompt and response together; longer prompts are skipped and counted")
    stop: str | None = setting(None, "string that ends a response, besides EOS")
    learning_rate: float = setting(1e-5, "peak in each round; 3 percent linear warm-up, then linear decay to 0")
    batch: int = setting(64, "examples per optimizer step, over all ranks")
    micro_batch: int | None = setting(None, "examples per forward pass of a rank; changes memory and speed, not the result")
    epochs: float = setting(2.0, "passes over a round's examples")
    eval_problems: int | None = setting(None, "the first so many test problems; default: all of them")
    eval_samples: int | None = setting(None, "responses per test problem; accuracy is their mean")
    eval_temperature: float | None = setting(None, "sampling temperature of evaluations")
    eval_top_p: float | None = setting(None, "nucleus of evaluations")
    bfloat16: bool | None = setting(None, "compute in bfloat16, weights and optimizer in float32; default: on GPUs only")
    activation_checkpointing: bool | None = setting(None, "recompute activations in the backward pass: less memory, a third more time")
    gpu_memory: float = setting(0.6, "share of each GPU for the engine's weights and KV cache while it samples")
    max_sequences: int | None = setting(None, "responses that a rank's engine writes at a time; default: vLLM's for the device")
    grader_workers: int = setting(2, "processes per rank that compare symbolic answers")


def main(method, doc, settings_class, train_round):
    """The program: train_round(s, episodes, policy, device) -> (the new sharded policy, optimizer steps, metrics).

    episodes: all ranks' graded responses of the round, the same list on every rank; policy: the sharded model that sampled them, None
    in the first round (it is s.model then).
    """
    try:
        (s,) = HfArgumentParser(settings_class, description=doc).parse_args_into_dataclasses()
        for name, value in train.DEFAULTS.get(s.dataset, train.PAPER).items():
            if getattr(s, name, 0) is None and not (name == "model" and s.dataset not in train.DEFAULTS):
                setattr(s, name, value)
        world = int(os.environ.get("WORLD_SIZE", 1))
        train.check_ranges(s)
        if s.batch % world:
            raise ValueError(f"--batch {s.batch} does not divide over {world} ranks: take a multiple of {world}")
        run = Path(s.run_dir or f"runs/{Path(s.dataset).stem}-{method}")
        if (run / "metrics.jsonl").exists():
            raise ValueError(f"--run_dir {run} holds a run already: name another folder")
        problems = data.load(s.dataset, s.prompt_template, s.chat)
        tokenizer = train.load_tokenizer(s)
        if getattr(s, "base_model", None):
            AutoConfig.from_pretrained(s.base_model)
        (training, too_long), (test, test_too_long) = [data.encode(p, tokenizer, s.max_sequence - s.max_tokens, s.chat) for p in problems]
        if not training or not test:
            raise ValueError(f"every prompt is longer than --max_sequence - --max_tokens = {s.max_sequence - s.max_tokens} tokens")
    except (ValueError, OSError) as error:
        ppo.refuse(f"{method}: {str(error).splitlines()[0]}")
    if too_long + test_too_long and os.environ.get("RANK", "0") == "0":
        print(f"skipped {too_long + test_too_long} problems: their prompts are longer than --max_sequence - --max_tokens")
    device = ppo.init_distributed()
    with Watch() as watch:
        _rounds(s, run, tokenizer, training, test[: s.eval_problems], train_round, device, watch)


def _rounds(s, run, tokenizer, training, test, train_round, device, watch):
    from rollout import Engine  # after the checks: importing vLLM takes seconds

    rank, world = dist.get_rank(), dist.get_world_size()
    engine = Engine(
        s.model, max_sequence=s.max_sequence, stop=[s.stop] if s.stop else [], bfloat16=s.bfloat16, gpu_memory=s.gpu_memory,
        max_sequences=s.max_sequences, on_step=watch.beat,
    )  # fmt: skip
    engine.seed(s.seed)
    grader = Grader(s.grader_workers)
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "settings.json").write_text(json.dumps(asdict(s), indent=1) + "\n")

    def log(line):
        if rank == 0:
            print(" ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
            with open(run / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def evaluated():
        accuracy, _, _ = train.evaluate(engine, grader, test, s, watch)
        if accuracy is None:
            raise watch.error or RuntimeError("another rank failed")
        return accuracy

    log({"iteration": 0, "accuracy": evaluated()})
    policy, gradient_steps = None, 0
    for round in range(1, s.rounds + 1):
        phases = train.Phases(watch)
        drawn = random.Random(s.seed * 1_000_003 + round).sample(training, min(s.problems_per_round or len(training), len(training)))
        with phases("sample"):
            episodes = train.sample_responses(engine, grader, drawn[rank::world], s)
        tokens = sum(train.over_ranks([sum(len(e["response_ids"]) for e in episodes)]))
        episodes = train.over_ranks([{k: e[k] for k in ("prompt_ids", "response_ids", "reward", "text")} for e in episodes])
        engine.sleep()
        with phases("train"):
            policy, steps, metrics = train_round(s, episodes, policy, device)
        with phases("sync"):
            engine.load_weights(ppo.full_tensors(policy))
        with phases("evaluate"):
            accuracy = evaluated()
        gradient_steps += steps
        line = {"iteration": round, "accuracy": accuracy, "reward": statistics.mean(e["reward"] for e in episodes)}
        line |= {"gradient_steps": gradient_steps, "tokens_sample": tokens} | metrics
        log(line | {f"seconds_{name}": seconds for name, seconds in phases.seconds.items()})
    ppo.save_pretrained(policy, tokenizer, run / "model", ppo.compute_dtype(device, s.bfloat16))
    train.shut_down(engine, grader, watch)


def by_problem(episodes):
    """The distinct responses of each problem: lists (right ones, wrong ones) of episodes."""
    groups = {}
    for e in episodes:
        right, wrong = groups.setdefault(tuple(e["prompt_ids"]), ({}, {}))
        (right if e["reward"] else wrong).setdefault(e["text"], e)
    return [(list(right.values()), list(wrong.values())) for right, wrong in groups.values()]
