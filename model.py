"""The networks that train: loading and sharding with FSDP2, packed attention, the chunked head, saving.

    policy = load_sharded(path, device)     # a Policy: policy(micro_batch, temperature) -> log-probabilities [N]

The same code runs on GPUs (NCCL, bf16 compute on fp32 master weights) and on CPU (gloo, fp32).
compute_dtype, load_sharded and packed_attention decide by `device` what differs.
"""

import copy
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from support.model_files import local_folder
from support.pretrained import check_config, generation_config

# --- the policy ---


def logprobs_from_logits(logits, targets, temperature=1.0):
    """log pi(target) under softmax(logits / temperature). logits [N, V], targets [N] -> [N], float32."""
    x = logits.float() / temperature
    return x.gather(-1, targets[:, None])[:, 0] - x.logsumexp(-1)


def token_entropy(logits, temperature=1.0):
    """Entropy in nats of softmax(logits / temperature): [N, V] -> [N]."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


class Policy(torch.nn.Module):
    """A causal language model that gives the log-probabilities of action tokens; only they pass its head."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, m, temperature=1.0, details=False):
        """log pi of the N action tokens of a MicroBatch, at the temperature they were sampled at: [N].

        details, for scoring without a gradient: [3, N], with log-probabilities at temperature 1 and entropies.
        """
        hidden = self.network.base_model(**m.inputs(), use_cache=False).last_hidden_state  # [1, L, D]
        hidden = hidden[0, m.positions]  # [N, D]
        head = self.network.get_output_embeddings()
        if not details:
            return ChunkedLogprobs.apply(hidden, head.weight, head.bias, m.targets, temperature)
        parts = []
        for h, y in in_chunks(len(head.weight), hidden, m.targets):
            logits = head(h)  # [n, V]
            at_one, entropy = logprobs_from_logits(logits, y), token_entropy(logits, temperature)
            parts.append(torch.stack([logprobs_from_logits(logits, y, temperature), at_one, entropy]))
        return torch.cat(parts, 1)


LOGITS = 2**26  # at a time; 256 MiB in float32


