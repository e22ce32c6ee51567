"""How much memory does a run need on each GPU? It reads the model's configuration, and no weights.

    python tools/plan.py --dataset math --gpus 8 [any option of train.py]
    python tools/plan.py --dataset math --gpus 2 --gpu_gb 48      # GPUs of another size than 80 GB
    python tools/plan.py --table      # how many GPUs models of some sizes need, as in docs/running.md

It reports whether the run fits; if it does not, the exit code is 1. It counts 8 GPUs to a machine, which holds a
whole copy of the weights. Parameters and optimizer are exact: FSDP2 gives every rank of a machine ceil(rows /
ranks) rows of each parameter. What a forward and backward pass adds at
its fullest moment (marked ~) was counted on a trace of both of the paper's models (tests/test_trace.py).
The share of CUDA, NCCL and the allocator's fragments (REST) is a guess, since no GPU was available.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import train
from model import LOGITS
from support.pretrained import read_config
from support.supported import check_architecture

GPU_BYTES = 80e9  # of a GPU, if this machine has none to ask
PER_MACHINE = 8  # GPUs
REST = 4e9  # bytes of a GPU that are not counted

SIZES = {  # of --table; Qwen2.5 and Llama 3.1, as published
    "0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    ),
    "1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    ),
    "3B": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    ),
    "7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False, dtype="bfloat16",
    ),
    "8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    ),
}  # fmt: skip


def inner_size(config):
    """Width of a layer's feed-forward part, which has several names."""
    names = ("intermediate_size", "ffn_dim", "n_inner")
    return next(filter(None, (getattr(config, name, None) for name in names)), 4 * config.hidden_size)


def numel(parameters):
    return sum(p.numel() for p in parameters)


def shard_size(parameters, ranks):
    """Elements of parameters on the rank that holds most of them; each parameter is sharded by rows."""
    return sum(math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) for p in parameters)


def memory(config, s, ranks, gpu_bytes):
    """Bytes that a rank needs, by name: {"training": {..}, "sampling": {..}, "host": {..}}.

    s: train.Settings. ranks: those of a machine, over which a copy of the weights is sharded.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    in_layers = {p for layer in layers for p in layer.parameters()}
    root = [p for p in model.parameters() if p not in in_layers]
    shard, tokens, width = shard_size(model.parameters(), ranks), s.micro_batch_tokens, config.hidden_size
    networks = 2 if s.algorithm == "ppo" else 1  # the critic trains after the policy, but its shards stay
    state = {"weights, fp32": 4 * shard * networks, "AdamW, fp32": 8 * shard * networks}
    layer, embedding = max(numel(x.parameters()) for x in layers), numel(root)
    head = config.vocab_size * width
    kept = {  # through the whole backward pass
        "~ embedding and head gathered, bf16": 2 * embedding,
        "~ activations between the layers, bf16": 2 * tokens * width * len(layers),
    }
    chunk = 14 * min(LOGITS, tokens * config.vocab_size)
    logits = {"~ head's gradient, bf16": 2 * head, "~ logits of one chunk": chunk}
    inside = {
        "~ head's gradient, bf16": 2 * head,
        "~ two layers gathered, bf16; one's gradient, bf16 and fp32": (2 * 2 + 2 + 4) * layer,
        "~ activations inside one layer": 2 * tokens * (13 * width + 8 * inner_size(config)),
    }
    end = {"~ embedding and head gathered, bf16; their gradients, bf16 and fp32": (2 + 2 + 4) * embedding}
    fullest = max(kept | logits, kept | inside, end, key=lambda parts: sum(parts.values()))
    rest = {"~ CUDA, NCCL, fragments": REST}
    training = state | {"gradients, fp32": 4 * shard} | fullest | rest
    engine = {f"engine: --gpu_memory {s.gpu_memory} of the GPU": s.gpu_memory * gpu_bytes}
    sampling = state | engine | rest
    copy = (config.dtype or torch.float32).itemsize * numel(model.parameters())
    host = {"reference, bf16": 2 * shard, "~ one copy, while it loads": copy}
    return dict(training=training, sampling=sampling, host=host)


def kv_tokens(config, s, gpu_bytes):
    """Tokens in the KV cache of an engine beside its weights, on each GPU of a tensor-parallel group.

    The engine's activations are not counted.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        weights = 2 * numel(AutoModelForCausalLM.from_config(config).parameters())
    left = s.gpu_memory * gpu_bytes - weights / s.tensor_parallel_size
    return int(left / (2 * 2 * config.num_hidden_layers * heads * size / s.tensor_parallel_size))


