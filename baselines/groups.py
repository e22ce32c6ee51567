"""GRPO and RLOO, advantages without values: a response is compared with the other responses to its problem.

All tokens of a response get its one advantage. Loss, KL term and sampling are the same for every algorithm
of train.py, so GRPO here has PPO's mean over the tokens of the minibatch; its authors take the mean of each
response first.
"""

import statistics

from estimator import Estimator


def grpo(rewards):
    """(R_i - mean) / std of the group, unbiased; zeros if all are equal (arXiv 2402.03300, section 4.1)."""
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    return [(r - mean) / std if std > 0 else 0.0 for r in rewards]


def rloo(rewards):
    """R_i minus the mean reward of the others in the group (arXiv 2402.14740, section 3.3)."""
    total = sum(rewards)
    return [r - (total - r) / (len(rewards) - 1) for r in rewards]


class Group(Estimator):
    """formula: grpo or rloo. size: at least 2; this many consecutive episodes answer one problem."""

    def __init__(self, formula, size):
        self.formula, self.size = formula, size

    def set_advantages(self, episodes):
        for i in range(0, len(episodes), self.size):
            members = episodes[i : i + self.size]
            for e, advantage in zip(members, self.formula([e.reward for e in members])):
                e.advantages = [advantage] * len(e.response_ids)
