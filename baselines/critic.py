"""PPO's value network, a second copy of the policy's backbone with a value head, and GAE on its predictions.

    delta_t = r_t + V(s_{t+1}) - V(s_t)      V(s_t) predicted for every token; 0 after the last one
    A_t = delta_t + lambda A_{t+1}           the network's target is A_t + V(s_t)

Source: arXiv 1506.02438, without a discount (gamma = 1); the paper has lambda = 1. The reward comes with the
last token; an unfinished response has reward 0 and value 0 after its end. The head starts at zero.
"""

import torch
from transformers import AutoModelForTokenClassification
from transformers.utils import logging

from estimator import Estimator
from learner import Learner, minibatches, optimizer_steps, per_token
from model import load_sharded
from support.ranks import sum_over_ranks


def gae(values, reward, lam=1.0):
    """Generalized advantage estimates [N] of a response's tokens, from their values [N] and the reward."""
    advantages, following, after = [0.0] * len(values), 0.0, 0.0  # A_{t+1}, V(s_{t+1})
    for t in reversed(range(len(values))):
        delta = (reward if t == len(values) - 1 else 0.0) + after - values[t]
        advantages[t] = following = delta + lam * following
        after = values[t]
    return advantages


def value_loss(values, old_values, returns, num_tokens, *, clip=0.2):
    """1/num_tokens sum_tokens 1/2 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2).

    All tensors [N]. num_tokens counts the whole minibatch over all ranks, so micro-batches' losses add up.
    """
    clipped = values.clamp(old_values - clip, old_values + clip)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * errors.sum() / num_tokens


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
    """The value network, sharded like the policy. s: ppo.Trainer's settings, critic_learning_rate and
    gae_lambda.
    """

    def __init__(self, s, device):
        self.s, self.device = s, device
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # else it would report that the folder has no value head
        network = dict(wrapper=ValueNetwork, architecture=AutoModelForTokenClassification)
        head = dict(num_labels=1, classifier_dropout=0.0)
        loading = dict(bfloat16=s.bfloat16, trust_remote_code=s.trust_remote_code)
        self.model = load_sharded(s.model, device, **network, **head, **loading)
        logging.set_verbosity(verbosity)
        self.networks = (self.model,)
        self.lam = 1.0 if s.gae_lambda is None else s.gae_lambda
        rate = s.critic_learning_rate or s.learning_rate
        self.learner = Learner(
            self.model, device, rate, optimizer_steps(s), micro_batch_tokens=s.micro_batch_tokens
        )

    @torch.no_grad()
    def set_advantages(self, episodes):
        """Set the advantages of this rank's episodes, their values and their returns."""
        values = torch.zeros(sum(len(e.response_ids) for e in episodes), device=self.device)  # [N]
        for m in self.learner.micro_batches(episodes):
            values[m.tokens] = self.model(m)
        for e, part in zip(episodes, values.split([len(e.response_ids) for e in episodes])):
            e.token_values = part.tolist()
            e.advantages = gae(e.token_values, e.reward, self.lam)
            e.returns = [a + v for a, v in zip(e.advantages, e.token_values)]
        self.model.reshard()  # FSDP leaves the root's parameters gathered after a forward pass

    def update(self, episodes):
        """Fit the network to the returns of the episodes whose advantages it has set.

        Returns metrics over all ranks; explained_variance is of the predictions behind the advantages.
        """
        old_values = per_token(episodes, "token_values", self.device)  # [N]
        returns = per_token(episodes, "returns", self.device)  # [N]
        batches = minibatches(len(episodes), self.s, self.learner.step)
        for step in self.learner.steps(episodes, batches):
            for m in step.micro_batches():
                values = self.model(m)  # [N of m]
                step.backward(value_loss(values, old_values[m.tokens], returns[m.tokens], step.num_tokens))
        found = self.learner.means()
        return {
            "value_loss": found["loss"],
            "critic_grad_norm": found["grad_norm"],
            "critic_skipped_steps": found["skipped_steps"],
            "explained_variance": explained_variance(old_values, returns),
        }

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
