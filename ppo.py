"""PPO's update: token log-probabilities, the clipped loss, the KL penalty, whitening, and the FSDP2-sharded trainer that runs them.

The same code runs on GPUs (NCCL, bf16 compute on fp32 master weights) and on CPU (gloo, fp32); init_distributed and load_sharded
hold all that differs.
"""

import copy
import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

# --- the formulas ---------------------------------------------------------------------------------------------------------------


def logprobs_from_logits(logits, targets, temperature=1.0):
    """log pi(target) under softmax(logits / temperature). logits [B, T, V], targets [B, T] -> [B, T], float32."""
    logits = logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def token_logprobs(model, input_ids, attention_mask=None, temperature=1.0):
    """Log-probabilities of the next tokens, at the temperature they were sampled at: [B, T] ids -> [B, T-1].

    Entry t is log pi(input_ids[t+1] | input_ids[:t+1]). Rows padded on the right need no attention mask: a causal model's real tokens
    never see what comes after them.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]  # [B, T-1, V]
    return logprobs_from_logits(logits, input_ids[:, 1:], temperature)


def token_entropy(logits, temperature=1.0):
    """Entropy in nats of softmax(logits / temperature): [B, T, V] -> [B, T]."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def whiten(advantages, action_mask):
    """Advantages with mean 0 and unbiased variance 1 over the action tokens of all ranks; 0 elsewhere. [B, T] each -> [B, T].

    The released code whitens each micro-batch by itself; called once on an iteration's episodes, the result does not depend on how they
    are batched. Advantages that are all equal become 0.
    """
    mask = action_mask.to(torch.float64)
    values = advantages.to(torch.float64) * mask
    count, total = sum_over_ranks(torch.stack([mask.sum(), values.sum()])).tolist()
    centred = (values - total / max(count, 1)) * mask
    variance = sum_over_ranks((centred**2).sum()).item() / max(count - 1, 1)
    return (centred / max(variance**0.5, 1e-8)).to(advantages.dtype)


