"""What a run needs of each GPU, computed from the model's configuration alone: nothing is downloaded but that, and nothing is loaded.

    python train.py --dataset math --plan 8        # on 8 GPUs; says whether it fits

Parameters and optimizer are exact: FSDP2 gives every rank ceil(rows / ranks) rows of each parameter. What a forward and backward pass adds is an
estimate (marked ~), which leaves out the allocator's fragments and NCCL's buffers, 2 to 4 GB.
"""

import math

import torch
from transformers import AutoModelForCausalLM

import ppo

GPU_BYTES = 80e9  # where there is no GPU to ask


def shard_size(parameters, ranks):
    """Elements of the parameters that the rank with the most of them holds, each sharded by its rows."""
    return sum(math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) for p in parameters)


def memory(config, s, ranks, gpu_bytes):
    """Bytes that a rank needs, by name: {"training": {..}, "sampling": {..}, "host": {..}}. s: train.Settings; ranks: those that share one copy."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    in_layers = {p for layer in layers for p in layer.parameters()}
    root = [p for p in model.parameters() if p not in in_layers]
    shard, numel = shard_size(model.parameters(), ranks), lambda parameters: sum(p.numel() for p in parameters)
    networks = 2 if s.algorithm == "ppo" else 1  # the value network trains after the policy, but its shards stay
    tokens, kept = s.micro_batch_tokens, 1 if s.activation_checkpointing else len(layers)
    inside = 2 * tokens * (8 * config.hidden_size + 4 * config.intermediate_size)
    state = {"weights, fp32": 4 * shard * networks, "AdamW, fp32": 8 * shard * networks}
    training = state | {
        "gradients, fp32": 4 * shard,
        "~ embedding and head gathered: bf16, its gradient in bf16 and fp32": 8 * numel(root),
        "~ two layers gathered, one's gradient": (2 * 2 + 6) * max(numel(layer.parameters()) for layer in layers),
        "~ activations between the layers, bf16": 2 * tokens * config.hidden_size * len(layers),
        f"~ activations inside {'one layer' if kept == 1 else 'the layers'}, bf16": kept * inside,
        "~ logits of one chunk": 14 * min(ppo.LOGITS, tokens * config.vocab_size),
    }
    sampling = state | {f"engine: --gpu_memory {s.gpu_memory} of the GPU": s.gpu_memory * gpu_bytes}
    copy = (config.dtype or torch.float32).itemsize * numel(model.parameters())
    return dict(training=training, sampling=sampling, host={"reference, bf16": 2 * shard, "~ one copy, while it loads": copy})


def kv_tokens(config, s, gpu_bytes):
    """Tokens that an engine's KV cache holds beside its weights, without the engine's own activations; of one GPU of a tensor-parallel group."""
    heads, size = config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    left = s.gpu_memory * gpu_bytes - weights / s.tensor_parallel_size
    return int(left / (2 * 2 * config.num_hidden_layers * heads * size / s.tensor_parallel_size))


def report(config, s, world, local):
    """(text for the screen, whether it fits)"""
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else GPU_BYTES
    ranks = local if s.hybrid_sharding else world
    needs = memory(config, s, ranks, gpu_bytes)
    text = [f"{s.model} on {world} GPUs of {gpu_bytes / 1e9:.0f} GB, each parameter sharded over {ranks}; GB per rank:"]
    for phase, parts in needs.items():
        text += ["", f"{phase:74}{sum(parts.values()) / 1e9:8.1f}", *(f"  {name:72}{size / 1e9:8.1f}" for name, size in parts.items())]
    cached = kv_tokens(config, s, gpu_bytes)
    fits = max(sum(needs[phase].values()) for phase in ("training", "sampling")) <= gpu_bytes and cached >= s.max_sequence
    text += [
        "",
        f"KV cache: {max(0, cached)} tokens, {max(0, cached) // s.max_sequence} sequences of --max_sequence {s.max_sequence} at a time",
    ]
    advice = "does not fit: raise the number of GPUs, or lower --micro_batch_tokens (training), --gpu_memory (sampling)"
    return "\n".join([*text, "fits" if fits else advice]), fits
