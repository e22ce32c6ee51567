"""Rewards: is the final answer of each response and rollout right?

    grader = Grader(workers=4, timeout=1.0)
    grader.grade(texts, golds)  # [True, False, ...]

What counts as right is grading/'s business. Unlike the paper's reward nothing is approximate: there is no
percentage rule and no tolerance of 1e-3 (docs/differences.md).
"""

from concurrent.futures import ThreadPoolExecutor

from grading import MAX_LENGTH, Workers, equal_within, extract_answer


class Grader:
    """Grades with `workers` processes for the symbolic part, which has `timeout` seconds of CPU time for a pair.

    counts: pairs graded, answered from the cache (every distinct pair is graded once), timed_out, and texts
    with no_answer. on_graded is called after each pair, in the thread that graded it.
    """

    MAX_CACHE = 500_000  # pairs

    def __init__(self, workers=1, timeout=1.0, on_graded=None):
        self.timeout, self.cache, self.on_graded = timeout, {}, on_graded
        self.counts = dict(graded=0, cached=0, timed_out=0, no_answer=0)
        self._threads, self._started = ThreadPoolExecutor(workers), {}  # _started: pair -> Future
        self._workers = Workers(workers)

    # --- records: episodes, and states with their rollouts ---

    def begin(self, record):
        """Begin in the background what set_rewards will ask."""
        self._start([_final_text(r) for r in record.responses], [record.answer] * len(record.responses))

    def set_rewards(self, records):
        """The reward of each response or rollout: 1.0 for a finished one whose answer is right, else 0.0.

        An unfinished one, which reached the token limit, has no answer.
        """
        pairs = [(response, record.answer) for record in records for response in record.responses]
        verdicts = self.grade([_final_text(response) for response, _ in pairs], [gold for _, gold in pairs])
        for (response, _), right in zip(pairs, verdicts):
            response.reward = float(right)

    # --- texts ---

    def grade(self, texts, golds):
        """Whether each text's final answer equals its gold answer, a bare answer: list of bool."""
        pairs = self._start(texts, golds)
        if len(self.cache) > self.MAX_CACHE:
            self.cache = {pair: self.cache[pair] for pair in pairs if pair in self.cache}
        new = {pair for pair in pairs if pair in self._started}
        results = {pair: self._started.pop(pair).result() for pair in new}
        verdicts = self.cache | results
        for pair, right in results.items():
            # one that was given up gets another chance
            if right is not None and len(pair[0]) <= MAX_LENGTH:
                self.cache[pair] = right
        missing = sum(answer is None for answer, _ in pairs)
        self.counts["graded"] += len(new)
        self.counts["cached"] += len(pairs) - missing - len(new)
        self.counts["timed_out"] += sum(right is None for right in results.values())
        self.counts["no_answer"] += missing
        return [bool(verdicts.get(pair)) for pair in pairs]

    def _start(self, texts, golds):
        """Begin to grade in the background. Returns the pairs (final answer, gold answer)."""
        pairs = [(extract_answer(text), gold) for text, gold in zip(texts, golds, strict=True)]
        for pair in pairs:
            if pair not in self.cache and pair not in self._started and pair[0] is not None:
                self._started[pair] = self._threads.submit(self._grade_pair, pair)
        return pairs

    def _grade_pair(self, pair):
        """True, False, or None if the pair's time is up."""
        try:
            return equal_within(self.timeout, *pair, self._workers)
        finally:
            if self.on_graded:
                self.on_graded()

    def close(self):
        """End the workers."""
        self._threads.shutdown(cancel_futures=True)
        self._workers.close()


def _final_text(response):
    return response.text if response.finished else ""
