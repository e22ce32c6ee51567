"""VinePPO's estimator: the value of each step, measured by rollouts (arXiv 2410.01679, section 4).

A response is cut into steps (steps.py). The state s_t is the prompt followed by the first t steps. The
current policy samples K rollouts tau_k from it. They serve its value alone: no gradient flows through them.

    V(s_t) = 1/K sum_k R(tau_k)
    A_t    = V(s_{t+1}) - V(s_t)      and R - V(s_{T-1}) for the last step; R is the response's own reward

Every token of step t gets A_t. With --max_valued_steps only the first states have a value: the step of the last of
them gets R - V, and the tokens after it get 0.
"""

from episode import State
from estimator import Estimator
from steps import step_boundaries


def monte_carlo_value(rewards):
    """V(s) = 1/K sum_k R(tau_k): the mean of a state's K rollout rewards. Unbiased for every K >= 1."""
    return sum(rewards) / len(rewards)


def step_advantages(values, reward):
    """The paper's A_t [T] of a response's steps, from V(s_0) .. V(s_{T-1}) and its reward R."""
    return [after - before for before, after in zip(values, [*values[1:], reward])]


def averaged_advantages(values, reward, lam=0.0, smoothing=0.0):
    """(A [T], G [T], B [T]): A_t = G_t - B_t, averages over several states. lam = smoothing = 0: the paper's A_t.

    values [T], reward: as in step_advantages.

        G_t = (1 - lam) V_{t+1} + lam G_{t+1}             G_{T-1} = R
        B_t = (1 - smoothing) V_t + smoothing B_{t-1}     B_0 = V_0

    V_{t+1}, .., V_{T-1} and R are unbiased estimates of Q(s_t, step t), because the response itself went
    on from s_{t+1} by the same policy. So is any average of them, G_t. V_t is not: its rollouts took other
    steps, and a share of it in G_t would scale the advantage down. Step t does not influence V_0, .., V_t,
    so E[B_t grad log pi(step t)] = 0. The policy gradient is therefore as unbiased as the paper's, for every lam and
    smoothing. With smoothing = 0 this is GAE(lam) over steps, at gamma = 1.
    """
    targets, baselines = [reward] * len(values), list(values)
    for t in reversed(range(len(values) - 1)):
        targets[t] = (1 - lam) * values[t + 1] + lam * targets[t + 1]
    for t in range(1, len(values)):
        baselines[t] = (1 - smoothing) * values[t] + smoothing * baselines[t - 1]
    return [g - b for g, b in zip(targets, baselines)], targets, baselines


def token_advantages(boundaries, advantages):
    """One advantage per token [N]: each token of step t gets A_t, and tokens after the last A get 0."""
    steps = zip(boundaries, boundaries[1:], advantages)
    per_token = [a for start, stop, a in steps for _ in range(start, stop)]
    return per_token + [0.0] * (boundaries[-1] - len(per_token))


def states_of(episode, known, max_steps=None):
    """Set the states s_0 .. s_{T-1} of an episode whose boundaries are set; returns those that are new.

    known: {(prompt ids, prefix ids, gold answer): State}, to which the new ones are added, so that equal
    states are one. Their ids are cut out of the sampled ids and never tokenized again. max_steps: only the
    first max_steps states (max_step_for_value_estimation of the released configs).
    """
    new, ids, episode.states = [], episode.response_ids, []
    for cut in episode.boundaries[:-1][:max_steps]:
        key = tuple(episode.prompt_ids), tuple(ids[:cut]), episode.answer
        if key not in known:
            known[key] = State(episode.prompt_ids, ids[:cut], episode.answer, tokens_left=len(ids) - cut)
            new.append(known[key])
        episode.states.append(known[key])
    return new


class Vine(Estimator):
    """Monte Carlo values of an iteration's states.

    Rollouts from the states of a response begin as soon as that response ends. dealing.py lets other engines help.

    engine: decode(ids) -> text; submit(state, K, max_tokens, temperature, top_p); running: true while rollouts are
    under way; advance(grader): one step, which calls state.receive(its K completions) when they have ended. grader:
    set_rewards(states). s: settings with K, step_credit, max_valued_steps, gae_lambda, baseline_smoothing, max_tokens,
    temperature and top_p.
    """

    def __init__(self, engine, grader, s):
        self.engine, self.grader, self.s = engine, grader, s
        self.known = {}  # see states_of
        self.states = []

    def start(self, episode):
        s, ids, decode = self.s, episode.response_ids, self.engine.decode
        episode.boundaries = step_boundaries(
            s.step_credit, episode.text, ids, decode, episode.engine_logprobs
        )
        for state in states_of(episode, self.known, s.max_valued_steps):
            self.submit(state)

    def submit(self, state):
        """Sample K rollouts. A rollout may use the tokens that the state leaves of the response's limit."""
        s, limit = self.s, self.s.max_tokens - len(state.prefix_ids)
        self.engine.submit(state, s.K, limit, s.temperature, s.top_p)

    def wait(self):
        while self.engine.running:
            self.engine.advance(self.grader)
        self.grader.set_rewards(self.known.values())

    def set_advantages(self, episodes):
        """Values of the states, and from them the advantages of this rank's episodes."""
        lam, smoothing = self.s.gae_lambda or 0.0, self.s.baseline_smoothing
        for state in self.known.values():
            state.value = monte_carlo_value([rollout.reward for rollout in state.rollouts])
        for e in episodes:
            values = [state.value for state in e.states]
            if not lam and not smoothing:
                advantages = step_advantages(values, e.reward)
            else:
                advantages, e.step_targets, e.step_baselines = averaged_advantages(
                    values, e.reward, lam, smoothing
                )
            e.advantages = token_advantages(e.boundaries, advantages)
        self.states = list(self.known.values())
        self.known = {}  # the next policy gives its states other values