def ppo_loss(logprobs, old_logprobs, ref_logprobs, advantages, action_mask, clip=0.2, kl_coef=1e-4, num_tokens=None, num_responses=None):
    """Clipped policy loss plus KL penalty. All tensors [B, T]; action_mask is 1 on the response's tokens.

        policy = 1/num_tokens    sum_tokens max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),   rho = pi / pi_old
        kl     = 1/num_responses sum_tokens clamp(exp(d) - d - 1, 0, 10),                    d = log pi_ref - log pi    (k3 estimator)

    num_tokens and num_responses are those of the whole minibatch over all ranks, so the losses of its micro-batches add up to the
    minibatch's; None means that these B responses are the minibatch. Returns (loss, metrics): metrics are this micro-batch's
    contributions to the minibatch's means, detached scalars that add up likewise. Source: the released code's PPO trainer (paper.md).
    """
    mask = action_mask.to(logprobs.dtype)
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    num_responses = len(mask) if num_responses is None else num_responses
    keep = action_mask.bool()
    log_ratio = torch.where(keep, logprobs - old_logprobs, 0.0)  # where, not *: padding may hold anything, infinities too
    advantages = torch.where(keep, advantages, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    policy_loss = (torch.maximum(unclipped, clipped) * mask).sum() / num_tokens
    d = torch.where(keep, ref_logprobs - logprobs, 0.0)
    kl = (torch.clamp(d.exp() - d - 1, 0, 10) * mask).sum() / num_responses
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "kl_loss": kl_coef * kl.detach(),
            "ratio": (ratio * mask).sum() / num_tokens,
            "clip_fraction": ((clipped > unclipped) * mask).sum() / num_tokens,
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum() / num_tokens,  # of pi against pi_old, in nats per token
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


def load_sharded(path, device, trainable=True, bfloat16=None, checkpoint_activations=False, architecture=AutoModelForCausalLM, **options):
    """A causal language model from a Hugging Face folder or hub name, sharded over all ranks layer by layer with FSDP2.

    A trainable model has fp32 master weights. A frozen one is kept in the compute type, and on GPUs its shards live in host memory
    and visit the GPU layer by layer while it computes. bfloat16: compute in bf16; None means on GPUs only. architecture: another head of
    the same backbone, with its options for the configuration.
    """
    compute = compute_dtype(device, bfloat16)
    config = AutoConfig.from_pretrained(path)
    # without dropout: the old and the new log-probabilities must be of one and the same policy
    no_dropout = {name: 0.0 for name in vars(config) if name.endswith(("dropout", "pdrop"))}
    for name, value in (no_dropout | options).items():
        setattr(config, name, value)
    dtype = "auto" if trainable else compute
    model = architecture.from_pretrained(path, config=config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(trainable).train(trainable)
    if checkpoint_activations:
        model.gradient_checkpointing_enable()
    sharding = dict(
        mesh=dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if device.type == "cuda" and not trainable else OffloadPolicy(),
    )
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for module in (*layers, model):
        # a layer becomes fp32 just before it is sharded: a bf16 checkpoint never stands whole in fp32 on a rank
        fully_shard(module.float() if trainable else module, **sharding)
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


# --- episodes as batches --------------------------------------------------------------------------------------------------------


def collate(episodes, names, device):
    """Pad to the longest on the right: input_ids [N, T]; action_mask and the per-token lists `names` of the episodes [N, T-1], aligned to
    the next token, 0 where an episode has none; lengths, a list of N.
    """
    lengths = [len(e["prompt_ids"]) + len(e["response_ids"]) for e in episodes]
    batch = {"input_ids": torch.zeros(len(episodes), max(lengths), dtype=torch.long)}  # [N, T]
    for name in ("action_mask", *names):
        batch[name] = torch.zeros(len(episodes), max(lengths) - 1)  # [N, T-1]
    for i, e in enumerate(episodes):
        start, stop = len(e["prompt_ids"]) - 1, lengths[i] - 1
        batch["input_ids"][i, : stop + 1] = torch.tensor(e["prompt_ids"] + e["response_ids"])
        batch["action_mask"][i, start:stop] = 1.0
        for name in names:
            batch[name][i, start:stop] = torch.tensor(e.get(name) or [0.0] * (stop - start))
    return {name: tensor.to(device) for name, tensor in batch.items()} | {"lengths": lengths}


def micro_batch(batch, rows):
    """The rows of a batch, cut to their own longest: [B, T'] ids, [B, T'-1] the rest."""
    length = max(batch["lengths"][i] for i in rows)
    return {name: t[rows, : length if name == "input_ids" else length - 1] for name, t in batch.items() if name != "lengths"}


def minibatches(num_episodes, size, epochs, seed):
    """Row numbers of each minibatch of `size` episodes, in an order of its own in every epoch. seed: a tuple of ints."""
    if not num_episodes or num_episodes % size:
        raise ValueError(f"{num_episodes} episodes on this rank do not divide into minibatches of {size}")
    for epoch in range(epochs):
        yield from torch.randperm(num_episodes, generator=torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)).split(size)


def count_over_ranks(batch, rows):
    """(action tokens, responses) of a minibatch over all ranks."""
    counts = torch.tensor([float(batch["action_mask"][rows].sum()), float(len(rows))], device=batch["action_mask"].device)
    return sum_over_ranks(counts).tolist()


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
    run, for the learning rate's decay. minibatch: episodes per optimizer step over all ranks. micro_batch: episodes per forward pass of a
    rank; it changes memory and speed, not the result. epochs: passes over the episodes in each update. whiten_advantages: GRPO and RLOO
    bring advantages that are scaled already.
    """

    MAX_RATIO = 10.0  # a step whose mean ratio exceeds this is skipped (paper.md)

    def __init__(
        self, model, device, *, total_steps, learning_rate=1e-6, minibatch=64, micro_batch=4, epochs=2, clip=0.2, kl_coef=1e-4,
        temperature=1.0, max_grad_norm=1.0, whiten_advantages=True, bfloat16=None, checkpoint_activations=False, seed=0,
    ):  # fmt: skip
        self.device, self.total_steps, self.peak = device, total_steps, learning_rate
        self.minibatch, self.micro_batch, self.epochs = minibatch // dist.get_world_size(), micro_batch, epochs
        self.clip, self.kl_coef, self.temperature, self.max_grad_norm = clip, kl_coef, temperature, max_grad_norm
        self.whiten_advantages, self.seed, self.step, self.compute_dtype = whiten_advantages, seed, 0, compute_dtype(device, bfloat16)
        self.model = load_sharded(model, device, True, bfloat16, checkpoint_activations)
        self.reference = load_sharded(model, device, False, bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0, fused=device.type == "cuda")

    def update(self, episodes):
        """Train on one iteration's episodes of this rank; every rank brings the same number, a multiple of its share of the minibatch.

        episodes: dicts with prompt_ids, response_ids (lists of ids), advantages (one per response id, not yet whitened) and, for the
        logprob_gap metric, engine_logprobs (one per response id at temperature 1). Returns metrics over all ranks: means over the
        minibatches of what ppo_loss and the optimizer report, and those of the episodes (entropy, kl, logprob_gap) before the update;
        skipped_steps of this update, gradient_steps of all so far.
        """
        batch = collate(episodes, ["advantages", "engine_logprobs"], self.device)
        if self.whiten_advantages:
            batch["advantages"] = whiten(batch["advantages"], batch["action_mask"])
        metrics = self._score(batch)
        steps = [
            self._optimizer_step(batch, rows) for rows in minibatches(len(episodes), self.minibatch, self.epochs, (self.seed, self.step))
        ]
        skipped = sum(step.pop("skipped") for step in steps)
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        return metrics | means | {"skipped_steps": skipped, "gradient_steps": self.step}

    def _optimizer_step(self, batch, rows):
        """One gradient step on the episodes `rows` of this rank and the other ranks' shares."""
        lr = learning_rate(self.step, self.total_steps, self.peak)
        num_tokens, num_responses = count_over_ranks(batch, rows)
        self.optimizer.zero_grad()
        sums = None
        for micro in rows.split(self.micro_batch):
            m = micro_batch(batch, micro)
            logprobs = token_logprobs(self.model, m["input_ids"], temperature=self.temperature)  # [B, T-1]
            loss, metrics = ppo_loss(
                logprobs, m["old_logprobs"], m["ref_logprobs"], m["advantages"], m["action_mask"],
                self.clip, self.kl_coef, num_tokens, num_responses,
            )  # fmt: skip
            (loss * dist.get_world_size()).backward()  # FSDP averages gradients over the ranks; the minibatch's gradient is their sum
            values = torch.stack([loss.detach(), *metrics.values()])
            sums = values if sums is None else sums + values
        means = dict(zip(["loss", *metrics], sum_over_ranks(sums).tolist()))
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm).full_tensor().item()
        skipped = not (means["ratio"] <= self.MAX_RATIO and grad_norm < float("inf"))  # also true of NaN; the same on all ranks
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.step += 1
        return means | {"grad_norm": grad_norm, "learning_rate": lr, "skipped": skipped}

    @torch.no_grad()
    def _score(self, batch):
        """Add old_logprobs and ref_logprobs to the batch, [N, T-1] each; one pass of each policy, before the first optimizer step.

        The engine reports log-probabilities at temperature 1 and before top-p, since those are defined alike on both sides; so
        logprob_gap compares them with the trainer's at temperature 1, from the same logits.
        """
        batch["old_logprobs"], batch["ref_logprobs"] = torch.zeros_like(batch["advantages"]), torch.zeros_like(batch["advantages"])
        sums = torch.zeros(3, device=self.device)
        for rows in torch.arange(len(batch["lengths"])).split(self.micro_batch):
            m = micro_batch(batch, rows)
            targets, mask = m["input_ids"][:, 1:], m["action_mask"]  # [B, T-1]
            logits = self.model(input_ids=m["input_ids"], use_cache=False).logits[:, :-1]  # [B, T-1, V]
            old = logprobs_from_logits(logits, targets, self.temperature)
            gap = (logprobs_from_logits(logits, targets) - m["engine_logprobs"]).abs()
            entropy = token_entropy(logits, self.temperature)
            del logits
            ref = token_logprobs(self.reference, m["input_ids"], temperature=self.temperature)
            batch["old_logprobs"][rows, : old.shape[1]], batch["ref_logprobs"][rows, : ref.shape[1]] = old, ref
            d = ref - old
            sums += torch.stack([(x * mask).sum() for x in (entropy, torch.clamp(d.exp() - d - 1, 0, 10), gap)])
        self.reference.reshard()  # FSDP leaves the root's parameters gathered after a forward pass
        counts = torch.stack([batch["action_mask"].sum(), torch.tensor(float(len(batch["lengths"])), device=self.device)])
        entropy, kl, gap, tokens, responses = sum_over_ranks(torch.cat([sums, counts])).tolist()
        return {"entropy": entropy / tokens, "kl": kl / responses, "logprob_gap": gap / tokens}

    def save(self, folder):
        """Write the sharded weights and optimizer state, all ranks together; load reads them back, on any number of ranks."""
        save_state(folder, self.model, self.optimizer, self.step)

    def load(self, folder):
        self.step = load_state(folder, self.model, self.optimizer)
