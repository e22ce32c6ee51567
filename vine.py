"""VinePPO's estimator: the value of each step, measured by rollouts (arXiv 2410.01679, section 4).

A response is cut into steps (steps.py); the state s_t is the prompt followed by the first t steps.
K rollouts tau_k continue from it, sampled by the current policy, and serve its value alone: no
gradient flows through them.

    V(s_t) = 1/K sum_k R(tau_k)
    A_t    = r_t + V(s_{t+1}) - V(s_t)      r_t = 0, but R, the response's reward, for the last step;
                                            V(s_T) = 0 after it

Every token of step t gets A_t. targets_and_baselines averages several V, with less noise.
"""

from collections import defaultdict

from episode import Estimator, State
from grader import set_rewards
from steps import step_boundaries
from support.ranks import gather_lists


def monte_carlo_value(rewards):
    """V(s) = 1/K sum_k R(tau_k): the mean of a state's K rollout rewards. Unbiased for every K >= 1."""
    return sum(rewards) / len(rewards)


def targets_and_baselines(values, reward, lam=0.0, smoothing=0.0, shared=None):
    """(G [T], B [T]) of the steps of a response; A_t = G_t - B_t. The paper's: lam = smoothing = 0.

    values [T]: V_t, of V(s_t) by its own rollouts; reward: R.

        G_t = (1 - lam) V_{t+1} + lam G_{t+1}             G_{T-1} = R
        B_t = (1 - smoothing) V_t + smoothing B_{t-1}     B_0 = V_0

    V_{t+1}, .., V_{T-1} and R are unbiased estimates of Q(s_t, step t): the response itself went on
    from s_{t+1} by the same policy. So is any average of them, G_t. V_t is not, as its rollouts took
    other steps; a share of it in G_t would scale the advantage down. V_0, .., V_t are not influenced
    by step t, nor is B_t: E[B_t grad log pi(step t)] = 0. So the gradient is unbiased for every lam
    and smoothing, and less noisy, since each averages over the rollouts of several states.

    shared [T]: V_t for B_t, if other. None among the values, beyond --max_valued_steps, stands for R
    in G and B: such states' steps get 0, which is the cap's bias and the paper's.
    """
    filled = [reward if v is None else v for v in values]
    targets, baselines = [reward] * len(values), []
    for t in reversed(range(len(values) - 1)):
        targets[t] = (1 - lam) * filled[t + 1] + lam * targets[t + 1]
    for t, v in enumerate(shared or values):
        smooth = (1 - smoothing) * v + smoothing * baselines[-1] if t and v is not None else v
        baselines.append(reward if v is None else smooth)
    return targets, baselines


def step_advantages(values, reward, lam=0.0, smoothing=0.0, shared=None):
    """A_t [T] of the steps of a response (no discount); see targets_and_baselines.

    The paper's are V(s_{t+1}) - V(s_t), and R - V(s_{T-1}) for the last step; their sum is R - V(s_0).
    """
    return [g - b for g, b in zip(*targets_and_baselines(values, reward, lam, smoothing, shared))]


def token_advantages(boundaries, advantages):
    """One advantage per token [N], from those of the steps [T]: each token of step t gets A_t."""
    steps = zip(boundaries, boundaries[1:], advantages)
    return [a for start, stop, a in steps for _ in range(start, stop)]


