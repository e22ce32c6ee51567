"""The records that flow through everything:

    Problem (data.py) -> Episode, a response -> State, before each of its steps -> Completion, a rollout from it

Axes, in these and all tensors:

    N  action tokens, those of the responses    L  tokens of a packed row: prompts and responses
    T  steps of a response                      V  the vocabulary
    K  rollouts from a state                    D  the width of the network
"""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Completion:
    """What the engine sampled after a prompt and prefix: a response, or a rollout from a state."""

    token_ids: list[int]  # as sampled, with EOS and the tokens of a stop string, which are actions too
    text: str  # of prefix and token_ids together, cut off before a stop string
    finished: bool  # ended by EOS or a stop string, not by the token limit
    logprobs: list[float] | None  # per token, at temperature 1, before top-p; None unless asked for
    reward: float = 0.0  # 1.0 if it is finished and its answer is right


class Record:
    """What the engine continues: prompt_ids and prefix_ids, the token ids to begin with, and the gold `answer`."""

    def receive(self, completions):
        """Take what the engine sampled, a list of Completion."""
        raise NotImplementedError

    @property
    def responses(self):
        """What is graded: objects with `text`, `finished` and `reward`."""
        raise NotImplementedError


@dataclass(eq=False)
class State(Record):
    """s_t: a prompt and the first t steps of a response to it, valued by rollouts from it."""

    prompt_ids: list[int]
    prefix_ids: list[int]  # the very ids that were sampled up to here; empty: s_0, the prompt
    answer: str = ""  # gold
    tokens_left: int = 0  # tokens of its response after it: an estimate of the length of rollouts
    rollouts: list[Completion] = field(default_factory=list)  # [K]
    value: float | None = None  # V(s_t)

    def receive(self, completions):
        self.rollouts = completions

    @property
    def responses(self):
        return self.rollouts


@dataclass(eq=False)
class Episode(Record):
    """One response to one problem, from its prompt to its advantages."""

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
    states: list[State] = field(default_factory=list)  # [T], before each step; fewer with --max_valued_steps
    step_targets: list[float] = field(default_factory=list)  # [T], G_t; empty: the paper's advantages
    step_baselines: list[float] = field(default_factory=list)  # [T], B_t; likewise
    # a critic's: baselines/critic.py
    token_values: list[float] = field(default_factory=list)  # [N], predicted before each token
    returns: list[float] = field(default_factory=list)  # [N], what they are fitted to
    # what the loss uses: ppo.py
    advantages: list[float] = field(default_factory=list)  # [N], not yet whitened

    @property
    def prefix_ids(self):
        """Its response begins right after the prompt."""
        return []

    def receive(self, completions):
        (c,) = completions
        self.response_ids, self.text, self.finished = c.token_ids, c.text, c.finished
        self.engine_logprobs = c.logprobs

    @property
    def responses(self):
        return [self]

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)