def fits(needs, cached, s, gpu_bytes):
    """Whether a GPU holds these needs, as `memory` gives them, and the KV cache at least one sequence."""
    most = max(sum(needs[phase].values()) for phase in ("training", "sampling"))
    return most <= gpu_bytes and cached >= s.max_sequence


def table():
    """A Markdown table: the fewest of 1, 2, 4 or 8 GPUs that are enough for each of SIZES."""
    s, memories = train.parse_settings(["--dataset", "math"]), (24, 48, 80, 141)
    lines = [f"| parameters | {' | '.join(f'{m} GB' for m in memories)} |", "|---" * 5 + "|"]
    for name, config in SIZES.items():
        cells = []
        for m in memories:
            cached = kv_tokens(config, s, m * 1e9)
            enough = [n for n in (1, 2, 4, 8) if fits(memory(config, s, n, m * 1e9), cached, s, m * 1e9)]
            cells.append(str(enough[0]) if enough else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(config, s, gpus, gpu_bytes):
    """(text for the screen, whether the run fits)."""
    ranks = min(gpus, PER_MACHINE)
    needs = memory(config, s, ranks, gpu_bytes)
    size = f"{gpus} GPUs of {gpu_bytes / 1e9:.0f} GB"
    text = [f"{s.model} on {size}, each parameter sharded over {ranks}; GB per rank:"]
    for phase, parts in needs.items():
        text += ["", f"{phase:74}{sum(parts.values()) / 1e9:8.1f}"]
        text += [f"  {name:72}{size / 1e9:8.1f}" for name, size in parts.items()]
    cached = kv_tokens(config, s, gpu_bytes)
    enough = fits(needs, cached, s, gpu_bytes)
    cached = max(0, cached)
    sequences = f"{cached // s.max_sequence} sequences of --max_sequence {s.max_sequence} at a time"
    text += ["", f"KV cache: {cached} tokens, {sequences}"]
    short = "does not fit: raise --gpus, or lower --micro_batch_tokens (training) or --gpu_memory (sampling)"
    return "\n".join([*text, "fits" if enough else short]), enough


def parse(argv):
    """(number of GPUs, bytes of one, train.Settings, the model's configuration) of a command line.

    Raises ValueError.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--gpus", default="", metavar="N", help="number of GPUs")
    size = "memory of one GPU; default: this machine's, or 80"
    parser.add_argument("--gpu_gb", type=float, metavar="GB", help=size)
    a, rest = parser.parse_known_args(argv)
    gpu_bytes = GPU_BYTES if a.gpu_gb is None else a.gpu_gb * 1e9
    if a.gpu_gb is None and torch.cuda.is_available():
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    if not (a.gpus.isdecimal() and int(a.gpus)):
        raise ValueError(f"--gpus {a.gpus or 'is missing: it'} must be a number of GPUs, at least 1")
    s = train.parse_settings(rest)
    train.check(s, int(a.gpus))
    if not s.model:
        raise ValueError(f"--model is missing: --dataset {s.dataset} has no model of its own")
    config = read_config(s.model, s.trust_remote_code)
    check_architecture(s.model, (), s.trust_remote_code, critic=s.algorithm == "ppo")
    return int(a.gpus), gpu_bytes, s, config


def main():
    if sys.argv[1:] == ["--table"]:
        return print(table())
    try:
        gpus, gpu_bytes, s, config = parse(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"plan.py: {error}")
    text, enough = report(config, s, gpus, gpu_bytes)
    print(text)
    sys.exit(not enough)


if __name__ == "__main__":
    main()
