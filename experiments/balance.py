"""How long do ranks wait for each other while values are sampled, with and without dealing.even_out?

    python experiments/balance.py                               # MATH's solutions from the hub
    python experiments/balance.py --dataset FILE_OR_FOLDER      # other problems with solutions
    python experiments/balance.py --run RUN                     # the lengths that a run has stored

This is a simulation, since the real thing takes 8 GPUs. Each rank draws its share of 64 problems and
gets 8 responses to each. The length of a response is that of the dataset's solution times a log-normal
factor (mean 1, sigma 0.35). Each state gets 9 rollouts; the length of a rollout is the length of the
response after the state times another such factor. The prompt is one state for its 8 responses. With
--run the program draws groups of responses that train.py stored, with the lengths of their steps and
rollouts. In a step an engine adds a token to each of its sequences; experiments/README.md estimates how
long a step takes. The seconds are as good as these assumptions. Two things are left out: prefill (also of a
state whose prefix is in the cache of another rank), and the limit of a rollout, which can only use the
tokens that its prefix leaves.
"""

import math
import random
import statistics
import sys
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
from dealing import even_out
from episode import State
from experiments import common
from steps import split_steps
from support.run_folder import read_solutions

PROBLEMS, RESPONSES, K, LIMIT = 64, 8, 9, 1024  # the paper's; LIMIT: tokens of a response
MEAN, PROMPT = 227, 85  # tokens of a MATH solution and prompt
ROOM = 1024  # sequences in an engine, vLLM's default for an H100
MODELS = {  # bytes of the weights, of the KV cache per token; sequences that fit the cache
    "Rho-1B": (2.2e9, 22.5e3, 1024),
    "DeepSeekMath-7B": (13.8e9, 491e3, 285),
}


def step_seconds(model, sequences):
    """The longer of two times: of host and sampler (a guess), and of reading weights and KV cache.

    They are read at 60 % of 3.35 TB/s.
    """
    weights, kv, _ = MODELS[model]
    return max(0.020, (weights + sequences * (PROMPT + 0.7 * MEAN) * kv) / (0.6 * 3.35e12))


def varied(length, rng):
    return min(LIMIT, max(2, round(length * math.exp(rng.gauss(-(0.35**2) / 2, 0.35)))))


@dataclass(eq=False)
class Valued(State):
    lengths: list[int] = field(default_factory=list)  # of its rollouts, if a run has stored them


@dataclass
class Sequence:
    """A response or a rollout that an engine generates."""

    to_go: int  # tokens until it ends
    state: State | None = None  # of a rollout
    states: list[State] | None = None  # of a response; they begin to wait when it ends


class Rank:
    """One engine, and the states that wait for it."""

    def __init__(self, model, rng):
        self.model, self.rng, self.seconds, self.tokens = model, rng, 0.0, 0
        self.queue, self.running = deque(), []  # Sequences
        self.waiting = deque()  # States

    def submit(self):
        """Start the rollouts of the states for which the engine has room."""
        while self.waiting and len(self.queue) + len(self.running) < ROOM:
            state = self.waiting.popleft()
            lengths = state.lengths or [varied(state.tokens_left, self.rng) for _ in range(K)]
            self.queue.extend(Sequence(length, state) for length in lengths)

    def step(self):
        """Do one step of the engine. Returns the sequences that end with it."""
        while self.queue and len(self.running) < MODELS[self.model][2]:
            self.running.append(self.queue.popleft())
        self.seconds += step_seconds(self.model, len(self.running))
        self.tokens += len(self.running)
        for sequence in self.running:
            sequence.to_go -= 1
        ended = [sequence for sequence in self.running if sequence.to_go == 0]
        self.running = [sequence for sequence in self.running if sequence.to_go]
        return ended

    def sample(self, responses):
        """Step until all the responses (Sequences) have ended. Rollouts begin as soon as a response ends."""
        self.queue.extend(responses)
        missing = len(responses)
        while missing:
            for sequence in self.step():
                if sequence.states is not None:
                    missing -= 1
                    self.waiting.extend(sequence.states)
            self.submit()

    def under_way(self):
        """The cost of the rollouts that have begun, in the unit of State.tokens_left."""
        return sum(state.tokens_left for state in {s.state for s in [*self.running, *self.queue]})

    def finish(self):
        """Step until all rollouts have ended."""
        while self.waiting or self.queue or self.running:
            self.submit()
            self.step()


