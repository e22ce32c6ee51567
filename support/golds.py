"""Before a run: gold answers that no response can match, and problems that repeat."""

import re

from grader import Grader
from grading import extract_answer

MAX_BAD_ANSWERS = 0.03  # largest share of gold answers that no response can match
NO_ANSWER = {"", "proof", "notfound", "not found", "none", "null", "nan", "n/a", "unknown", "no answer"}
UNEQUAL = "does not equal itself for the grader, in a box"


def check_golds(problems, say=None, most=MAX_BAD_ANSWERS):
    """Count the gold answers that no response can match; raise ValueError if their share is above `most`."""
    count, found = 0, []  # (where, gold, why)
    for p in problems:
        count, why = count + 1, _whats_wrong(p.answer)
        if why is not None:
            found.append((p.where, p.answer, why))
    unsure = [gold for _, gold, why in found if why == UNEQUAL]
    equal = set()
    if unsure:
        grader = Grader()
        right = grader.grade([f"\\boxed{{{gold}}}" for gold in unsure], unsure)
        equal = {gold for gold, itself in zip(unsure, right) if itself}
        grader.close()
    bad = [(where, gold, why) for where, gold, why in found if why != UNEQUAL or gold not in equal]
    if not bad:
        return
    shown = "; ".join(f"{where}: {gold[:60]!r} {why}" for where, gold, why in bad[:3])
    text = f"no response can match {len(bad)} of {count} gold answers, the first: {shown}"
    if len(bad) > most * count:
        raise ValueError(f"{text}. Leave such rows out: no more than {most:.0%} are let through")
    if say:
        say(text)


def _whats_wrong(gold):
    """Why no final answer of a response equals a gold; None if one does; UNEQUAL if only the grader can tell."""
    if re.fullmatch(r"-?\d[\d.,]*", gold):  # most are
        return None
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", gold)
    if gold.casefold() in NO_ANSWER:
        return "is no answer"
    if re.search(r"[\x00-\x1f\x7f]", gold):
        return "holds a control character (a LaTeX backslash must be two in JSON)"
    if len(words) > 8 or len(words) > 1 and gold[-1] in ".!?" or extract_answer(gold) is not None:
        return "is a sentence, not a bare answer"
    return None if extract_answer(f"\\boxed{{{gold}}}") == gold else UNEQUAL


def say_what_repeats(train, test, say):
    """Problems of the test split that are trained on, and those with more than one gold answer."""
    golds, prompts, first = {}, [set(), set()], None
    for split, seen in zip((train, test), prompts):
        for p in split:
            key, gold = hash(p.prompt), hash(p.answer)
            seen.add(key)
            if golds.setdefault(key, gold) not in (gold, None):
                golds[key], first = None, first or p.prompt
    both = len(prompts[0] & prompts[1])
    if both:
        say(f"{both} of {len(prompts[1])} test problems are training problems too")
    if first:
        several = list(golds.values()).count(None)
        say(f"{several} problems have more than one gold answer, the first: {first[:60]!r}")
