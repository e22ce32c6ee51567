"""PPO's update: token log-probabilities, the clipped loss, the KL penalty, whitening, and the FSDP2-sharded trainer that runs them.

The same code runs on GPUs (NCCL, bf16 compute on fp32 master weights) and on CPU (gloo, fp32); init_distributed and load_sharded
hold all that differs.
"""

import copy
import os
import socket
import sys
import time
import types
from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

# --- the formulas ---------------------------------------------------------------------------------------------------------------


def logprobs_from_logits(logits, targets, temperature=1.0):
    """log pi(target) under softmax(logits / temperature). logits [N, V], targets [N] -> [N], float32."""
    x = logits.float() / temperature
    return x.gather(-1, targets[:, None])[:, 0] - x.logsumexp(-1)


def token_entropy(logits, temperature=1.0):
    """Entropy in nats of softmax(logits / temperature): [N, V] -> [N]."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def whiten(advantages):
    """Advantages [N] of the action tokens with mean 0 and unbiased variance 1 over all ranks.

    The released code whitens each micro-batch by itself; called once on an iteration's episodes, the result does not depend on how they
    are batched. Advantages that are all equal become 0.
    """
    values = advantages.to(torch.float64)
    count, total = sum_over_ranks(torch.stack([values.new_tensor(len(values)), values.sum()])).tolist()
    centred = values - total / max(count, 1)
    variance = sum_over_ranks((centred**2).sum()).item() / max(count - 1, 1)
    return (centred / max(variance**0.5, 1e-8)).to(advantages.dtype)


def ppo_loss(logprobs, old_logprobs, ref_logprobs, advantages, num_responses, num_tokens=None, clip=0.2, kl_coef=1e-4):
    """Clipped policy loss plus KL penalty. All tensors [N]: the action tokens of some responses, one behind the other.

        policy = 1/num_tokens    sum_tokens max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),   rho = pi / pi_old
        kl     = 1/num_responses sum_tokens clamp(exp(d) - d - 1, 0, 10),                    d = log pi_ref - log pi    (k3 estimator)

    num_tokens and num_responses are those of the whole minibatch over all ranks, so the losses of its micro-batches add up to the
    minibatch's; num_tokens None means that these tokens are the minibatch. Returns (loss, metrics): metrics are this micro-batch's
    contributions to the minibatch's means, detached scalars that add up likewise. Source: the released code's PPO trainer (paper.md).
    """
    num_tokens = len(logprobs) if num_tokens is None else num_tokens
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    policy_loss = torch.maximum(unclipped, clipped).sum() / num_tokens
    d = ref_logprobs - logprobs
    kl = torch.clamp(d.exp() - d - 1, 0, 10).sum() / num_responses
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "kl_loss": kl_coef * kl.detach(),
            "ratio": ratio.sum() / num_tokens,
            "clip_fraction": (clipped > unclipped).sum() / num_tokens,
            "approx_kl": (ratio - 1 - log_ratio).sum() / num_tokens,  # of pi against pi_old, in nats per token
        }
    return policy_loss + kl_coef * kl, metrics


def learning_rate(step, total_steps, peak, warmup_fraction=0.03):
    """Linear warm-up over the first warmup_fraction of the optimizer steps, then linear decay to 0 at total_steps. step counts from 0."""
    warmup = max(1, round(warmup_fraction * total_steps))
    return peak * min((step + 1) / warmup, max(0.0, (total_steps - step) / max(1, total_steps - warmup)))


# --- ranks and shards -----------------------------------------------------------------------------------------------------------


def init_distributed():
    """Join torchrun's process group, or be the only rank of one's own (python train.py). Returns this rank's torch.device."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device


