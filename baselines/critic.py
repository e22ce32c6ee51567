"""PPO's value network: a second copy of the policy's backbone with a value head, trained beside it,
and GAE on its predictions.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)      V(s_t) predicted for every token; 0 after the last one
    A_t = delta_t + gamma lambda A_{t+1}           the network's target is A_t + V(s_t)

Source: arXiv 1506.02438; the paper has gamma = lambda = 1.

The reward comes with the last token; an unfinished response has reward 0 and value 0 after it.
The head starts at zero.
"""

import torch
from transformers import AutoModelForTokenClassification
from transformers.utils import logging

from episode import Estimator
from learner import Learner, per_token
from model import load_sharded
from support.ranks import sum_over_ranks


def gae(values, reward, gamma=1.0, lam=1.0):
    """Generalized advantage estimates [N] of a response's tokens from their values [N] and its reward."""
    advantages, following, after = [0.0] * len(values), 0.0, 0.0  # A_{t+1}, V(s_{t+1})
    for t in reversed(range(len(values))):
        delta = (reward if t == len(values) - 1 else 0.0) + gamma * after - values[t]
        advantages[t] = following = delta + gamma * lam * following
        after = values[t]
    return advantages


def value_loss(values, old_values, returns, clip=0.2, num_tokens=None):
    """1/num_tokens sum_tokens 1/2 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2).

    All tensors [N].

    num_tokens is that of the whole minibatch over all ranks, so the losses of its micro-batches add
    up; None: these tokens are the minibatch.
    """
    clipped = values.clamp(old_values - clip, old_values + clip)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * errors.sum() / (len(errors) if num_tokens is None else num_tokens)


class ValueNetwork(torch.nn.Module):
    """A token classifier with one class; its forward gives V of the state before each action token."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        for name, parameter in network.named_parameters():
            if name.startswith(("score.", "classifier.")):
                # from_pretrained draws the missing head at random, on each rank anew
                torch.nn.init.zeros_(parameter)

    def forward(self, m):
        """[N], float32, for the N action tokens of a MicroBatch."""
        return self.network(**m.inputs(), use_cache=False).logits[0, m.positions, 0].float()


class Critic(Estimator):
    """The value network, sharded like the policy. loading: see load_sharded; learning: see Learner."""

    def __init__(self, path, device, *, gamma=1.0, gae_lambda=1.0, clip=0.2, loading=None, **learning):
        self.device, self.gamma, self.gae_lambda, self.clip = device, gamma, gae_lambda, clip
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # else it reports that the folder has no value head
        network = dict(wrapper=ValueNetwork, architecture=AutoModelForTokenClassification)
        head = dict(num_labels=1, classifier_dropout=0.0)
        self.model = load_sharded(path, device, **network, **head, **(loading or {}))
        logging.set_verbosity(verbosity)
        self.networks = (self.model,)
        self.learner = Learner(self.model, device, **learning)

    @torch.no_grad()
    def set_advantages(self, episodes):
        """Set the advantages of this rank's episodes, the values they come from, and the returns."""
        values = torch.zeros(sum(len(e.response_ids) for e in episodes), device=self.device)  # [N]
        for m in self.learner.micro_batches(episodes):
            values[m.tokens] = self.model(m)
        for e, part in zip(episodes, values.split([len(e.response_ids) for e in episodes])):
            e.token_values = part.tolist()
            e.advantages = gae(e.token_values, e.reward, self.gamma, self.gae_lambda)
            e.returns = [a + v for a, v in zip(e.advantages, e.token_values)]
        self.model.reshard()  # FSDP leaves the root's parameters gathered after a forward pass

    def update(self, episodes):
        """Fit the network to the returns of the episodes whose advantages it has set.

        Returns metrics over all ranks; explained_variance is that of the predictions from which the
        advantages came.
        """
        old_values, returns = (per_token(episodes, name, self.device) for name in ("token_values", "returns"))

        def loss_of(m, num_responses, num_tokens):
            known = old_values[m.tokens], returns[m.tokens]
            return value_loss(self.model(m), *known, self.clip, num_tokens), {}

        found = self.learner.fit(episodes, loss_of)
        names = dict(value_loss="loss", critic_grad_norm="grad_norm", critic_skipped_steps="skipped_steps")
        explained = explained_variance(old_values, returns)
        return {new: found[old] for new, old in names.items()} | {"explained_variance": explained}

    def save(self, folder):
        """Write weights, optimizer and step count, sharded. All ranks call it."""
        self.learner.save(folder / "critic")

    def load(self, folder):
        self.learner.load(folder / "critic")


def explained_variance(values, returns):
    """1 - Var(G - V) / Var(G) over all ranks' action tokens, [N] each; 0 if all returns are equal."""
    returns, errors = returns.double(), (returns - values).double()
    sums = [
        returns.new_tensor(len(returns)),
        *((x**power).sum() for x in (returns, errors) for power in (1, 2)),
    ]
    n, g, gg, e, ee = sum_over_ranks(torch.stack(sums)).tolist()
    n = max(n, 1)
    variance = gg / n - (g / n) ** 2
    return 1 - (ee / n - (e / n) ** 2) / variance if variance > 1e-12 else 0.0
