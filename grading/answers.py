r"""Are two final answers the same? Rules that take both apart into plain pieces, exactly, executing nothing.

    equal("0.5", "\\frac{1}{2}", symbolic)  ->  True

The pieces: lists and sets (in any order), tuples and intervals (in order, with their brackets), matrices,
relations, numbers (compared as exact fractions), units, words. `symbolic` decides only about other scalar
expressions.
"""

import re
from fractions import Fraction

from grading.expressions import ACCENTS, FUNCTIONS, GREEK
from grading.spellings import TEXT, VALUE
from grading.spellings import normal as _normal
from grading.units import measured

MAX_LENGTH = 400  # characters of an answer; no gold answer of MATH or GSM8K has half as many

SLASHED = re.compile(rf"({VALUE})\s*/\s*({VALUE})")
FRACTION = re.compile(rf"([-+]?)\s*\\frac\s*\{{\s*({VALUE})\s*\}}\s*\{{\s*({VALUE})\s*\}}")
MIXED = re.compile(
    r"([-+]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<=\s)(\d+)\s*/\s*(\d+))"
)
SCIENTIFIC = re.compile(
    rf"({VALUE})\s*(?:(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*([-+]?\d{{1,3}})\s*\}}|(\d))|[eE]([-+]?\d{{1,3}}))"
)
VARIABLE = rf"(?:\\(?:{ACCENTS})\s*\{{\w+\}}|\\(?:{GREEK})(?![a-z])|[A-Za-z])(?:_(?:\{{[^{{}}]*\}}|\w))?'*"
ARGUMENT = r"\(\s*-?[^()+=<>-]*(?:\(-?[^()+=<>-]*\))?\s*\)"
LABELS = [  # what an answer can be called
    VARIABLE,
    r"[A-Za-z]\([A-Za-z]\)",
    rf"(?:(?![a-eiklmnoxyz]){VARIABLE}|[A-Z])(?:\^\{{-1\}}\s*)?{ARGUMENT}",  # f(2); x(x-1) is a product
    r"[A-Z]\^\{-1\}|P\([^()]*\)",
    rf"\(\s*{VARIABLE}(?:\s*,\s*{VARIABLE})+\s*\)",
    r"(?:\\(?:sin|cos|tan)\s*)?(?:m\s*)?\\(?:angle|measuredangle|triangle)\s*\{?\w{1,3}\}?",
    r"\\(?:sin|cos|tan)\s*(?:[A-Z]|\\[a-z]+)",
    r"[A-Z]{2,4}|\|(?:\\overline\s*\{)?[A-Z]{2}\}?\||\[(?:\\triangle\s*)?[A-Z]{3,}\]",
    r"\\text\s*\{(?!\s*not\b)[^{}]*[a-z][^{}]*\}(?:\s*(?:\\triangle\s*)?[A-Z]{1,4})?",
    r"[A-Z][a-z]{2,}(?:\s[A-Za-z]+)*",
]
LABEL = re.compile("|".join(LABELS))
RELATIONS = ("=", "<", ">", "\\leq", "\\geq", "\\neq", "\\in", "\\equiv", "\\approx", "\\sim", "\\to")
FLIPPED = {">": "<", "\\geq": "\\leq"}
OR = re.compile(r"\\text\s*\{\s*or\s*\}|\\lor(?![a-z])|\sor\s")
WORDS = re.compile(r"[A-Z]|[A-Za-z]{3,}(?:[\s'-]+[A-Za-z]+)*")
# a numeral in another base, a time, a ratio
LITERAL = re.compile(r"[^_:]*\d\s*(?:_\s*\{?\s*\w+\s*\}?|:\s*\d+(?::\d+)?)")
MATRIX = re.compile(
    r"(.*?)\s*([(\[|]?)\s*\\begin\{([pbBvV]?(?:small)?(?:matrix|array))\}(?:\s*\{[lcr|\s]*\})?"
    r"((?:(?!\\begin).)*)\\end\{\3\}\s*[)\]|]?",
    re.DOTALL,
)
TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)


def equal(answer, gold, symbolic):
    """Whether two answers are the same.

    symbolic(a, b) -> bool decides the rest: two scalar expressions, or two relations "(left)=(right)".
    """
    answer, gold = " ".join(answer.split()), " ".join(gold.split())
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_LENGTH or not answer.isprintable() or re.search(r"\d{61}", answer):
        return False
    if any(c.isdecimal() and not c.isascii() for c in answer):
        return False
    return _same(_normal(answer), _normal(gold), symbolic)


