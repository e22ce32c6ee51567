r"""Is the final answer of a text right? Exact, without hanging, and without executing anything.

    from grading import is_correct
    is_correct("Half of 15, so it is \\boxed{7.5}.", "\\frac{15}{2}")  # True

extraction.py finds the answer; answers.py holds the rules of equality, with their vocabulary in
expressions.py, spellings.py and units.py. For the rest the rules ask math-verify, in a process that the
kernel ends when it has used up its CPU time (symbolic.py), so a busy machine does not change a verdict. The
package needs math-verify and nothing else of this project.

Two rules that a mathematician may not expect. A unit can be left out, and the percent and the degree sign are
units: 50 % equals 50 and not 0.5, 90° equals 90 and not pi/2 (but cos 60° equals 1/2). And an answer need not
be worked out: 36+36 equals 72.
"""

from functools import cache

from grading.answers import MAX_LENGTH, equal
from grading.extraction import boxed, extract_answer
from grading.symbolic import Workers

__all__ = ["MAX_LENGTH", "Workers", "boxed", "equal_within", "extract_answer", "is_correct"]


def is_correct(text, gold, seconds=1.0):
    """Whether a text's final answer equals the gold answer, a bare answer: "72", "\\frac{1}{2}".

    seconds: CPU time for a symbolic comparison; a longer one counts as different. For many texts use
    grader.Grader, which grades in parallel and remembers.
    """
    answer = extract_answer(text)
    return answer is not None and equal_within(seconds, answer, gold, _one_worker()) is True


def equal_within(seconds, answer, gold, workers):
    """Whether two bare answers are equal; None if the symbolic part needs more CPU time than `seconds`.

    workers: a symbolic.Workers. Threads can call this at the same time.
    """
    left = seconds

    def symbolic(a, b):
        nonlocal left
        if left <= 0:
            raise TimeoutError
        reply, took = workers.ask(a, b, left)
        left -= took
        if reply not in ("equal", "different"):
            raise TimeoutError
        return reply == "equal"

    try:
        return equal(answer, gold, symbolic)
    except TimeoutError:
        return None


@cache
def _one_worker():
    return Workers(1)
