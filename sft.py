"""Supervised fine-tuning, the stage before RL: teach a model a dataset's solutions, with the loss
on the response alone.

    python sft.py --dataset arithmetic --out runs/sft      # makes the tiny model too
    torchrun --nproc_per_node=8 sft.py --dataset math --model microsoft/rho-math-1b-v0.1 --out runs/sft-math

The result is a Hugging Face folder: train.py --model takes it.
"""

import support.startup  # noqa: F401 (before torch is imported)

# isort: split
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import logging

import data
from episode import Episode
from learner import Learner
from model import compute_dtype, load_sharded, save_pretrained
from support.pretrained import positions, read_config, read_tokenizer
from support.ranks import check_gpus, exit_all, init_distributed, refuse, world_size
from support.settings import parse, setting
from support.supported import check_supported

logging.disable_progress_bar()  # transformers' own bars, one a file


@dataclass
class Settings:
    dataset: str = setting(
        "arithmetic", "math, gsm8k, arithmetic, worded, or a path to your own data (see data.py)"
    )
    model: str | None = setting(
        None, "Hugging Face folder or hub name to start from; None: the built-in task's tiny model"
    )
    out: str = setting("runs/sft", "folder that the model is written to")
    epochs: float = setting(2.0, "passes over the training problems; the paper: 2", above=0)
    batch: int = setting(64, "sequences per optimizer step over all ranks", min=1)
    micro_batch: int = setting(
        8, "sequences per forward pass of a rank; memory and speed, not the result", min=1
    )
    learning_rate: float = setting(1e-5, "peak; 3 percent warm-up, then linear decay to 0", above=0)
    max_tokens: int = setting(2048, "longer sequences are skipped and counted", min=1)
    prompt_template: str | None = setting(
        None, "prompt with {problem} in it; None: the paper's", is_text=True
    )
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template")
    problem_column: str | None = setting(None, "where the problem stands; None: see docs/data.md")
    answer_column: str | None = setting(None, "where its answer does; a.b for a column in a column")
    system: str | None = setting(None, "text of the system turn, in place of the data's", is_text=True)
    chat_options: str | None = setting(None, 'JSON for the chat template: {"enable_thinking": false}')
    seed: int = setting(0, "of the weights and of the order of the sequences")


# a minute and a half on two cores, and three
PRESETS = {
    "arithmetic": dict(batch=32, micro_batch=32, learning_rate=4e-3),
    "worded": dict(batch=16, micro_batch=16, learning_rate=4e-3, epochs=1.0),
}


def sequences(problems, tokenizer, max_tokens, chat, chat_options=None):
    """(Episodes of the solutions and EOS, how many were too long)"""
    kept, skipped = data.encode(problems, tokenizer, max_tokens, chat, chat_options)
    episodes = []
    for p in kept:
        separator = "" if chat or p.prompt[-1:].isspace() else " "
        response = tokenizer(separator + p.solution, add_special_tokens=False)["input_ids"]
        e = Episode(p.prompt_ids, response_ids=[*response, tokenizer.eos_token_id])
        if len(e) <= max_tokens:
            episodes.append(e)
    return episodes, skipped + len(kept) - len(episodes)


def finetune(policy, episodes, device, s, show=False):
    """Minimize the mean negative log-likelihood of the response tokens, per optimizer step over all ranks.

    All ranks are given the same episodes and take turns in them. s: settings with epochs, batch, micro_batch,
    learning_rate and seed. show: with a progress bar. Returns the Learner, with its steps and metrics.
    """
    batch = min(s.batch, len(episodes) // dist.get_world_size() * dist.get_world_size())
    total = max(1, int(len(episodes) * s.epochs) // batch)
    learner = Learner(policy, device, s.learning_rate, total, micro_batch=s.micro_batch)
    steps = learner.steps(episodes, batches(len(episodes), batch, total, s.seed))
    often = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file needs fewer lines
    bar = tqdm(steps, "sft", total, disable=not show, unit="step", dynamic_ncols=True, mininterval=often)
    for step in bar:
        for m in step.micro_batches():
            step.backward(-policy(m).sum() / step.num_tokens)
        if learner.reports:
            bar.set_postfix(loss=f"{learner.reports[-1]['loss']:.3f}", refresh=False)
    return learner


def batches(count, size, total, seed):
    """This rank's rows of `total` batches of `size` examples, out of `count` in a new order each time."""
    rng, order = random.Random(seed), []
    for _ in range(total):
        while len(order) < size:
            order += rng.sample(range(count), count)
        chosen, order = order[:size], order[size:]
        yield chosen[dist.get_rank() :: dist.get_world_size()]


def prepare(s, scratch):
    """(tokenizer, episodes, how many were too long) of the settings; raises ValueError.

    Without a --model each rank writes the built-in task's into scratch, the same one.
    """
    world = world_size()
    problems = [p for p in data.load_for(s)[0] if p.solution]
    if not problems:
        raise ValueError(f"--dataset {s.dataset} has no solutions to learn from: it needs a solution column")
    if s.dataset not in data.BUILT_IN and s.model is None:
        raise ValueError("--model is missing: name the Hugging Face folder or hub model to fine-tune")
    if s.batch % world:
        raise ValueError(f"--batch {s.batch} does not divide over {world} ranks: take a multiple of {world}")
    if s.model is None:
        data.BUILT_IN[s.dataset].tiny_model(scratch, s.seed)
        s.model = scratch
    s.max_tokens = min(s.max_tokens, positions(read_config(s.model)) or s.max_tokens)
    tokenizer = read_tokenizer(s.model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of --model {s.model} has no EOS token to end responses with")
    episodes, skipped = sequences(problems, tokenizer, s.max_tokens, s.chat, s.chat_options)
    if len(episodes) < world:
        total = len(episodes) + skipped
        raise ValueError(f"{len(episodes)} of {total} sequences are within --max_tokens {s.max_tokens}")
    check_supported(s.model, [e.prompt_ids + e.response_ids for e in episodes])
    return tokenizer, episodes, skipped


def main():
    with tempfile.TemporaryDirectory() as scratch:
        try:
            check_gpus()
            s, _ = parse(Settings, sys.argv[1:], __doc__, PRESETS, other={})
            tokenizer, episodes, skipped = prepare(s, scratch)
        except (ValueError, OSError) as error:
            refuse("sft.py: " + str(error).split("\n")[0])
        device = init_distributed()
        policy = load_sharded(s.model, device)
    first = dist.get_rank() == 0
    if first and skipped:
        total = skipped + len(episodes)
        print(f"skipped {skipped} of {total} sequences: longer than --max_tokens {s.max_tokens}")
    finetune(policy, episodes, device, s, show=first)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    save_pretrained(policy, tokenizer, s.out, compute_dtype(device))
    if first:
        print(f"wrote {s.out}")
    exit_all()


if __name__ == "__main__":
    main()
