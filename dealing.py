"""How states that wait move between engines. Read it last: it changes where rollouts are sampled, not their law.

A rank's own engine values the states of its own responses. Where a few long responses keep one engine busy,
states wait there while other engines have nothing to do. Once all ranks have their responses, the waiting
states are dealt anew. experiments/balance.py measures what that saves.
"""

from support.ranks import gather_lists
from vine import Vine


class DealtVine(Vine):
    """Vine whose waiting states move to engines with less to do."""

    def __init__(self, engine, grader, s):
        super().__init__(engine, grader, s)
        self.waiting = []  # this engine's own states, which were dealt to it and to others
        self.borrowed = []  # (owner, index in its `waiting`, State): states that this engine values for other engines

    def rebalance(self):
        """Deal the waiting states so that all engines have the same amount left to sample.

        The rollouts from a state are expected to be as long as the rest of its own response.
        """
        # all responses have ended: what still runs are rollouts
        running = sum(state.tokens_left for state, _ in self.engine.running.values())
        self.waiting, self.borrowed = self.engine.take_waiting(), []
        # one entry for each engine, from the rank that leads it
        engines = gather_lists([(running, self.waiting)] if self.engine.leads else [])
        loads = [load for load, _ in engines]
        sizes = [[state.tokens_left for state in waiting] for _, waiting in engines]
        for owner, i in even_out(loads, sizes)[self.engine.number]:
            if owner == self.engine.number:
                state = self.waiting[i]  # the record itself: gather_lists returns copies
            else:
                state = engines[owner][1][i]
                self.borrowed.append((owner, i, state))
            self.submit(state)

    def wait(self):
        super().wait()
        self.grader.set_rewards([state for _, _, state in self.borrowed])

    def set_advantages(self, episodes):
        # the rollouts that other engines sampled for this one come home
        for owner, i, state in gather_lists(self.borrowed if self.engine.leads else []):
            if owner == self.engine.number:
                self.waiting[i].rollouts = state.rollouts
        super().set_advantages(episodes)


def even_out(loads, sizes):
    """Deal items from queues that have too much to do to those that have too little.

    loads [queues]: what each queue has begun already, which stays; sizes [queues]: lists of the sizes of the
    items that wait in it. Returns for each queue its items as (the queue it comes from, index there):

        even_out([0, 0], [[5, 5, 5], [1]])  ->  [[(0, 0), (0, 1)], [(1, 0), (0, 2)]]

    Neighbours in a queue, which share a prefix, mostly stay together.
    """
    queues = [[(owner, i) for i in range(len(queue))] for owner, queue in enumerate(sizes)]
    loads, moved = [load + sum(queue) for load, queue in zip(loads, sizes)], []
    mean = sum(loads) / len(loads)
    for owner, queue in enumerate(queues):
        while queue and loads[owner] - sizes[owner][queue[-1][1]] >= mean:
            moved.append(queue.pop())
            loads[owner] -= sizes[owner][moved[-1][1]]
    for taker, queue in enumerate(queues):
        while moved and loads[taker] < mean:
            owner, i = moved[-1]
            loads[taker] += sizes[owner][i]
            queue.append(moved.pop())
    return queues
