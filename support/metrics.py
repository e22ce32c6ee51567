"""Metrics of an iteration, and the time of its phases."""

import statistics
import threading
import time
from contextlib import contextmanager

import torch.distributed as dist
from tqdm import tqdm

from support.ranks import gather_lists


class Phases:
    """Seconds and prefix cache counts of an iteration's phases; prints a line when a phase takes long."""

    LONG = 120  # seconds

    def __init__(self, engine):
        self.engine = engine
        self.reset()

    def reset(self):
        self.seconds = {}
        self.cache = {}  # phase -> [prompt tokens looked up, found in the cache]

    @contextmanager
    def __call__(self, name, can_stop=False):
        """A Watch.phase, with its seconds; they exclude the wait for other ranks at the end of the phase."""
        with self.engine.watch.phase(name, can_stop):
            start, cache = time.perf_counter(), self.engine.prefix_cache_counts()
            notice = threading.Timer(self.LONG, self._say_long, [name])
            notice.daemon = True
            notice.start()
            try:
                yield
            finally:
                notice.cancel()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            counts = zip(self.engine.prefix_cache_counts(), cache, self.cache.get(name, (0, 0)))
            self.cache[name] = [after - before + sum for after, before, sum in counts]

    def _say_long(self, name):
        if dist.get_rank() == 0:
            tqdm.write(f"{name} takes longer than {self.LONG} s")


def iteration_metrics(episodes, states, seconds, counts, epochs):
    """Metrics of an iteration over all ranks. All ranks call it.

    episodes: this rank's. states: what its engine valued, on the rank that leads the engine, else []; None:
    the algorithm values no states. seconds: of each phase. counts: numbers to sum over the ranks. epochs:
    passes over the episodes in the update.
    """
    rows = []
    for e in episodes:
        zeros = sum(a == 0 for a in e.advantages)
        rows.append(
            (e.reward, e.finished, len(e.boundaries) - 1, zeros, len(e.prompt_ids), len(e.response_ids))
        )
    valued = []
    for state in states or []:
        tokens = sum(len(rollout.token_ids) for rollout in state.rollouts)
        valued.append((state.value, len(state.rollouts), tokens))
    ranks = gather_lists([(rows, valued, seconds, counts)])
    rows = [row for rank in ranks for row in rank[0]]
    valued = [row for rank in ranks for row in rank[1]]
    busy = [seconds["sample"] + seconds["values"] for _, _, seconds, _ in ranks]
    seconds = {name: max(rank[2][name] for rank in ranks) for name in seconds}  # of the slowest rank
    counts = {name: sum(rank[3][name] for rank in ranks) for name in counts}
    rewards, finished, lengths, zeros, prompt_tokens, response_tokens = zip(*rows)
    sampled = sum(response_tokens)
    values, rollouts, value_tokens = zip(*valued) if valued else ((), (), ())
    metrics = dict(
        reward=statistics.mean(rewards),
        unfinished=statistics.mean(not ended for ended in finished),
        zero_advantages=sum(zeros) / max(1, sampled),  # share of the action tokens
        prefix_cache_hit_rate=counts.pop("found") / max(1, counts.pop("looked_up")),  # of prompt tokens
        tokens_per_second=(sampled + sum(value_tokens)) / (seconds["sample"] + seconds["values"]),
        # share of the rollouts' time that a rank waits for the slowest
        idle=1 - statistics.mean(busy) / (seconds["sample"] + seconds["values"]),
    )
    if states is not None:
        metrics |= dict(
            steps_per_response=statistics.mean(lengths),
            states=len(values),
            rollouts=sum(rollouts),
            value_mean=statistics.mean(values or [0.0]),
            value_std=statistics.pstdev(values or [0.0]),
        )
    tokens = dict(sample=sampled, values=sum(value_tokens), train=epochs * (sampled + sum(prompt_tokens)))
    for unit, numbers in (("seconds", seconds), ("tokens", tokens)):
        metrics |= {f"{unit}_{name}": value for name, value in numbers.items()}
    return metrics | counts


def evaluation_metrics(episodes, tensor_parallel):
    """Accuracy and sampled tokens over all ranks. All ranks call it. tensor_parallel: ranks of an engine."""
    rows = gather_lists([(e.reward, len(e.response_ids)) for e in episodes])
    rewards, tokens = zip(*rows)  # an engine's come once from each of its ranks
    return {"accuracy": statistics.mean(rewards), "tokens_evaluate": sum(tokens) // tensor_parallel}


def rounded(value):
    """A float rounded to six digits for metrics.jsonl; None if it is not finite, which JSON cannot hold."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if abs(value) < float("inf") else None
