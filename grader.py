r"""Is the final answer of a text right? The reward: exact, without hanging, and without executing
anything.

    grader = Grader(workers=4, timeout=1.0)
    grader.grade(texts, golds)  # [True, False, ...]

The rules of equality are in support/answers.py. What they leave to symbolic comparison goes to
math-verify, in a worker process that the kernel ends when it has used up its CPU time
(support/symbolic.py): how busy the machine is does not change a verdict.
Unlike the paper's reward nothing is approximate: there is no percentage rule and no tolerance of
1e-3 (docs/differences.md).
"""

import re
from concurrent.futures import ThreadPoolExecutor

from support.answers import MAX_LENGTH, equal
from support.symbolic import Workers

# --- rewards ---


def set_rewards(grader, records):
    """The reward of each response or rollout: 1.0 for a finished one whose answer is right, else 0.0."""
    responses = [response for record in records for response in record.responses]
    golds = [record.answer for record in records for _ in record.responses]
    for response, right in zip(responses, grader.grade(list(map(_final_text, responses)), golds)):
        response.reward = float(right)


def start_grading(grader, record):
    """Begin in the background what set_rewards will ask."""
    grader.start(list(map(_final_text, record.responses)), [record.answer] * len(record.responses))


def _final_text(response):
    """An unfinished response has no answer."""
    return response.text if response.finished else ""


# --- the final answer of a text ---


BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
SHORT_BOX = re.compile(r"[-+]?\d[\d.,/]*(?<![.,/])|[a-zA-Z]")  # of \boxed 7
JOINT = re.compile(  # what may stand between two boxes of one answer
    r"(?:[\s$,;~]|\\[()\[\], ;]|\\q?quad|and\b|or\b|\\(?:text|mbox)\s*\{[\s,]*(?:and|or)?[\s,]*\})+"
)
STATED = [
    re.compile(pattern)
    for pattern in (
        r"####[ \t]*+(?!(?:\*\*)?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer\b)([^\n]*)",
        r"(?im)^#+[ \t]*(?:\*\*)?(?:the )?(?:final )?answer(?:\*\*)?[ \t]*(?:\n|:(?:\*\*)?)\s*([^\n]*)",
        r"[Tt]he (?:final )?answer is:?[ \t]*([^\n]*?)(?=\.\s|\.?$|\n)",
    )
]


def extract_answer(text):
    r"""The final answer of a response: the last \boxed{..}, else "#### ..", else what follows
    a heading "# Answer", else "The answer is ..".

    None where there is none. A last box that is empty or never closed is no answer, and an earlier
    one does not take its place; nor does one in a <think> block. Boxes joined by "and" or a comma
    are one answer.
    """
    text = text.rsplit("</think>", 1)[-1].split("<think>", 1)[0]
    if BOX.search(text):
        return boxed(text)
    for pattern in STATED:
        if stated := pattern.findall(text):
            sentence = STATED[-1].match(stated[-1])
            return (sentence[1] if sentence else stated[-1]).strip() or None
    return None


def boxed(text):
    r"""What is in the last \boxed{..} or \fbox{..}, and in those joined to it; None if nothing is."""
    answers, boundary = [], None
    for box in reversed(list(BOX.finditer(text))):
        inside, end = _inside_box(text, box.end())
        joint = text[end:boundary] if answers else ""
        if answers and not (inside and JOINT.fullmatch(joint) and re.search(r"(?<!\\)[,;]|and|or", joint)):
            break
        if not inside:
            return None
        if inside not in answers:  # or it is only said twice
            answers.append(inside)
        boundary = box.start()
    return ", ".join(reversed(answers)) or None


def _inside_box(text, start):
    """(the text of the box that begins at start, where it ends); None if it is empty or never closed."""
    if text[start : start + 1] != "{":
        short = SHORT_BOX.match(text, start)
        return (short.group(), short.end()) if short else (None, start)
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(m.group(), 0)
        if depth == 0:
            return text[start + 1 : m.start()].strip() or None, m.end()
    return None, len(text)


# --- cache and processes ---


class Grader:
    """Grades with `workers` processes for the symbolic part, which has `timeout` seconds of CPU time
    for a pair.

    counts: pairs graded, answered from the cache (every distinct pair is graded once), timed_out,
    and texts with no_answer. on_graded is called after each pair, in the thread that graded it.
    """

    MAX_CACHE = 500_000  # pairs

    def __init__(self, workers=1, timeout=1.0, on_graded=None):
        self.timeout, self.cache, self.on_graded = timeout, {}, on_graded
        self.counts = dict(graded=0, cached=0, timed_out=0, no_answer=0)
        self._threads, self._started = ThreadPoolExecutor(workers), {}  # _started: pair -> Future
        self._workers = Workers(workers)

    def start(self, texts, golds):
        """Begin to grade in the background. Returns the pairs (final answer, gold answer)."""
        pairs = [(extract_answer(text), gold) for text, gold in zip(texts, golds, strict=True)]
        for pair in pairs:
            if pair not in self.cache and pair not in self._started and pair[0] is not None:
                self._started[pair] = self._threads.submit(self._grade_pair, pair)
        return pairs

    def grade(self, texts, golds):
        """Whether each text's final answer equals its gold answer, a bare answer: list of bool."""
        pairs = self.start(texts, golds)
        if len(self.cache) > self.MAX_CACHE:
            self.cache = {pair: self.cache[pair] for pair in pairs if pair in self.cache}
        new = {pair for pair in pairs if pair in self._started}
        results = {pair: self._started.pop(pair).result() for pair in new}
        known = self.cache | results
        for pair, right in results.items():
            # one that was given up gets another chance
            if right is not None and len(pair[0]) <= MAX_LENGTH:
                self.cache[pair] = right
        missing = sum(answer is None for answer, _ in pairs)
        self.counts["graded"] += len(new)
        self.counts["cached"] += len(pairs) - missing - len(new)
        self.counts["timed_out"] += sum(right is None for right in results.values())
        self.counts["no_answer"] += missing
        return [bool(known.get(pair)) for pair in pairs]

    def _grade_pair(self, pair):
        """True, False, or None if the pair's time is up."""
        left = self.timeout

        def symbolic(answer, gold):
            nonlocal left
            if left <= 0:
                raise TimeoutError
            reply, seconds = self._workers.ask(answer, gold, left)
            left -= seconds
            if reply not in ("equal", "different"):
                raise TimeoutError
            return reply == "equal"

        try:
            return equal(*pair, symbolic)
        except TimeoutError:
            return None
        finally:
            if self.on_graded:
                self.on_graded()

    def close(self):
        """End the workers."""
        self._threads.shutdown(cancel_futures=True)
        self._workers.close()


def is_correct(text, gold):
    """Whether one text's final answer equals the bare gold answer."""
    global _grader
    _grader = _grader or Grader()
    return _grader.grade([text], [gold])[0]


_grader = None