def refuse(message):
    """End the program with one line for its user, before the ranks have joined. Rank 0 says it, and torchrun ends the others; a rank whose
    error is its own alone says it half a minute later.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)
    sys.exit(message)


def compute_dtype(device, bfloat16=None):
    """bfloat16 on GPUs and float32 on CPU, unless bfloat16 says otherwise."""
    return torch.bfloat16 if (device.type == "cuda" if bfloat16 is None else bfloat16) else torch.float32


def device_mesh(device, hybrid=False):
    """All ranks; hybrid: [machines, ranks of each], to shard within a machine and replicate across. For fully_shard."""
    world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    if not hybrid:
        return dist.device_mesh.init_device_mesh(device.type, (world,))
    return dist.device_mesh.init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))


def load_sharded(
    path, device, trainable=True, bfloat16=None, checkpoint_activations=False, hybrid=False, trust_remote_code=False,
    architecture=AutoModelForCausalLM, **options,
):  # fmt: skip
    """A causal language model from a Hugging Face folder or hub name, sharded over all ranks layer by layer with FSDP2.

    A trainable model has fp32 master weights. A frozen one is kept in the compute type, and on GPUs its shards live in host memory
    and visit the GPU layer by layer while it computes. bfloat16: compute in bf16; None means on GPUs only. hybrid: see
    device_mesh. trust_remote_code: let a hub model bring code of its own. architecture: another head of the same backbone, with its options for
    the configuration. Weights are read from safetensors alone; other formats are pickles, which can run code.
    """
    compute = compute_dtype(device, bfloat16)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    # without dropout: the old and the new log-probabilities must be of one and the same policy
    no_dropout = {name: 0.0 for name in vars(config) if name.endswith(("dropout", "pdrop"))}
    for name, value in (no_dropout | options).items():
        setattr(config, name, value)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None):
            raise ValueError(f"{path}: its logits are the head's output changed by {name}, which is not built here")
    dtype = "auto" if trainable else compute
    model = architecture.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation="packed", trust_remote_code=trust_remote_code, use_safetensors=True
    )
    model.requires_grad_(trainable).train(trainable)
    if checkpoint_activations:
        model.gradient_checkpointing_enable()
    sharding = dict(
        mesh=device_mesh(device, hybrid),
        mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if device.type == "cuda" and not trainable else OffloadPolicy(),
    )
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for module in (*layers, model):
        # a layer becomes fp32 just before it is sharded: a bf16 checkpoint never stands whole in fp32 on a rank
        fully_shard(module.float() if trainable else module, **sharding)
    if model.get_output_embeddings() is not None:
        model.through_head = types.MethodType(through_head, model)
        register_fsdp_forward_method(model, "through_head")
    return model


def full_tensors(model):
    """(name, whole tensor) of each parameter and buffer, one at a time and on every rank: all ranks must iterate together. For the engine."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_pretrained(model, tokenizer, folder, dtype=torch.float32):
    """Write a sharded model as a Hugging Face folder (safetensors) that from_pretrained and `vllm serve` load. All ranks call it."""
    state = {}
    for name, tensor in full_tensors(model):
        if dist.get_rank() == 0:
            state[name] = tensor.to("cpu", dtype, copy=True)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        config = copy.deepcopy(model.config)
        config.dtype = dtype  # save_pretrained wrote that of the master weights
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def sum_over_ranks(tensor):
    """The tensor, summed over all ranks in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# --- episodes as batches: packed, without padding ---------------------------------------------------------------------------------


def packed_attention(module, query, key, value, attention_mask, *, lengths, cu_seqlens, scaling=None, sliding_window=None, **other):
    """Causal attention inside each of several sequences that stand one behind the other: query [1, H, T, D] -> ([1, T, H, D], None).

    torch's variable-length flash kernel for bf16 on GPUs, else SDPA, one sequence after the other. transformers calls it for
    attn_implementation="packed"; lengths (a list of ints) and cu_seqlens (their int32 cumulative sums from 0) come from micro_batch.
    """
    if unknown := [name for name in ("softcap", "s_aux") if other.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} needs attention with {unknown[0]}, which is not built here")
    if query.is_cuda and query.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, H, D]
        options = dict(scale=scaling, window_size=(sliding_window - 1 if sliding_window else -1, 0), enable_gqa=True)  # causal
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), **options)[None], None
    parts = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value))):
        mask = None
        if sliding_window and q.shape[2] > sliding_window:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


LOGITS = 2**26  # at a time; 256 MiB in float32


def through_head(self, micro, function):
    """function(hidden states [N, D], head, targets [N]) for the action tokens of a micro-batch: only they pass through the head.

    load_sharded makes this a method of the model, so that FSDP gathers the parameters for it as for forward.
    """
    hidden = self.base_model(**micro["inputs"], use_cache=False).last_hidden_state[0, micro["positions"]]  # [N, D]
    return function(hidden, self.get_output_embeddings(), micro["targets"])


def in_chunks(vocabulary, *tensors):
    """The tensors [N, ..] in pieces of as many tokens as have no more than LOGITS logits."""
    return zip(*(x.split(max(1, LOGITS // vocabulary)) for x in tensors))


class ChunkedLogprobs(torch.autograd.Function):
    """logprobs_from_logits behind a linear head, [N], without its [N, V] logits: those of one chunk exist at a time, and backward makes them anew.

    hidden [N, D], weight [V, D], bias [V] or None, targets [N] of ids. With x = logits / temperature:

        log pi(y) = x_y - logsumexp(x),    d log pi(y) / d logits = (1[y] - softmax(x)) / temperature
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        parts = []
        for h, y in in_chunks(len(weight), hidden, targets):
            x = F.linear(h, weight, bias).float().div_(temperature)  # [n, V]
            normalizer = x.logsumexp(-1)
            parts.append(torch.stack([x.gather(1, y[:, None])[:, 0] - normalizer, normalizer]))
        logprobs, normalizers = torch.cat(parts, 1)  # [N] each
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        d_hidden, d_weight, d_bias = torch.empty_like(hidden), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for h, y, z, g, d_h in in_chunks(len(weight), hidden, targets, normalizers, grad / ctx.temperature, d_hidden):
            x = F.linear(h, weight, bias).float().div_(ctx.temperature)
            d_logits = x.sub_(z[:, None]).exp_().mul_(-g[:, None])  # -softmax(x) g
            d_logits = d_logits.scatter_add_(1, y[:, None], g[:, None]).to(weight.dtype)
            torch.mm(d_logits, weight, out=d_h)
            d_weight.addmm_(d_logits.T, h)
            if bias is not None:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None


