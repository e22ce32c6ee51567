"""The interface of an algorithm: where advantages come from.

To add an algorithm, write an Estimator. baselines/groups.py (GRPO, RLOO) is the shortest example, vine.py the
main one. Then name it in ALGORITHMS and make_estimator, both in train.py. Its advantages are whitened with --whiten
True. It can use a setting of another algorithm, such as --K, once BELONGS_TO in support/checks.py names it there.
"""


class Estimator:
    """Sets the advantages. `set_advantages` is required, the other methods are optional.

    train.py calls start, finish, set_advantages and update, in this order, in every iteration.
    """

    networks = ()  # sharded models of its own, which train beside the policy
    states = None  # the States that were valued in this iteration, for metrics; None: it values no states

    def start(self, episode):
        """A response has ended while others are still generated: begin what can be begun.

        Ranks call it at different times: it must not talk to other ranks.
        """

    def finish(self, phase):
        """Complete what start began. All ranks call it, and the engine still runs.

        phase(name, can_stop): a part of the run, which is timed; see Watch.phase in support/watch.py. With can_stop,
        one rank can stop or fail alone, so such a phase holds no collectives.
        """
        with phase("values"):
            self.rebalance()
        with phase("values", can_stop=True):
            self.wait()

    def rebalance(self):
        """All ranks have their responses: exchange work with other ranks."""

    def wait(self):
        """Wait for what this rank's engine has begun, without talking to other ranks."""

    def set_advantages(self, episodes):
        """Set `advantages` of this rank's episodes, a float for each response token.

        All ranks call it, and the engine sleeps.
        """
        raise NotImplementedError

    def update(self, episodes):
        """Train its own networks, after the policy. All ranks call it. Returns metrics."""
        return {}

    def save(self, folder):
        """Write what a resumed run needs of it into a checkpoint's folder, which need not exist yet."""

    def load(self, folder):
        """Read what save wrote, before the first iteration of a resumed run."""
