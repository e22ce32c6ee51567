r"""The final answer of a text: "so it is \boxed{7}." -> "7"."""

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
SHORT_BOX = re.compile(r"[-+]?\d[\d.,/]*(?<![.,/])|[a-zA-Z]")  # of \boxed 7
JOINT = re.compile(  # what can stand between two boxes of one answer
    r"(?:[\s$,;~]|\\[()\[\], ;]|\\q?quad|and\b|or\b|\\(?:text|mbox)\s*\{[\s,]*(?:and|or)?[\s,]*\})+"
)
STATED = [
    re.compile(pattern)
    for pattern in (
        r"####[ \t]*+(?!(?:\*\*)?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer\b)([^\n]*)",
        r"(?im)^#+[ \t]*(?:\*\*)?(?:the )?(?:final )?answer(?:\*\*)?[ \t]*(?:\n|:(?:\*\*)?)\s*([^\n]*)",
        r"(?i)(?:^|\n)[ \t>*_-]*(?:final )?answer[*_]*[ \t]*:[*_]*\s*+(?=[^\n]*\Z)([^\n]+?)(?:\.\**[ \t].*)?\Z",
        r"[Tt]he (?:final )?answer is:?[ \t]*([^\n]*?)(?=\.\**\s|\.?$|\n)",
    )
]


def extract_answer(text):
    r"""The final answer of a response: the last \boxed{..}, else "#### ..", else the text after a heading
    "# Answer", else a last line "Answer: ..", else "The answer is ..". None if there is none.

    If the last box is empty or never closed there is no answer: an earlier box does not replace it. Boxes in
    a <think> block do not count. Boxes joined by "and" or a comma are one answer.
    """
    text = text.rsplit("</think>", 1)[-1].split("<think>", 1)[0].rstrip()
    if BOX.search(text):
        return boxed(text)
    for pattern in STATED:
        if stated := pattern.findall(text):
            sentence = STATED[-1].match(stated[-1])
            return _without_half_a_pair((sentence[1] if sentence else stated[-1]).strip()) or None
    return None


def _without_half_a_pair(stated):
    """Without asterisks whose others stand around more than the answer, as in **The answer is 42.**"""
    for mark in ("**", "*"):
        if stated.count(mark) % 2:
            stated = stated.removeprefix(mark).removesuffix(mark).strip()
    return stated


def boxed(text):
    r"""The content of the last \boxed{..} or \fbox{..}, and of boxes joined to it; None if there is none."""
    answers, boundary = [], None
    for box in reversed(list(BOX.finditer(text))):
        inside, end = _inside_box(text, box.end())
        joint = text[end:boundary] if answers else ""
        if answers and not (inside and JOINT.fullmatch(joint) and re.search(r"(?<!\\)[,;]|and|or", joint)):
            break
        if not inside:
            return None
        if inside not in answers:  # not the same answer twice
            answers.append(inside)
        boundary = box.start()
    return ", ".join(reversed(answers)) or None


def _inside_box(text, start):
    """(the text of the box that begins at start, or None if it is empty or never closed; its end)."""
    if text[start : start + 1] != "{":
        short = SHORT_BOX.match(text, start)
        return (short.group(), short.end()) if short else (None, start)
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(m.group(), 0)
        if depth == 0:
            return text[start + 1 : m.start()].strip() or None, m.end()
    return None, len(text)