def token_logprobs(model, micro, temperature=1.0):
    """Log-probabilities of the action tokens of a micro-batch, at the temperature they were sampled at: [N]."""
    logprobs = lambda hidden, head, targets: ChunkedLogprobs.apply(hidden, head.weight, head.bias, targets, temperature)
    return model.through_head(micro, logprobs)


def collate(episodes, names, device):
    """Episodes for micro_batch: the per-token lists `names` of their responses one behind the other, [N] each; 0 where an episode has none."""
    spans, stop = [], 0
    for e in episodes:
        spans.append((stop, stop := stop + len(e["response_ids"])))
    flat = {name: [x for e in episodes for x in e.get(name) or [0.0] * len(e["response_ids"])] for name in names}
    tensors = {name: torch.tensor(x, dtype=torch.float32, device=device) for name, x in flat.items()}
    return dict(episodes=episodes, spans=spans, device=device, tokens=tensors)


def micro_batch(batch, rows, actions=True):
    """Some episodes of a batch in one row of T tokens: `inputs` for the model and, of their N action tokens,

    tokens [N]: where each stands in the batch; targets [N]: its id; positions [N]: where in the row it is predicted; and `names` [N].
    Without actions: a pass with N = 0, of a rank that has less to do than the others.
    """
    ids, positions, tokens, lengths = [], [], [], []
    for i in rows:
        e = batch["episodes"][i]
        if actions:
            positions += range(len(ids) + len(e["prompt_ids"]) - 1, len(ids) + len(e["prompt_ids"]) + len(e["response_ids"]) - 1)
            tokens += range(*batch["spans"][i])
        lengths.append(len(e["prompt_ids"]) + len(e["response_ids"]))
        ids += e["prompt_ids"] + e["response_ids"]
    row = torch.tensor([ids, [t for n in lengths for t in range(n)]]).to(batch["device"], non_blocking=True)
    positions, tokens = torch.tensor([positions, tokens], dtype=torch.long).to(batch["device"], non_blocking=True)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(batch["device"], non_blocking=True)
    inputs = dict(input_ids=row[:1], position_ids=row[1:], lengths=lengths, cu_seqlens=cu_seqlens)
    about = dict(inputs=inputs, positions=positions, tokens=tokens, targets=row[0, positions + 1])
    return about | {name: values[tokens] for name, values in batch["tokens"].items()}


def micro_batches(batch, rows, max_tokens):
    """The rows of a batch as micro-batches of at most max_tokens tokens (a longer episode alone), as many on every rank.

    They are filled evenly: from the longest episode to the shortest, each goes where the fewest tokens are.
    """
    length = lambda i: len(batch["episodes"][i]["prompt_ids"]) + len(batch["episodes"][i]["response_ids"])
    rows = sorted(rows, key=length, reverse=True)
    lengths = list(map(length, rows))
    count = torch.tensor(fewest_parts(lengths, max_tokens), device=batch["device"])
    dist.all_reduce(count, dist.ReduceOp.MAX)
    parts = [[rows[k] for k in part] for part in fill_evenly(lengths, count.item())]
    return [micro_batch(batch, part or rows[-1:], actions=bool(part)) for part in parts]


def fill_evenly(lengths, count):
    """Numbers of the lengths, which descend, in `count` parts: each goes where the sum is the smallest so far."""
    parts, sums = [[] for _ in range(count)], [0] * count
    for i, length in enumerate(lengths):
        smallest = sums.index(min(sums))
        parts[smallest].append(i)
        sums[smallest] += length
    return parts


