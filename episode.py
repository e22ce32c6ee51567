"""The records that flow through everything, and the interface of an algorithm.

Problem (data.py) -> Episode, a response -> State, before each step -> Completion, a rollout from it
"""

import statistics
from dataclasses import dataclass, field

from steps import step_boundaries, token_starts


@dataclass(eq=False)
class Completion:
    """What the engine sampled after a prompt and prefix: a response, or a rollout from a state."""

    token_ids: list[int]  # as sampled, with EOS and the tokens of a stop string, which are actions too
    text: str  # of prefix and token_ids together, cut off before a stop string
    finished: bool  # ended by EOS or a stop string, not by the token limit
    logprobs: list[float] | None  # per token, at temperature 1, before top-p; None unless asked for
    reward: float = 0.0  # 1.0 if it is finished and its answer is right


@dataclass(eq=False)
class State:
    """s_t: a prompt and the first t steps of a response to it, valued by rollouts from it."""

    prompt_ids: list[int]
    prefix_ids: list[int]  # the very ids that were sampled up to here; empty: s_0, the prompt
    answer: str = ""  # gold
    tokens_left: int = 0  # tokens of its response after it: an estimate of the length of rollouts
    engine: int = 0  # number of the engine whose response it belongs to
    number: int = 0  # among the distinct states of that engine's responses
    rollouts: list[Completion] = field(default_factory=list)  # [K]
    value: float | None = None  # V(s_t)

    @property
    def responses(self):
        """What is graded."""
        return self.rollouts

    def receive(self, completions):
        self.rollouts = completions


@dataclass(eq=False)
class Episode:
    """One response to one problem, from its prompt to its advantages. N: its tokens; T: its steps."""

    prompt_ids: list[int]
    prompt: str = ""
    answer: str = ""  # gold
    # sampled: rollout.py
    response_ids: list[int] = field(default_factory=list)  # [N], EOS included where it was sampled
    text: str = ""  # cut off before a stop string
    finished: bool = False  # ended by EOS or a stop string, not by the token limit
    engine_logprobs: list[float] | None = None  # [N], at temperature 1 and before top-p
    reward: float = 0.0  # R: 1.0 if it is finished and its answer is right
    # steps and their values: vine.py
    boundaries: list[int] = field(default_factory=list)  # [T + 1], where each step begins; and N
    states: list[State | None] = field(default_factory=list)  # [T], before each step; None: not valued
    step_values: list[float | None] = field(default_factory=list)  # [T], V(s_t)
    step_targets: list[float] = field(default_factory=list)  # [T], G_t
    step_baselines: list[float] = field(default_factory=list)  # [T], B_t
    # a critic's: baselines/critic.py
    token_values: list[float] = field(default_factory=list)  # [N], predicted before each token
    returns: list[float] = field(default_factory=list)  # [N], what they are fitted to
    # what the loss uses: ppo.py
    advantages: list[float] = field(default_factory=list)  # [N], not yet whitened

    @property
    def prefix_ids(self):
        """Its response begins right after the prompt."""
        return []

    @property
    def responses(self):
        """What is graded."""
        return [self]

    def receive(self, completions):
        (c,) = completions
        self.response_ids, self.text, self.finished = c.token_ids, c.text, c.finished
        self.engine_logprobs = c.logprobs

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)

    def as_dict(self, decode, shown=2):
        """What is stored of it for experiments/show.py: prompt, answer, reward, finished, steps.

        A step: text, tokens (their number), advantage (their mean), value (of the state before it; None
        where the algorithm has none) and, where rollouts made the value, K, how many were right, their
        lengths in tokens, the texts of `shown` right and wrong ones, and the advantage's target and
        baseline if they are no plain values.
        """
        starts, steps = token_starts(self.response_ids, decode), []
        cuts = self.boundaries or step_boundaries("paper", self.text, self.response_ids, decode)
        for t, (a, b) in enumerate(zip(cuts, cuts[1:])):
            text = self.text[starts[a] : starts[b] if b < len(starts) else None]
            step = dict(text=text, tokens=b - a, advantage=statistics.mean(self.advantages[a:b]), value=None)
            if self.states:
                rollouts = self.states[t].rollouts if self.states[t] else []
                right = [r for r in rollouts if r.reward]
                wrong = [r for r in rollouts if not r.reward]
                step |= dict(value=self.step_values[t], right=len(right), K=len(rollouts))
                step["rollout_tokens"] = [len(r.token_ids) for r in rollouts]
                after = [*self.step_values, self.reward][t + 1]
                made_of = self.step_targets[t], self.step_baselines[t]
                if self.states[t] and made_of != (after, self.step_values[t]):
                    step |= dict(zip(("target", "baseline"), made_of))
                few = right[:shown] + wrong[:shown]
                step["rollouts"] = [(r.reward, r.text[starts[a] :]) for r in few]
            elif self.token_values:
                step["value"] = self.token_values[a]
            steps.append(step)
        about = dict(prompt=self.prompt, answer=self.answer, reward=self.reward, finished=self.finished)
        return about | dict(steps=steps)


class Estimator:
    """Where advantages come from. Algorithms differ in nothing else. set_advantages is required.

    train.py calls the methods in the order in which they are written. A rank may be stopped, or
    fail, alone inside start and finish: they must not talk to other ranks. All ranks call the
    others, which may.
    """

    networks = ()  # sharded models of its own, which train beside the policy
    whiten = True  # the trainer whitens the advantages over all action tokens of the iteration
    values_steps = False  # it sets `states`, and so the metrics about states and rollouts exist

    def start(self, episode):
        """A response has ended, while others are still being written: begin what can be begun."""

    def rebalance(self):
        """All ranks have their responses: exchange work with other ranks."""

    def finish(self):
        """Complete what start and deal began. The engine still runs."""

    def set_advantages(self, episodes):
        """Set `advantages` of this rank's episodes. The engine sleeps."""
        raise NotImplementedError

    def update(self, episodes):
        """Train its own networks, after the policy. Returns metrics."""
        return {}

    def save(self, folder):
        """Write what a resumed run needs of it into a checkpoint's folder, which need not exist yet."""

    def load(self, folder):
        """Read what save wrote, before the first iteration of a resumed run."""