def _same(a, b, symbolic, depth=0):
    if _squeezed(a) == _squeezed(b):
        return bool(a.strip())
    if depth > 8 or not a.strip() or not b.strip():
        return False

    def again(x, y):
        return _same(x.strip(), y.strip(), symbolic, depth + 1)

    (label_a, rest_a), (label_b, rest_b) = _label(a), _label(b)
    sides_a, sides_b = _sides(a), _sides(b)
    if label_a and (label_a == label_b or not sides_b) or label_b and not sides_a:
        return _same(rest_a.strip(), rest_b.strip(), symbolic, depth)  # "x = 5" is 5
    if interval := sides_a and _interval(*sides_a, b) or sides_b and _interval(*sides_b, a):
        return again(*interval)
    if sides_a or sides_b:
        return _same_relation(sides_a or a, sides_b or b, symbolic, again)
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return x == y
    kind_a, items_a = _pieces(a)
    kind_b, items_b = _pieces(b)
    if {kind_a, kind_b} == {"list", "union"} and OR.search(a + b):  # x < 1 or x > 3
        kind_a = kind_b
    if kind_a or kind_b:
        if kind_a != kind_b or len(items_a) != len(items_b):
            return False
        if kind_a not in ("list", "union"):
            return all(again(p, q) for p, q in zip(items_a, items_b))
        rest = list(items_b)
        for p in items_a:
            match = next((q for q in rest if again(p, q)), None)
            if match is None:
                return False
            rest.remove(match)
        return True
    (value_a, unit_a), (value_b, unit_b) = measured(a, letters=not depth), measured(b)
    if unit_a or unit_b:  # a unit can be left out, but not exchanged
        return (not (unit_a and unit_b) or unit_a == unit_b) and again(value_a, value_b)
    if LITERAL.fullmatch(a) or LITERAL.fullmatch(b):
        return re.sub(r"[\s{}]", "", a) == re.sub(r"[\s{}]", "", b)
    word_a, word_b = TEXT.sub(r"\1", a), TEXT.sub(r"\1", b)
    in_words = (word_a, word_b) != (a, b)
    if in_words or WORDS.fullmatch(a) and WORDS.fullmatch(b):
        fold = in_words or len(a) > 3 or a.casefold() in ("yes", "odd")  # R and r are letters, not words
        return word_a == word_b or fold and word_a.casefold() == word_b.casefold()
    if not re.search(rf"\\({FUNCTIONS}|pi)(?![a-z])|\^\s*\{{[^{{}}]*\^", a + b):
        a, b = (x.replace("^\\circ", " ") for x in (a, b))  # 90^\circ - x
    return symbolic(a, b)


def _interval(signs, sides, other):
    r"""Two intervals, of a variable between two bounds or beyond one and of what is an interval already; None
    where one is not: ("[-2,0)", "[-2, 0)") of -2 \leq x < 0 and x \in [-2, 0).
    """
    label, other = _label(other)
    kind, bounds = _pieces(other.strip())
    if not set(signs) <= {"<", "\\leq"} or kind not in ("[]", "[)", "(]", "()") or len(bounds) != 2:
        return None
    if len(sides) == 2 and LABEL.fullmatch(sides[0].strip()):  # x < 3 is -\infty < x < 3
        signs, sides = ["<", *signs], ["-\\infty", *sides]
    elif len(sides) == 2:
        signs, sides = [*signs, "<"], [*sides, "\\infty"]
    variable = re.sub(r"[\s{}]", "", sides[1])
    if len(sides) != 3 or label not in ("", variable) or not re.fullmatch(VARIABLE, sides[1].strip()):
        return None
    brackets = ["(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"]
    return f"{brackets[0]}{sides[0]},{sides[2]}{brackets[1]}", other


def _same_relation(a, b, symbolic, again):
    """a, b: (signs, sides), or a text that is not a relation."""
    if isinstance(a, str) or isinstance(b, str):  # "x = 2+3 = 5" is 5 if each of its sides is
        (signs, sides), other = (b, a) if isinstance(a, str) else (a, b)
        chain = len(signs) > 1 and set(signs) == {"="} and LABEL.fullmatch(sides[0].strip())
        return bool(chain) and all(again(*((other, s) if other is a else (s, other))) for s in sides[1:])
    (signs_a, sides_a), (signs_b, sides_b) = a, b
    if signs_a != signs_b:  # "x = 2+3 = 5" is "x = 5"
        named = set(signs_a + signs_b) == {"="} and LABEL.fullmatch(sides_a[0].strip())
        same = named and again(sides_a[0], sides_b[0])
        return bool(same) and all(again(p, q) for p in sides_a[1:] for q in sides_b[1:])
    orders = [sides_b, sides_b[::-1]] if set(signs_a) <= {"=", "\\neq"} else [sides_b]
    if any(all(again(p, q) for p, q in zip(sides_a, order)) for order in orders):
        return True
    if len(signs_a) > 1 or signs_a[0] not in ("=", "\\neq", "<", "\\leq"):
        return False
    return symbolic(*(f"({left}){signs_a[0]}({right})" for left, right in (sides_a, sides_b)))


def _squeezed(text):
    """Without white space, except between digits: "3 1/2" is not 31/2."""
    return re.sub(r"(?<![\d,.])\s+|\s+(?![\d.])", "", text)