def fewest_parts(lengths, max_tokens):
    """The fewest parts of fill_evenly that are no larger than max_tokens, or than the longest."""
    limit, count = max(max_tokens, *lengths[:1]), max(1, -(-sum(lengths) // max_tokens))
    while any(sum(lengths[i] for i in part) > limit for part in fill_evenly(lengths, count)):
        count += 1
    return count


def minibatches(num_episodes, size, epochs, seed):
    """Row numbers of each minibatch of `size` episodes, in an order of its own in every epoch. seed: a tuple of ints."""
    if not num_episodes or num_episodes % size:
        raise ValueError(f"{num_episodes} episodes on this rank do not divide into minibatches of {size}")
    for epoch in range(epochs):
        order = torch.randperm(num_episodes, generator=torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63))
        yield from (rows.tolist() for rows in order.split(size))


def count_over_ranks(batch, rows):
    """(action tokens, responses) of a minibatch over all ranks, to divide by."""
    tokens = sum(len(batch["episodes"][i]["response_ids"]) for i in rows)
    return sum_over_ranks(torch.tensor([float(tokens), float(len(rows))], device=batch["device"])).clamp(min=1).tolist()


def count_skipped(in_a_row, skipped, most, numbers):
    """Steps skipped in a row, this one included; raises RuntimeError when they are too many: nothing is learned any more."""
    in_a_row = in_a_row + 1 if skipped else 0
    if in_a_row >= most:
        told = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        raise RuntimeError(
            f"{in_a_row} optimizer steps in a row were skipped, since a number was not finite or the ratio too large; the last: {told}"
        )
    return in_a_row


def save_state(folder, model, optimizer, step):
    """Write a sharded model, its optimizer and the number of its steps with torch.distributed.checkpoint; all ranks call it."""
    model, optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": model, "optimizer": optimizer, "step": step}, checkpoint_id=folder)


def load_state(folder, model, optimizer):
    """Read what save_state wrote into the sharded model and its optimizer, on any number of ranks; returns the step."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


# --- the trainer ----------------------------------------------------------------------------------------------------------------


class Trainer:
    """Policy, optimizer and reference policy, sharded over the ranks.

    model: Hugging Face folder or hub name that both the policy and the reference start from. total_steps: optimizer steps of the whole
    run, for the learning rate's decay. minibatch: episodes per optimizer step over all ranks. micro_batch_tokens: tokens per forward pass
    of a rank; it changes memory and speed, not the result. epochs: passes over the episodes in each update. whiten_advantages: GRPO and
    RLOO bring advantages that are scaled already.
    """

    MAX_RATIO = 10.0  # a step whose mean ratio exceeds this is skipped (paper.md)
    MAX_SKIPPED = 32  # so many skipped in a row, two of the paper's iterations, end the run

    def __init__(
        self, model, device, *, total_steps, learning_rate=1e-6, minibatch=64, micro_batch_tokens=8192, epochs=2, clip=0.2, kl_coef=1e-4,
        temperature=1.0, max_grad_norm=1.0, whiten_advantages=True, bfloat16=None, checkpoint_activations=False, hybrid=False, seed=0,
        trust_remote_code=False,
    ):  # fmt: skip
        self.device, self.total_steps, self.peak = device, total_steps, learning_rate
        self.minibatch, self.micro_batch_tokens, self.epochs = minibatch // dist.get_world_size(), micro_batch_tokens, epochs
        self.clip, self.kl_coef, self.temperature, self.max_grad_norm = clip, kl_coef, temperature, max_grad_norm
        self.whiten_advantages, self.seed, self.step, self.compute_dtype = whiten_advantages, seed, 0, compute_dtype(device, bfloat16)
        self.skipped = 0  # steps in a row
        self.model = load_sharded(model, device, True, bfloat16, checkpoint_activations, hybrid, trust_remote_code)
        self.reference = load_sharded(model, device, False, bfloat16, False, hybrid, trust_remote_code)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0, fused=device.type == "cuda")

    def update(self, episodes):
        """Train on one iteration's episodes of this rank; every rank brings the same number, a multiple of its share of the minibatch.

        episodes: dicts with prompt_ids, response_ids (lists of ids), advantages (one per response id, not yet whitened) and, for the
        logprob_gap metric, engine_logprobs (one per response id at temperature 1). Returns metrics over all ranks: means over the
        minibatches of what ppo_loss and the optimizer report, without skipped steps unless all are, and those of the episodes (entropy, kl,
        logprob_gap) before the update; skipped_steps of this update, gradient_steps of all so far.
        """
        batch = collate(episodes, ["advantages", "engine_logprobs"], self.device)
        if self.whiten_advantages:
            batch["tokens"]["advantages"] = whiten(batch["tokens"]["advantages"])
        metrics = self._score(batch)
        steps = [
            self._optimizer_step(batch, rows) for rows in minibatches(len(episodes), self.minibatch, self.epochs, (self.seed, self.step))
        ]
        self.optimizer.zero_grad()  # nothing stays beside the engine that need not
        skipped = sum(step["skipped"] for step in steps)
        kept = [step for step in steps if not step["skipped"]] or steps
        means = {name: sum(step[name] for step in kept) / len(kept) for name in steps[0] if name != "skipped"}
        return metrics | means | {"skipped_steps": skipped, "gradient_steps": self.step}

    def _optimizer_step(self, batch, rows):
        """One gradient step on the episodes `rows` of this rank and the other ranks' shares."""
        lr = learning_rate(self.step, self.total_steps, self.peak)
        num_tokens, num_responses = count_over_ranks(batch, rows)
        self.optimizer.zero_grad()
        sums = None
        for m in micro_batches(batch, rows, self.micro_batch_tokens):
            logprobs = token_logprobs(self.model, m, self.temperature)
            loss, metrics = ppo_loss(
                logprobs, m["old_logprobs"], m["ref_logprobs"], m["advantages"], num_responses, num_tokens, self.clip, self.kl_coef
            )
            (loss * dist.get_world_size()).backward()  # FSDP averages gradients over the ranks; the minibatch's gradient is their sum
            values = torch.stack([loss.detach(), *metrics.values()])
            sums = values if sums is None else sums + values
        means = dict(zip(["loss", *metrics], sum_over_ranks(sums).tolist()))
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm).full_tensor().item()
        # also true of NaN; the same on all ranks
        skipped = not (means["ratio"] <= self.MAX_RATIO and abs(means["loss"]) < float("inf") and grad_norm < float("inf"))
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.skipped = count_skipped(self.skipped, skipped, self.MAX_SKIPPED, means | {"grad_norm": grad_norm})
        self.step += 1
        return means | {"grad_norm": grad_norm, "learning_rate": lr, "skipped": skipped}

    @torch.no_grad()
    def _score(self, batch):
        """Add old_logprobs and ref_logprobs to the batch, [N] each; one pass of each policy over the episodes, before the first optimizer step.

        Before the first step of all the two policies are one, and the reference makes no pass. The engine reports log-probabilities at
        temperature 1 and before top-p, since those are defined alike on both sides; so logprob_gap compares them with the trainer's at
        temperature 1, from the same logits.
        """
        tokens = batch["tokens"]
        old, ref = tokens["old_logprobs"], tokens["ref_logprobs"] = torch.zeros(2, len(tokens["advantages"]), device=self.device)

        def scores(hidden, head, targets):
            parts = []
            for h, y in in_chunks(len(head.weight), hidden, targets):
                logits = head(h)
                logprobs = logprobs_from_logits(logits, y, self.temperature)
                parts.append(torch.stack([logprobs, logprobs_from_logits(logits, y), token_entropy(logits, self.temperature)]))
            return torch.cat(parts, 1)  # [3, N]

        sums = torch.zeros(3, device=self.device)
        for m in micro_batches(batch, range(len(batch["episodes"])), self.micro_batch_tokens):
            logprobs, at_one, entropy = self.model.through_head(m, scores)
            old[m["tokens"]] = logprobs
            ref[m["tokens"]] = token_logprobs(self.reference, m, self.temperature) if self.step else logprobs
            d = ref[m["tokens"]] - logprobs
            gap = (at_one - m["engine_logprobs"]).abs()
            sums += torch.stack([entropy.sum(), torch.clamp(d.exp() - d - 1, 0, 10).sum(), gap.sum()])
        self.reference.reshard()  # FSDP leaves the root's parameters gathered after a forward pass
        counts = torch.tensor([float(len(old)), float(len(batch["episodes"]))], device=self.device)
        entropy, kl, gap, num_tokens, num_responses = sum_over_ranks(torch.cat([sums, counts])).tolist()
        return {"entropy": entropy / max(num_tokens, 1), "kl": kl / num_responses, "logprob_gap": gap / max(num_tokens, 1)}

    def save(self, folder):
        """Write the sharded weights and optimizer state, all ranks together; load reads them back, on any number of ranks."""
        save_state(folder, self.model, self.optimizer, self.step)

    def load(self, folder):
        self.step = load_state(folder, self.model, self.optimizer)
