"""How long ranks wait for each other while values are sampled, with and without train.even_out: a simulation, since it takes 8 GPUs to see it.

    python experiments/balance.py                               # MATH's solutions from the hub
    python experiments/balance.py --dataset FILE_OR_FOLDER      # or other problems with solutions

Each rank draws its share of 64 problems and gets 8 responses to each, as long as the solution in the dataset times a log-normal factor (mean 1, sigma 0.35);
9 rollouts from each state, as long as what the response has behind it times another such factor; the first state of a problem once. An engine adds a
token to each of its sequences in a step, which takes as long as the README's estimate says. The seconds are as good as these assumptions; left out
are prefill, also that of a state whose prefix another rank has in its cache, and that a rollout may only use what its prefix leaves of the limit.
"""

import argparse
import math
import random
import statistics
import sys
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import train
import vine

PROBLEMS, RESPONSES, K, LIMIT = 64, 8, 9, 1024  # the paper's; LIMIT: tokens of a response
MEAN, PROMPT = 227, 85  # tokens of a MATH solution and prompt
ROOM = 1024  # sequences in an engine, vLLM's default for an H100
MODELS = {  # bytes of the weights, of the KV cache per token; sequences that fit the cache
    "Rho-1B": (2.2e9, 22.5e3, 1024),
    "DeepSeekMath-7B": (13.8e9, 491e3, 285),
}


def step_seconds(model, sequences):
    """What host and sampler take, a guess, or reading weights and KV cache at 60 % of 3.35 TB/s."""
    weights, kv, _ = MODELS[model]
    return max(0.020, (weights + sequences * (PROMPT + 0.7 * MEAN) * kv) / (0.6 * 3.35e12))


def varied(length, rng):
    return min(LIMIT, max(2, round(length * math.exp(rng.gauss(-(0.35**2) / 2, 0.35)))))


class Rank:
    """One engine, and the states that wait for it: {"left": tokens that the response has behind the state}."""

    def __init__(self, model, rng):
        self.model, self.rng, self.seconds = model, rng, 0.0
        self.queue, self.running, self.waiting = deque(), [], deque()  # queue, running: sequences [tokens to go, what it is]

    def submit(self):
        while self.waiting and len(self.queue) + len(self.running) < ROOM:
            state = self.waiting.popleft()
            self.queue.extend([varied(state["left"], self.rng), state] for _ in range(K))

    def step(self):
        """What ended in this step."""
        while self.queue and len(self.running) < MODELS[self.model][2]:
            self.running.append(self.queue.popleft())
        self.seconds += step_seconds(self.model, len(self.running))
        for sequence in self.running:
            sequence[0] -= 1
        ended = [what for to_go, what in self.running if to_go == 0]
        self.running = [sequence for sequence in self.running if sequence[0]]
        return ended

    def sample(self, responses):
        """train.sample_responses: until all have ended. responses: (length, [left of each state])."""
        self.queue.extend([length, left] for length, left in responses)
        missing = len(responses)
        while missing:
            for what in self.step():
                if isinstance(what, list):  # a response
                    missing -= 1
                    self.waiting.extend({"left": left} for left in what)
            self.submit()

    def wait(self):
        while self.waiting or self.queue or self.running:
            self.submit()
            self.step()


def responses_of(solutions, problems, rng):
    """Of one rank: (length, [left of each state])."""
    for cuts in rng.choices(solutions, k=problems):
        for i in range(RESPONSES):
            length = varied(cuts[-1], rng)
            left = [max(1, round(length * (1 - cut / cuts[-1]))) for cut in cuts[:-1]]
            yield length, left[i > 0 :]  # the prompt is a state of the first alone


def iteration(model, solutions, spread, ranks, seed):
    """(seconds until the last rank has ended, mean over the ranks of the share that they wait)"""
    rng = random.Random(seed)
    engines = [Rank(model, rng) for _ in range(ranks)]
    for engine in engines:
        engine.sample(list(responses_of(solutions, PROBLEMS // ranks, rng)))
    waited = 0.0
    if spread:
        met = max(e.seconds for e in engines)
        waited = sum(met - e.seconds for e in engines)
        under_way = [sum({id(s): s["left"] for _, s in [*e.running, *e.queue]}.values()) for e in engines]
        for e, waiting in zip(engines, train.even_out(under_way, [e.waiting for e in engines], lambda state: state["left"])):
            e.seconds, e.waiting = met, deque(waiting)
    for engine in engines:
        engine.wait()
    total = max(e.seconds for e in engines)
    waited += sum(total - e.seconds for e in engines)
    return total, waited / ranks / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="math", help="as train.py's")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    a = parser.parse_args()
    try:
        texts = [p.solution for p in data.load(a.dataset, None, False)[0] if p.solution]
    except (ValueError, OSError) as error:
        sys.exit(f"balance.py: {error}")
    if not texts or a.iterations < 2 or a.ranks < 1 or PROBLEMS % a.ranks:
        sys.exit(f"balance.py: the dataset needs solutions, --iterations must be at least 2, --ranks a divisor of {PROBLEMS}")
    scale = MEAN / statistics.mean(map(len, texts))
    solutions = [[cut * scale for cut in vine.split_steps(text)] for text in texts]
    for model in MODELS:
        for spread in (False, True):
            times, idle = zip(*(iteration(model, solutions, spread, a.ranks, seed) for seed in range(a.iterations)))
            error = statistics.stdev(times) / len(times) ** 0.5
            how = "evened out" if spread else "its own states"
            print(
                f"{model:16} {how:15} {statistics.mean(times):6.1f} ± {error:.1f} s   a rank waits {statistics.mean(idle):.2f} of it",
                flush=True,
            )


if __name__ == "__main__":
    main()
