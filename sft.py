"""Supervised fine-tuning, the stage before RL: teach a model a dataset's solutions, with the loss on the response alone.

    python sft.py --dataset arithmetic --out runs/sft                # makes the tiny model too; torchrun --nproc_per_node=2 is faster
    torchrun --nproc_per_node=8 sft.py --dataset math --model microsoft/rho-math-1b-v0.1 --out runs/sft-math

The result is a Hugging Face folder: train.py --model takes it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning thread teams ruin each other on few cores; read when torch is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import data
import ppo

logging.disable_progress_bar()  # transformers' own bars, one a file


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    dataset: str = setting("arithmetic", "math, gsm8k, arithmetic, or a path to your own data (see data.py)")
    model: str | None = setting(None, "Hugging Face folder or hub name to start from; arithmetic makes its own tiny model")
    out: str = setting("runs/sft", "folder that the model is written to")
    epochs: float = setting(2.0, "passes over the training problems; the paper's SFT: 2 (MATH)")
    batch: int = setting(64, "sequences per optimizer step over all ranks")
    micro_batch: int = setting(8, "sequences per forward pass of a rank; changes memory and speed, not the result")
    learning_rate: float = setting(1e-5, "peak; 3 percent linear warm-up, then linear decay to 0")
    max_tokens: int = setting(2048, "longer sequences are skipped and counted")
    prompt_template: str | None = setting(None, "prompt text with {problem} in it; default: the paper's")
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template")
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, a third more time")
    seed: int = setting(0, "of the weights and of the order of the sequences")


ARITHMETIC = dict(epochs=2.0, batch=32, micro_batch=32, learning_rate=4e-3)  # a minute and a half on two cores


def tiny_model(folder, seed):
    """Write a Llama of about 0.4M parameters with random weights and a tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"0123456789+-*=?#\n "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        )
    ).save_pretrained(folder)  # fmt: skip


def sequences(problems, tokenizer, max_tokens, chat):
    """[(ids, number of prompt ids)] of prompt + solution + EOS, and how many were too long."""
    kept, skipped = data.encode(problems, tokenizer, max_tokens, chat)
    rows = []
    for problem, prompt_ids in kept:
        separator = "" if chat or problem.prompt[-1:].isspace() else " "
        response = tokenizer(separator + problem.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt_ids) + len(response) <= max_tokens:
            rows.append((prompt_ids + response, len(prompt_ids)))
    return rows, skipped + len(kept) - len(rows)


def finetune(model, rows, device, *, epochs, batch, micro_batch, peak, seed):
    """Minimize the mean negative log-likelihood of the response tokens, per optimizer step over all ranks. rows: see sequences.

    All ranks are given the same rows and take turns in them. Yields (step, number of steps, loss) after each optimizer step.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0)
    batch = min(batch, len(rows) // world * world)
    steps = max(1, int(len(rows) * epochs) // batch)
    rng, order = random.Random(seed), []
    for step in range(steps):
        while len(order) < batch:
            order += rng.sample(range(len(rows)), len(rows))
        chosen, order = order[:batch], order[batch:]
        num_tokens = sum(len(rows[i][0]) - rows[i][1] for i in chosen)
        mine, total = chosen[rank::world], 0.0
        optimizer.zero_grad()
        for k in range(0, len(mine), micro_batch):
            part = [rows[i] for i in mine[k : k + micro_batch]]
            episodes = [dict(prompt_ids=ids[:prompt], response_ids=ids[prompt:]) for ids, prompt in part]
            loss = -ppo.token_logprobs(model, ppo.micro_batch(ppo.collate(episodes, [], device), range(len(part)))).sum() / num_tokens
            (loss * world).backward()  # FSDP averages over the ranks; we want the sum
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = ppo.learning_rate(step, steps, peak)
        optimizer.step()
        dist.all_reduce(total)
        yield step, steps, total.item()


def main():
    argv = sys.argv[1:]
    parser = HfArgumentParser(Settings, description=__doc__)
    if parser.parse_args(argv).dataset == "arithmetic":
        parser.set_defaults(**ARITHMETIC)
    (settings,) = parser.parse_args_into_dataclasses(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        problems = [p for p in data.load(settings.dataset, settings.prompt_template, settings.chat)[0] if p.solution]
        if not problems:
            raise ValueError(f"--dataset {settings.dataset} has no solutions to learn from: it needs a solution column")
        if settings.dataset != "arithmetic" and settings.model is None:
            raise ValueError("--model is missing: name the Hugging Face folder or hub model to fine-tune")
        if settings.batch < 1 or settings.batch % world:
            raise ValueError(f"--batch {settings.batch} does not divide over {world} ranks: take a multiple of {world}")
        if settings.micro_batch < 1 or settings.epochs <= 0:
            raise ValueError("--micro_batch must be at least 1 and --epochs above 0")
        if settings.model is not None:
            AutoConfig.from_pretrained(settings.model)
    except (ValueError, OSError) as error:
        ppo.refuse("sft.py: " + str(error).split("\n")[0])
    device = ppo.init_distributed()
    with tempfile.TemporaryDirectory() as scratch:
        if settings.model is None:
            if dist.get_rank() == 0:
                tiny_model(scratch, settings.seed)
            folder = [scratch]
            dist.broadcast_object_list(folder)  # rank 0's, once the model is in it
            settings.model = folder[0]
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        rows, skipped = sequences(problems, tokenizer, settings.max_tokens, settings.chat)
        if len(rows) < world:
            sys.exit(f"sft.py: {len(rows)} of {len(rows) + skipped} sequences are within --max_tokens {settings.max_tokens}")
        model = ppo.load_sharded(settings.model, device, checkpoint_activations=settings.activation_checkpointing)
        dist.barrier()  # the folder goes when all ranks have loaded it
    main_rank = dist.get_rank() == 0
    if main_rank and skipped:
        print(f"skipped {skipped} of {skipped + len(rows)} sequences: longer than --max_tokens {settings.max_tokens}")
    progress = tqdm(disable=not main_rank, desc="sft", unit="step")
    options = dict(
        epochs=settings.epochs, batch=settings.batch, micro_batch=settings.micro_batch, peak=settings.learning_rate, seed=settings.seed
    )
    for _, steps, loss in finetune(model, rows, device, **options):
        progress.total = steps
        progress.set_postfix(loss=f"{loss:.3f}")
        progress.update()
    progress.close()
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    ppo.save_pretrained(model, tokenizer, settings.out, ppo.compute_dtype(device))
    if main_rank:
        print(f"wrote {settings.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
