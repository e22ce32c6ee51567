"""Advantages without values: a response is compared with the other responses to its problem.

GRPO and RLOO.

All tokens of a response get its one advantage. The loss, the KL term and the sampling are those of
train.py for every algorithm, so GRPO here has PPO's mean over the tokens of the minibatch where its
authors take the mean of each response first.
"""

import statistics

from estimator import Estimator


def grpo(rewards):
    """(R_i - mean) / std of the group, unbiased; zeros if all are equal (arXiv 2402.03300, section 4.1)."""
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    return [(r - mean) / std if std > 0 else 0.0 for r in rewards]


def rloo(rewards):
    """R_i minus the mean reward of the group's others (arXiv 2402.14740, section 3.3)."""
    total = sum(rewards)
    return [r - (total - r) / (len(rewards) - 1) for r in rewards]


class Group(Estimator):
    """formula: grpo or rloo. size: of a group, at least 2: this many episodes in a row answer one problem."""

    def __init__(self, formula, size):
        self.formula, self.size = formula, size

    def set_advantages(self, episodes):
        for i in range(0, len(episodes), self.size):
            members = episodes[i : i + self.size]
            for e, advantage in zip(members, self.formula([e.reward for e in members])):
                e.advantages = [advantage] * len(e.response_ids)
