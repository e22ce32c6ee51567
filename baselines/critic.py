"""PPO's value network: a second copy of the policy's backbone with a value head, trained beside it, and GAE on its predictions.

    V(s_t) predicted for every token position;  delta_t = r_t + gamma V(s_{t+1}) - V(s_t),  V = 0 after the last token
    A_t = delta_t + gamma lambda A_{t+1};  the network's target is A_t + V(s_t)           (arXiv 1506.02438; paper.md: gamma = lambda = 1)

The reward comes with the last token; a response without an end has reward 0 and no value behind it. The head starts at zero.
"""

import torch
import torch.distributed as dist
from transformers import AutoModelForTokenClassification
from transformers.utils import logging

import ppo


def gae(values, reward, gamma=1.0, lam=1.0):
    """Generalized advantage estimates [T] from values[t] = V(s_t), t = 0..T-1, of the tokens of one response and its reward."""
    advantages, following, after = [0.0] * len(values), 0.0, 0.0  # A_{t+1}, V(s_{t+1})
    for t in reversed(range(len(values))):
        delta = (reward if t == len(values) - 1 else 0.0) + gamma * after - values[t]
        advantages[t] = following = delta + gamma * lam * following
        after = values[t]
    return advantages


def value_loss(values, old_values, returns, clip=0.2, num_tokens=None):
    """1/num_tokens sum_tokens 1/2 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2). All tensors [N]; returns the scalar.

    num_tokens is that of the whole minibatch over all ranks, so the losses of its micro-batches add up; None: these tokens are the minibatch.
    """
    clipped = values.clamp(old_values - clip, old_values + clip)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * errors.sum() / (len(errors) if num_tokens is None else num_tokens)


class Critic:
    """The value network and its optimizer, sharded over the ranks like the policy. The settings are those of ppo.Trainer."""

    def __init__(
        self, model, device, *, total_steps, learning_rate, minibatch, micro_batch_tokens=8192, epochs=2, gamma=1.0, gae_lambda=1.0, clip=0.2,
        max_grad_norm=1.0, bfloat16=None, checkpoint_activations=False, hybrid=False, seed=0, trust_remote_code=False,
    ):  # fmt: skip
        self.device, self.total_steps, self.peak = device, total_steps, learning_rate
        self.minibatch, self.micro_batch_tokens, self.epochs = minibatch // dist.get_world_size(), micro_batch_tokens, epochs
        self.gamma, self.gae_lambda, self.clip, self.max_grad_norm, self.seed = gamma, gae_lambda, clip, max_grad_norm, seed
        self.step, self.skipped = 0, 0  # skipped: steps in a row
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # else it reports that the folder has no value head
        self.model = ppo.load_sharded(
            model, device, True, bfloat16, checkpoint_activations, hybrid, trust_remote_code, AutoModelForTokenClassification,
            num_labels=1, classifier_dropout=0.0,
        )  # fmt: skip
        logging.set_verbosity(verbosity)
        for name, parameter in self.model.named_parameters():
            if name.startswith(("score.", "classifier.")):
                torch.nn.init.zeros_(parameter)  # from_pretrained draws the missing head at random, on each rank anew
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0, fused=device.type == "cuda")

    def _values(self, micro):
        """V of the state before each action token of a micro-batch: [N], float32."""
        return self.model(**micro["inputs"], use_cache=False).logits[0, micro["positions"], 0].float()

    @torch.no_grad()
    def set_advantages(self, episodes):
        """Set the token advantages of this rank's episodes (dicts with prompt_ids, response_ids, reward), their values and returns."""
        batch = ppo.collate(episodes, [], self.device)
        values = torch.zeros(batch["spans"][-1][1], device=self.device)
        for m in ppo.micro_batches(batch, range(len(episodes)), self.micro_batch_tokens):
            values[m["tokens"]] = self._values(m)
        values = values.tolist()
        for e, (start, stop) in zip(episodes, batch["spans"]):
            e["values"] = values[start:stop]
            e["advantages"] = gae(e["values"], e["reward"], self.gamma, self.gae_lambda)
            e["returns"] = [a + v for a, v in zip(e["advantages"], e["values"])]
        self.model.reshard()  # FSDP leaves the root's parameters gathered after a forward pass

    def update(self, episodes):
        """Fit the network to the returns of the episodes whose advantages it has set: every rank brings as many. Returns metrics over all ranks.

        explained_variance: 1 - Var(G - V) / Var(G) over the action tokens, of the predictions that the advantages came from.
        """
        batch = ppo.collate(episodes, ["values", "returns"], self.device)
        losses, norms, skips = [], [], 0
        for rows in ppo.minibatches(len(episodes), self.minibatch, self.epochs, (self.seed, self.step)):
            num_tokens, _ = ppo.count_over_ranks(batch, rows)
            self.optimizer.zero_grad()
            total = torch.zeros((), device=self.device)
            for m in ppo.micro_batches(batch, rows, self.micro_batch_tokens):
                loss = value_loss(self._values(m), m["values"], m["returns"], self.clip, num_tokens)
                (loss * dist.get_world_size()).backward()  # FSDP averages gradients over the ranks; the minibatch's gradient is their sum
                total += loss.detach()
            losses.append(ppo.sum_over_ranks(total).item())
            norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm).full_tensor().item())
            skipped = not (losses[-1] < float("inf") and norms[-1] < float("inf"))  # true of NaN, too; the same on all ranks
            if not skipped:
                for group in self.optimizer.param_groups:
                    group["lr"] = ppo.learning_rate(self.step, self.total_steps, self.peak)
                self.optimizer.step()
            skips += skipped
            numbers = {"value_loss": losses[-1], "critic_grad_norm": norms[-1]}
            self.skipped = ppo.count_skipped(self.skipped, skipped, ppo.Trainer.MAX_SKIPPED, numbers)
            self.step += 1
        mean = {"value_loss": losses, "critic_grad_norm": norms, "explained_variance": [explained_variance(batch["tokens"])]}
        return {name: sum(x) / len(x) for name, x in mean.items()} | {"critic_skipped_steps": skips}

    def save(self, folder):
        """Write the sharded weights and optimizer state, all ranks together; load reads them back, on any number of ranks."""
        ppo.save_state(folder, self.model, self.optimizer, self.step)

    def load(self, folder):
        self.step = ppo.load_state(folder, self.model, self.optimizer)


def explained_variance(tokens):
    """1 - Var(G - V) / Var(G) over the action tokens of all ranks; 0 where the returns are all equal. tokens: returns, values [N]."""
    returns, errors = tokens["returns"].double(), (tokens["returns"] - tokens["values"]).double()
    sums = [returns.new_tensor(len(returns)), *((x**power).sum() for x in (returns, errors) for power in (1, 2))]
    n, g, gg, e, ee = ppo.sum_over_ranks(torch.stack(sums)).tolist()
    n = max(n, 1)
    variance = gg / n - (g / n) ** 2
    return 1 - (ee / n - (e / n) ** 2) / variance if variance > 1e-12 else 0.0
