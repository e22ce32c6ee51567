"""VinePPO's estimator: the value of each step, measured by rollouts (arXiv 2410.01679, section 4).

A response is cut into steps (steps.py); the state s_t is the prompt followed by the first t steps.
K rollouts tau_k continue from it, sampled by the current policy, and serve its value alone: no
gradient flows through them.

    V(s_t) = 1/K sum_k R(tau_k)
    A_t    = r_t + V(s_{t+1}) - V(s_t)      r_t = 0, but R, the response's reward, for the last step;
                                            V(s_T) = 0 after it

Every token of step t gets A_t.
"""

from episode import Estimator, State
from grader import set_rewards
from steps import step_boundaries
from support.ranks import over_ranks


def monte_carlo_value(rewards):
    """V(s) = 1/K sum_k R(tau_k): the mean of a state's K rollout rewards. Unbiased for every K >= 1."""
    return sum(rewards) / len(rewards)


def step_advantages(values, reward):
    """A_t of each of the T steps of a response, from values [T], V(s_t), and its reward R (no discount).

    A value of None (a state beyond --max_valued_steps) is taken to be R: the steps after such states
    get 0, and the step after the last valued state gets R - V. The sum is R - V(s_0).
    """
    filled = [reward if v is None else v for v in values]
    # A_t = V(s_{t+1}) - V(s_t); for the last step R + V(s_T) = R + 0 takes the place of V(s_{t+1})
    return [after - before for before, after in zip(filled, [*filled[1:], reward])]


def token_advantages(boundaries, advantages):
    """One advantage per token [N], from those of the steps [T]: each token of step t gets A_t."""
    steps = zip(boundaries, boundaries[1:], advantages)
    return [a for start, stop, a in steps for _ in range(start, stop)]


class Vine(Estimator):
    """Monte Carlo values of an iteration's states.

    Rollouts from the states of a response begin as soon as that response ends. A state is sent to
    the engine as the very token ids that were sampled up to it. Equal states are valued once.
    States for which the engine has no room wait; once all ranks have their responses, they are
    dealt to engines with less to do. s: settings with K, step_credit, max_valued_steps, max_tokens,
    temperature and top_p.
    """

    values_steps = True

    def __init__(self, engine, grader, s):
        self.engine, self.grader, self.s = engine, grader, s
        self.known = {}  # (prompt ids, prefix ids, gold) -> State, of this engine's responses
        self.guests = []  # states of other engines' responses that this engine values

    def start(self, episode):
        """Submit the states of a response that are not known yet."""
        s, known = self.s, len(self.known)
        ids = episode.response_ids
        episode.boundaries = step_boundaries(s.step_credit, episode.text, ids, self.engine.decode)
        episode.states = states_of(episode, self.known, s.max_valued_steps, self.engine.number)
        for state in list(self.known.values())[known:]:
            self._submit(state)

    def _submit(self, state):
        s = self.s
        limit = s.max_tokens - len(state.prefix_ids)  # what the state leaves of the response's limit
        self.engine.submit(state, s.K, limit, s.temperature, s.top_p)

    def deal(self):
        """Deal the waiting states so that all engines have the same amount left to sample.

        The rollouts from a state are expected to be as long as the rest of its own response.
        """
        # all responses have ended: what still runs are rollouts
        under_way = sum(state.rest for state, _ in self.engine.running.values())
        waiting = self.engine.take_waiting()
        # one entry for each engine, from the rank that leads it
        engines = over_ranks([(under_way, waiting)] if self.engine.leads else [])
        own = list(self.known.values())  # own[i].number == i
        for state in even_out(*zip(*engines))[self.engine.number]:
            if state.home == self.engine.number:
                state = own[state.number]  # the record itself: over_ranks returns copies
            else:
                self.guests.append(state)
            self._submit(state)

    def finish(self):
        """Wait until all rollouts have ended, and grade them."""
        while self.engine.running:
            self.engine.advance(self.grader)
        set_rewards(self.grader, [*self.known.values(), *self.guests])

    def set_advantages(self, episodes):
        """Set the values of the states, and from them the advantages of this rank's episodes."""
        own = list(self.known.values())
        # the rollouts that other engines sampled for this one come home
        for guest in over_ranks(self.guests if self.engine.leads else []):
            if guest.home == self.engine.number:
                own[guest.number].rollouts = guest.rollouts
        for state in own:
            state.value = monte_carlo_value([rollout.reward for rollout in state.rollouts])
        for e in episodes:
            e.step_values = [None if state is None else state.value for state in e.states]
            e.advantages = token_advantages(e.boundaries, step_advantages(e.step_values, e.reward))
        self.known, self.guests = {}, []  # the next policy gives its states other values


def states_of(episode, known, max_steps=None, home=0):
    """The states s_t, t = 0..T-1, of an episode whose boundaries are set; None from max_steps on.

    known: {(prompt ids, prefix ids, gold answer): State}, to which the new ones are added. Their ids
    are cut out of the sampled ones, never tokenized again. max_steps: max_step_for_value_estimation
    of the released configs.
    """
    prompt, ids, states = episode.prompt_ids, episode.response_ids, []
    for t, cut in enumerate(episode.boundaries[:-1]):
        if max_steps is not None and t >= max_steps:
            states.append(None)
            continue
        key = tuple(prompt), tuple(ids[:cut]), episode.answer
        if key not in known:
            rest = len(ids) - cut
            known[key] = State(prompt, ids[:cut], episode.answer, rest, home, number=len(known))
        states.append(known[key])
    return states


def even_out(loads, queues):
    """Move states from engines that have too much to do to those that have too little.

    loads [engines]: tokens that each has begun already, as State.rest counts them; queues [engines]:
    lists of states. Returns the new queues. Neighbours in a queue, which share a prefix, mostly stay
    together.
    """
    queues, moved = [list(queue) for queue in queues], []
    loads = [load + sum(state.rest for state in queue) for load, queue in zip(loads, queues)]
    mean = sum(loads) / len(loads)
    for i, queue in enumerate(queues):
        while queue and loads[i] - queue[-1].rest >= mean:
            loads[i] -= queue[-1].rest
            moved.append(queue.pop())
    for i, queue in enumerate(queues):
        while moved and loads[i] < mean:
            loads[i] += moved[-1].rest
            queue.append(moved.pop())
    return queues