def responses_of(solutions, problems, rng):
    """The responses of one rank, as Sequences. solutions: for each the boundaries of its steps, in tokens."""
    for cuts in rng.choices(solutions, k=problems):
        for i in range(RESPONSES):
            length, states = varied(cuts[-1], rng), []
            for cut in cuts[:-1]:
                tokens_left = max(1, round(length * (1 - cut / cuts[-1])))
                states.append(Valued([], [], tokens_left=tokens_left))
            yield Sequence(length, states=states[i > 0 :])  # only the first brings the prompt's state


def stored_groups(solutions):
    """The responses to each prompt of a run's stored solutions: lists of (tokens of each step, lengths of the
    rollouts from each state; [] for a state that an earlier response has, too).
    """
    groups, valued = {}, set()
    for solution in solutions:
        steps = solution["steps"]
        sizes = [step["tokens"] for step in steps]
        if sum(sizes):
            rollouts, state = [], (solution["prompt"],)
            for step in steps:
                rollouts.append([] if state in valued else step.get("rollout_tokens", []))
                valued.add(state)
                state += (step["text"],)
            groups.setdefault(solution["prompt"], []).append((sizes, rollouts))
    return list(groups.values())


def stored_responses(groups, problems, rng):
    """The responses of one rank, as Sequences, from stored groups."""
    for group in rng.choices(groups, k=problems):
        for sizes, rollouts in group:
            states = [
                Valued([], [], tokens_left=sum(sizes[t:]), lengths=lengths)
                for t, lengths in enumerate(rollouts)
                if lengths
            ]
            yield Sequence(sum(sizes), states=states)


def iteration(model, draw, evened, ranks, seed):
    """(seconds until the last rank has ended, mean share of them that a rank waits, tokens).

    draw(number of problems, Random) gives the responses of one rank, as Sequences.
    """
    rng = random.Random(seed)
    engines = [Rank(model, rng) for _ in range(ranks)]
    for engine in engines:
        engine.sample(list(draw(PROBLEMS // ranks, rng)))
    waited = 0.0
    if evened:
        met = max(e.seconds for e in engines)
        waited = sum(met - e.seconds for e in engines)
        loads, queues = [e.under_way() for e in engines], [list(e.waiting) for e in engines]
        sizes = [[state.tokens_left for state in queue] for queue in queues]
        for e, dealt in zip(engines, even_out(loads, sizes)):
            e.seconds, e.waiting = met, deque(queues[owner][i] for owner, i in dealt)
    for engine in engines:
        engine.finish()
    total = max(e.seconds for e in engines)
    waited += sum(total - e.seconds for e in engines)
    return total, waited / ranks / total, sum(e.tokens for e in engines)


def from_dataset(dataset):
    """draw of iteration, from the solutions of a dataset. Raises ValueError if it has none."""
    texts = [p.solution for p in data.load(dataset, None, False)[0] if p.solution]
    if not texts:
        raise ValueError(f"--dataset {dataset} has no solutions")
    scale = MEAN / statistics.mean(map(len, texts))
    solutions = [[cut * scale for cut in split_steps(text)] for text in texts]
    return partial(responses_of, solutions)


def from_run(run):
    """draw of iteration, from the last iteration that a run has stored. Raises ValueError if there is none."""
    stored = sorted((run / "episodes").glob("*.jsonl.gz"))
    if not stored:
        raise ValueError(f"--run {run} has stored no iteration: train it with --store_every above 0")
    groups = stored_groups(read_solutions(stored[-1]))
    return partial(stored_responses, groups)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--dataset", default="math", help="problems with solutions, as for train.py")
    parser.add_argument("--run", type=Path, help="a run folder of train.py; its newest stored iteration")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    a = parser.parse_args()
    if a.iterations < 2 or a.ranks < 1 or PROBLEMS % a.ranks:
        sys.exit(
            f"balance.py: --iterations {a.iterations} must be at least 2, and --ranks {a.ranks} a divisor of {PROBLEMS}"
        )
    try:
        draw = from_run(a.run) if a.run else from_dataset(a.dataset)
    except (ValueError, OSError) as error:
        sys.exit(f"balance.py: {error}")
    for model in MODELS:
        for evened in (False, True):
            found = [iteration(model, draw, evened, a.ranks, seed) for seed in range(a.iterations)]
            times, idle, tokens = zip(*found)
            how = "evened out" if evened else "its own states"
            took = common.plus_minus(*common.mean_and_error(times), 1)
            waits = f"a rank waits {statistics.mean(idle):.2f} of it"
            millions = statistics.mean(tokens) / 1e6
            print(f"{model:16} {how:15} {took:>12} s   {waits}   {millions:.2f}M tokens", flush=True)


if __name__ == "__main__":
    main()
