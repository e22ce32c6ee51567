"""How long ranks wait for each other while values are sampled, with and without vine.even_out.

    python experiments/balance.py                               # MATH's solutions from the hub
    python experiments/balance.py --dataset FILE_OR_FOLDER      # or other problems with solutions
    python experiments/balance.py --run RUN                     # the lengths that a run has stored

A simulation, since the real thing takes 8 GPUs. Each rank draws its share of 64 problems and gets 8
responses to each, as long as the solution in the dataset times a log-normal factor (mean 1, sigma
0.35). From each state it gets 9 rollouts, as long as what the response has after the state times
another such factor; the prompt is a state once for its 8 responses. With --run the groups of responses
that train.py stored are drawn, with the lengths of their steps and of their rollouts. An engine adds a token to each
of its sequences in a step, which takes as long as the estimate in docs/speed.md says. The seconds are as
good as these assumptions. Left out are prefill (also that of a state whose prefix another rank has
in its cache) and that a rollout may only use what its prefix leaves of the limit.
"""

import argparse
import math
import random
import statistics
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
from episode import State
from steps import split_steps
from support.run_folder import read_solutions
from vine import even_out

PROBLEMS, RESPONSES, K, LIMIT = 64, 8, 9, 1024  # the paper's; LIMIT: tokens of a response
MEAN, PROMPT = 227, 85  # tokens of a MATH solution and prompt
ROOM = 1024  # sequences in an engine, vLLM's default for an H100
MODELS = {  # bytes of the weights, of the KV cache per token; sequences that fit the cache
    "Rho-1B": (2.2e9, 22.5e3, 1024),
    "DeepSeekMath-7B": (13.8e9, 491e3, 285),
}


def step_seconds(model, sequences):
    """The longer of two: what host and sampler take (a guess), and reading weights and KV cache.

    The latter at 60 % of 3.35 TB/s.
    """
    weights, kv, _ = MODELS[model]
    return max(0.020, (weights + sequences * (PROMPT + 0.7 * MEAN) * kv) / (0.6 * 3.35e12))


def varied(length, rng):
    return min(LIMIT, max(2, round(length * math.exp(rng.gauss(-(0.35**2) / 2, 0.35)))))


@dataclass(eq=False)
class Valued(State):
    lengths: list[int] = field(default_factory=list)  # of its rollouts, where a run has stored them


@dataclass
class Sequence:
    """A response or a rollout that an engine writes."""

    to_go: int  # tokens until it ends
    state: State | None = None  # a rollout's
    states: list[State] | None = None  # a response's, which begin to wait when it ends


class Rank:
    """One engine, and the states that wait for it. Of a State it uses only `tokens_left`."""

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
        """One step of the engine: the sequences that end with it."""
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
        """Until all the responses (Sequences) have ended. Rollouts from their states begin as each ends."""
        self.queue.extend(responses)
        missing = len(responses)
        while missing:
            for sequence in self.step():
                if sequence.states is not None:
                    missing -= 1
                    self.waiting.extend(sequence.states)
            self.submit()

    def under_way(self):
        """The cost of what has begun, in the unit of State.tokens_left."""
        return sum(state.tokens_left for state in {s.state for s in [*self.running, *self.queue]})

    def finish(self):
        """Until all rollouts have ended."""
        while self.waiting or self.queue or self.running:
            self.submit()
            self.step()


def responses_of(solutions, problems, rng):
    """The responses of one rank, as Sequences. solutions: the boundaries of their steps, in tokens."""
    for cuts in rng.choices(solutions, k=problems):
        for i in range(RESPONSES):
            length, states = varied(cuts[-1], rng), []
            for cut in cuts[:-1]:
                tokens_left = max(1, round(length * (1 - cut / cuts[-1])))
                states.append(Valued([], [], tokens_left=tokens_left))
            yield Sequence(length, states=states[i > 0 :])  # the prompt is a state of the first alone


def stored_groups(solutions):
    """The responses of each prompt of a run's stored solutions: lists of (tokens of the steps, lengths of
    the rollouts from each state that was valued, [] where it is that of a response before).
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
    """(seconds until the last rank has ended, mean share of them that a rank waits, tokens)

    draw: (number of problems, Random) -> the responses of one rank, as Sequences.
    """
    rng = random.Random(seed)
    engines = [Rank(model, rng) for _ in range(ranks)]
    for engine in engines:
        engine.sample(list(draw(PROBLEMS // ranks, rng)))
    waited = 0.0
    if evened:
        met = max(e.seconds for e in engines)
        waited = sum(met - e.seconds for e in engines)
        loads = [e.under_way() for e in engines]
        for e, waiting in zip(engines, even_out(loads, [e.waiting for e in engines])):
            e.seconds, e.waiting = met, deque(waiting)
    for engine in engines:
        engine.finish()
    total = max(e.seconds for e in engines)
    waited += sum(total - e.seconds for e in engines)
    return total, waited / ranks / total, sum(e.tokens for e in engines)


def from_dataset(dataset):
    """`draw` of iteration, from the solutions of a dataset."""
    texts = [p.solution for p in data.load(dataset, None, False)[0] if p.solution]
    if not texts:
        raise ValueError(f"--dataset {dataset} has no solutions")
    scale = MEAN / statistics.mean(map(len, texts))
    solutions = [[cut * scale for cut in split_steps(text)] for text in texts]
    return lambda problems, rng: responses_of(solutions, problems, rng)


def from_run(run):
    """`draw` of iteration, from what a run has stored last."""
    stored = sorted((run / "episodes").glob("*.jsonl.gz"))
    if not stored:
        raise ValueError(f"--run {run} has stored no iteration (--store_every)")
    groups = stored_groups(read_solutions(stored[-1]))
    return lambda problems, rng: stored_responses(groups, problems, rng)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", default="math", help="as train.py's")
    parser.add_argument("--run", type=Path, help="a run folder of train.py; its newest stored iteration")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    a = parser.parse_args()
    if a.iterations < 2 or a.ranks < 1 or PROBLEMS % a.ranks:
        sys.exit(f"balance.py: --iterations must be at least 2, --ranks a divisor of {PROBLEMS}")
    try:
        draw = from_run(a.run) if a.run else from_dataset(a.dataset)
    except (ValueError, OSError) as error:
        sys.exit(f"balance.py: {error}")
    for model in MODELS:
        for evened in (False, True):
            found = [iteration(model, draw, evened, a.ranks, seed) for seed in range(a.iterations)]
            times, idle, tokens = zip(*found)
            error = statistics.stdev(times) / len(times) ** 0.5
            how = "evened out" if evened else "its own states"
            took = f"{statistics.mean(times):6.1f} ± {error:.1f} s"
            waits = f"a rank waits {statistics.mean(idle):.2f} of it"
            print(
                f"{model:16} {how:15} {took}   {waits}   {statistics.mean(tokens) / 1e6:.2f}M tokens",
                flush=True,
            )


if __name__ == "__main__":
    main()