def in_chunks(vocabulary, *tensors):
    """The tensors [N, ..] in pieces whose tokens have at most LOGITS logits together."""
    return zip(*(x.split(max(1, LOGITS // vocabulary)) for x in tensors))


class ChunkedLogprobs(torch.autograd.Function):
    """logprobs_from_logits after a linear head, [N], without its [N, V] logits.

    The logits of one chunk exist at a time, and backward computes them again. hidden [N, D], weight [V, D],
    bias [V] or None, targets [N] of ids. With x = logits / temperature:

        log pi(y) = x_y - logsumexp(x),    d log pi(y) / d logits = (1[y] - softmax(x)) / temperature
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        logprobs, normalizers = [], []  # [n] of each chunk
        for h, y in in_chunks(len(weight), hidden, targets):
            x = F.linear(h, weight, bias).float().div_(temperature)  # [n, V]
            normalizers.append(x.logsumexp(-1))
            logprobs.append(x.gather(1, y[:, None])[:, 0] - normalizers[-1])
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalizers))
        ctx.temperature = temperature
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        chunks = in_chunks(len(weight), hidden, targets, normalizers, grad / ctx.temperature, d_hidden)
        for h, y, z, g, d_h in chunks:
            x = F.linear(h, weight, bias).float().div_(ctx.temperature)  # [n, V]
            d_logits = x.sub_(z[:, None]).exp_().mul_(-g[:, None])  # -softmax(x) g
            d_logits = d_logits.scatter_add_(1, y[:, None], g[:, None]).to(weight.dtype)
            torch.mm(d_logits, weight, out=d_h)
            d_weight.addmm_(d_logits.T, h)
            if bias is not None:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    lengths=None,
    cu_seqlens=None,
    scaling=None,
    sliding_window=None,
    **other,
):
    """Causal attention inside each sequence of a packed row: [1, H, L, D] -> ([1, L, H, D], None).

    torch's variable-length flash kernel for bf16 on GPUs, else SDPA, one sequence after the other.
    transformers calls this for attn_implementation="packed"; lengths (a list of ints) and cu_seqlens (their
    int32 cumulative sums from 0) come from MicroBatch.inputs.
    """
    kind = type(module).__name__
    if lengths is None:
        raise ValueError(
            f"its {kind} is not told where packed sequences begin (transformers drops arguments)"
        )
    if unknown := [name for name in ("softcap", "s_aux") if other.get(name) is not None]:
        raise ValueError(f"its {kind} needs attention with {unknown[0]}, which is not built here")
    if query.device.type != "cpu" and query.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [L, H, D]
        window = (sliding_window - 1 if sliding_window else -1, 0)  # causal
        options = dict(scale=scaling, window_size=window, enable_gqa=True)
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), **options)[None], None
    parts = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value))):
        mask, length = None, q.shape[2]
        if sliding_window and length > sliding_window:
            every = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = every.tril().triu(1 - sliding_window)
        options = dict(is_causal=mask is None, scale=scaling, enable_gqa=True)
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, **options))
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


# --- loading and sharding ---


def compute_dtype(device, bfloat16=None):
    """bfloat16 on GPUs and float32 on CPU, unless bfloat16 says otherwise."""
    bfloat16 = device.type != "cpu" if bfloat16 is None else bfloat16
    return torch.bfloat16 if bfloat16 else torch.float32


def device_mesh(device):
    """The ranks; of several machines [machines, ranks]: each holds a whole copy, sharded over its ranks.

    torchrun sets GROUP_WORLD_SIZE, the number of machines. It also sets LOCAL_WORLD_SIZE, but vLLM on CPU
    overwrites that.
    """
    world, machines = dist.get_world_size(), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    shape, names = (
        ((machines, world // machines), ("replicate", "shard")) if machines > 1 else ((world,), None)
    )
    return dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)


def load_sharded(
    path, device, trainable=True, *, bfloat16=None, checkpoint_activations=None, trust_remote_code=False,
    wrapper=Policy, architecture=AutoModelForCausalLM, **options,
):  # fmt: skip
    """A Policy from a Hugging Face folder or hub name, sharded over all ranks layer by layer with FSDP2.

    A trainable one has fp32 master weights. A frozen one is kept in the compute type, and on GPUs its shards
    live in host memory and visit the GPU layer by layer. bfloat16: compute in bf16; None: on GPUs only.
    checkpoint_activations: recompute them in the backward pass, for less memory and a third more time; None:
    on GPUs only. trust_remote_code: let a hub model bring code of its own. wrapper, architecture: another
    network, with its options for the configuration. Raises OSError or ValueError for a model that is not
    there or not supported.
    """
    compute, on_gpu = compute_dtype(device, bfloat16), device.type != "cpu"
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    # without dropout: the old and the new log-probabilities must come from the same policy
    no_dropout = {name: 0.0 for name in vars(config) if name.endswith(("dropout", "pdrop", "layerdrop"))}
    for name, value in (no_dropout | options).items():
        setattr(config, name, value)
    check_config(config, path)
    network = architecture.from_pretrained(
        local_folder(path), config=config, dtype="auto" if trainable else compute, attn_implementation="packed",
        trust_remote_code=trust_remote_code, use_safetensors=True,
    )  # fmt: skip
    network.generation_config = generation_config(path) or network.generation_config
    network.requires_grad_(trainable).train(trainable)
    if trainable and (on_gpu if checkpoint_activations is None else checkpoint_activations):
        network.gradient_checkpointing_enable()
    sharding = dict(
        mesh=device_mesh(device),
        mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if on_gpu and not trainable else OffloadPolicy(),
    )
    model = wrapper(network)
    layers = [m for m in network.modules() if type(m).__name__ in network._no_split_modules]
    for module in (*layers, model):
        # a layer becomes fp32 just before it is sharded: no rank ever holds the whole model in fp32
        fully_shard(module.float() if trainable else module, **sharding)
    return model


# --- saving ---


def full_tensors(model):
    """(name, whole tensor) of each parameter and buffer, one at a time. All ranks must iterate together."""
    for name, tensor in model.network.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_pretrained(model, tokenizer, folder, dtype=torch.float32):
    """Write a network as a Hugging Face folder (safetensors), as `vllm serve` loads it. All ranks call it."""
    state = {}
    for name, tensor in full_tensors(model):
        if dist.get_rank() == 0:
            state[name] = tensor.to("cpu", dtype, copy=True)
    if dist.get_rank() == 0:
        model.network.save_pretrained(folder, state_dict=state)
        config = copy.deepcopy(model.network.config)
        config.dtype = dtype  # save_pretrained wrote the master weights' type
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def adam_state(network, optimizer):
    """(weights, state of the optimizer) of a sharded network."""
    fresh = not optimizer.state
    state = get_state_dict(network, optimizer)
    if fresh:  # get_state_dict has made a step without gradients, and Adam would count it
        for numbers in optimizer.state.values():
            numbers["step"].zero_()
    return state


def save_state(folder, model, optimizer, step):
    """Write network, optimizer and step count with torch.distributed.checkpoint. All ranks call it."""
    weights, optimizer = adam_state(model.network, optimizer)
    dcp.save({"model": weights, "optimizer": optimizer, "step": step}, checkpoint_id=folder)


def load_state(folder, model, optimizer):
    """Read what save_state wrote, on any number of ranks. Returns the step count."""
    weights, optimizer_state = adam_state(model.network, optimizer)
    state = {"model": weights, "optimizer": optimizer_state, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model.network, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return state["step"]