class Vine(Estimator):
    """Monte Carlo values of an iteration's states.

    Rollouts from the states of a response begin as soon as that response ends. A state is sent to
    the engine as the very token ids that were sampled up to it. Equal states are valued once.
    States for which the engine has no room wait; once all ranks have their responses, they are
    dealt to engines with less to do. s: settings with K, step_credit, max_valued_steps, gae_lambda,
    baseline_smoothing, share_responses, max_tokens, temperature and top_p.
    """

    values_steps = True

    def __init__(self, engine, grader, s):
        self.engine, self.grader, self.s = engine, grader, s
        self.known = {}  # (prompt ids, prefix ids, gold) -> State, of this engine's responses
        self.borrowed = []  # states of other engines' responses that this engine values
        self.passing = defaultdict(list)  # State -> this engine's responses that pass through it

    def start(self, episode):
        """Submit the states of a response that are not known yet."""
        s, known = self.s, len(self.known)
        ids = episode.response_ids
        text, decode = episode.text, self.engine.decode
        episode.boundaries = step_boundaries(s.step_credit, text, ids, decode, episode.engine_logprobs)
        episode.states = states_of(episode, self.known, s.max_valued_steps, self.engine.number)
        for state in filter(None, episode.states):
            self.passing[state].append(episode)
        for state in list(self.known.values())[known:]:
            self._submit(state)

    def _submit(self, state):
        s = self.s
        limit = s.max_tokens - len(state.prefix_ids)  # what the state leaves of the response's limit
        self.engine.submit(state, s.K, limit, s.temperature, s.top_p)

    def rebalance(self):
        """Deal the waiting states so that all engines have the same amount left to sample.

        The rollouts from a state are expected to be as long as the rest of its own response.
        """
        # all responses have ended: what still runs are rollouts
        under_way = sum(state.tokens_left for state, _ in self.engine.running.values())
        waiting = self.engine.take_waiting()
        # one entry for each engine, from the rank that leads it
        engines = gather_lists([(under_way, waiting)] if self.engine.leads else [])
        own = list(self.known.values())  # own[i].number == i
        for state in even_out(*zip(*engines))[self.engine.number]:
            if state.engine == self.engine.number:
                state = own[state.number]  # the record itself: gather_lists returns copies
            else:
                self.borrowed.append(state)
            self._submit(state)

    def finish(self):
        """Wait until all rollouts have ended, and grade them."""
        while self.engine.running:
            self.engine.advance(self.grader)
        set_rewards(self.grader, [*self.known.values(), *self.borrowed])

    def set_advantages(self, episodes):
        """Set the values of the states, and from them the advantages of this rank's episodes."""
        own = list(self.known.values())
        # the rollouts that other engines sampled for this one come home
        for guest in gather_lists(self.borrowed if self.engine.leads else []):
            if guest.engine == self.engine.number:
                own[guest.number].rollouts = guest.rollouts
        for state in own:
            state.value = self._value(state)
        for e in episodes:
            e.step_values = [state and state.value for state in e.states]
            shared = None
            if self.s.share_responses:
                shared = [state and self._value(state, without=e) for state in e.states]
            options = self.s.gae_lambda or 0.0, self.s.baseline_smoothing, shared
            e.step_targets, e.step_baselines = targets_and_baselines(e.step_values, e.reward, *options)
            steps = [g - b for g, b in zip(e.step_targets, e.step_baselines)]
            e.advantages = token_advantages(e.boundaries, steps)
        # the next policy gives its states other values
        self.known, self.borrowed, self.passing = {}, [], defaultdict(list)

    def _value(self, state, without=None):
        """V of a state; with all responses that pass through it as rollouts, too, but one."""
        others = [e for e in self.passing[state] if e is not without] if without is not None else []
        return monte_carlo_value([r.reward for r in [*state.rollouts, *others]])


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

    loads [engines]: tokens that each has begun already, as State.tokens_left counts them; queues [engines]:
    lists of states. Returns the new queues. Neighbours in a queue, which share a prefix, mostly stay
    together.
    """
    queues, moved = [list(queue) for queue in queues], []
    loads = [load + sum(state.tokens_left for state in queue) for load, queue in zip(loads, queues)]
    mean = sum(loads) / len(loads)
    for i, queue in enumerate(queues):
        while queue and loads[i] - queue[-1].tokens_left >= mean:
            loads[i] -= queue[-1].tokens_left
            moved.append(queue.pop())
    for i, queue in enumerate(queues):
        while moved and loads[i] < mean:
            loads[i] += moved[-1].tokens_left
            queue.append(moved.pop())
    return queues