def _number(text):
    """Exact value of a decimal, fraction, mixed number or power of ten; None for any other text."""
    text = text.strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if m := re.fullmatch(VALUE, text):
        return _fraction(text)
    if m := SLASHED.fullmatch(text):
        return _divide(m[1], m[2])
    if m := FRACTION.fullmatch(text):
        quotient = _divide(m[2], m[3])
        return -quotient if quotient is not None and m[1] == "-" else quotient
    if m := MIXED.fullmatch(text):
        part = _divide(m[3] or m[5], m[4] or m[6])
        return None if part is None else (-1 if m[1] == "-" else 1) * (int(m[2]) + part)
    if m := SCIENTIFIC.fullmatch(text):
        return _fraction(m[1]) * Fraction(10) ** int(m[2] or m[3] or m[4])
    return None


def _fraction(text):
    return Fraction(text.replace(",", "").rstrip("."))


def _divide(a, b):
    return _fraction(a) / _fraction(b) if _fraction(b) else None


def _label(text):
    """("x", "5") of "x = 5"; ("", text) if nothing in front names the answer."""
    if m := re.match(r"\\text\s*\{[^{}]*[a-z]\s*(?:(?:[:=]|\sis)\s*\}|\}\s*:)", text):
        return m[0], text[m.end() :]
    parts, signs = _split(text, RELATIONS)
    if signs == ["="] and LABEL.fullmatch(parts[1].strip()) and not LABEL.fullmatch(parts[0].strip()):
        parts = parts[::-1]  # "5 = x"
    if len(signs) != 1 or signs[0] not in ("=", "\\in") or not LABEL.fullmatch(parts[0].strip()):
        return "", text
    return re.sub(r"[\s{}]", "", parts[0]), parts[1]


def _sides(text):
    """(signs, sides) of a relation or a chain of them, from the smaller to the larger; else None."""
    parts, signs = _split(text, (*RELATIONS, ",", ";"))
    if (
        not signs
        or "," in signs
        or ";" in signs
        or re.search(r"\\text\s*\{\s*(or|and)\s*\}|\s(or|and)\s", text)
    ):
        return None
    if set(signs) <= set(FLIPPED):
        return [FLIPPED[sign] for sign in signs[::-1]], parts[::-1]
    return signs, parts


def _pieces(text):
    """(kind, items): "list" (or set), "union", "matrix..", "(]".. by its brackets; ("", []) for a scalar."""
    if m := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", m[4].strip().removesuffix("\\\\"))]
        shape = "det" if m[3][0] in "vV" or m[2] == "|" else "matrix"
        factor = re.sub(r"\\(cdot|times)\s*$", "", m[1]).replace("-", "-1", m[1].strip() == "-")
        if shape == "matrix" or not factor:
            entries = [f"({factor})\\cdot({entry})" if factor else entry for row in rows for entry in row]
            return f"{shape} {[len(row) for row in rows]}", entries
    parts = _split(text, ("\\cup",))[0]
    if len(parts) > 1:
        return "union", parts
    if re.fullmatch(VALUE, measured(text)[0]):  # 1,234 cm
        return "", []
    joined = r"\\text\s*\{\s*(?:or|and)\s*\}|\\lor(?![a-z])|(?<=[\s\d,)}\]])(?:or|and)(?=[\s\d({\\-])"
    parts = _split(re.sub(joined, ",", text), (",", ";"))[0]
    if len(parts) == 1 and (m := re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)):
        return "list", _signs(_split(m[1], (",", ";"))[0])
    if len(parts) == 1 and (m := re.fullmatch(r"\{(.*)\}", text, re.DOTALL)):
        parts = _split(m[1], (",", ";"))[0]
    if len(parts) > 1:
        return "list", _signs(parts)  # "2, 3, and 5"
    if "\\pm" in text:
        return "list", _signs([text])
    if m := re.fullmatch(r"([(\[])(.*)([)\]])", text, re.DOTALL):
        parts = _split(m[2], (",", ";"))[0]
        if len(parts) > 1:
            return m[1] + m[3], parts
    return "", []


def _signs(parts):
    r"""The parts that are not empty; a part with a \pm becomes two."""
    both = [
        (p.replace("\\pm", "+").replace("\\mp", "-"), p.replace("\\pm", "-").replace("\\mp", "+"))
        for p in parts
    ]
    return [q for p, pair in zip(parts, both) if p.strip() for q in (pair if "\\pm" in p else [p])]


def _split(text, separators):
    """(parts, the separators between them), split at separators outside of all brackets.

    A bracket without a partner leaves the text whole.
    """
    parts, found, depth, start = [], [], 0, 0
    for m in TOKEN.finditer(text):
        token = m.group()
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if depth < 0:
            return [text], []
        if depth == 0 and token in separators:
            parts.append(text[start : m.start()])
            found.append(token)
            start = m.end()
    return ([*parts, text[start:]], found) if depth == 0 else ([text], [])
