r"""Are two final answers the same? Rules that take both apart into plain pieces, exactly and
without executing anything.

    equal("0.5", "\\frac{1}{2}", symbolic)  ->  True

The pieces: lists and sets (in any order), tuples and intervals (in order, with their brackets),
matrices, numbers (compared as exact fractions), words. Only a scalar expression that is none of
these is left to symbolic.
"""

import re
from fractions import Fraction

MAX_LENGTH = 400  # characters of an answer; no gold answer of MATH or GSM8K has half as many

SPELLINGS = [  # what is written in several ways gets one; in this order
    (r"\\(left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])\.?|\\!|\\\$|\$", ""),
    (r"^\s*\*\*(.*)\*\*\s*$", r"\1"),
    (r"(?<=\w)\s*\*\*\s*(\w+)", r"^{\1}"),
    (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\(boldsymbol|bm|emph|mbox|text[a-z]+|math(bf|rm|it|sf))(?![a-zA-Z])", r"\\text"),
    (r"\\?%", r"\\text{%}"),
    (r"\^\s*(\\circ|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])|°", r"\\text{degrees}"),
    (r"\s+degrees?$", r"\\text{degrees}"),
    (r"[−–]", "-"),
    (r"\\(le|ge|ne)(?![a-zA-Z])", r"\\\1q"),
    (r"\\(lbrace|rbrace)(?![a-zA-Z])", lambda m: "\\{" if m[1][0] == "l" else "\\}"),
    (r"π|(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"∞", r"\\infty "),
    (r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"(?<=\d)\{,\}(?=\d{3})", ","),
    (r"^(\(\s*)?\\text\s*\{\s*(\(?[A-Z]\)?)\s*\}(\s*\))?$", r"\1\2\3"),
]
SPELLINGS = [(re.compile(pattern), new) for pattern, new in SPELLINGS]
VALUE = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
SLASHED = re.compile(rf"({VALUE})\s*/\s*({VALUE})")
FRACTION = re.compile(rf"([-+]?)\s*\\frac\s*\{{\s*({VALUE})\s*\}}\s*\{{\s*({VALUE})\s*\}}")
MIXED = re.compile(
    r"([-+]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<=\s)(\d+)\s*/\s*(\d+))"
)
SCIENTIFIC = re.compile(
    rf"({VALUE})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*([-+]?\d{{1,3}})\s*\}}|(\d))"
)
UNIT = re.compile(
    r"(?P<value>.*[^\s{(\[,])\s*(?:\\text\s*\{(?P<text>[^{}]*)\}(?:\s*\^\s*\{?(?P<power>\d)\}?)?"
    r"|(?<=\d)\s+(?P<words>(?!or\b|and\b|pi\b)(?:[A-Za-z]{2,}|[gmhsL]\b)(?:[\s./]+[A-Za-z]+)*)(?:\s*\^\s*\{?(?P<power2>\d)\}?)?)",
    re.DOTALL,
)
NO_UNIT = re.compile(  # words that say how many, or something else altogether
    r"hundred|thousand|[mb]illion|dozen|squared|cubed|factorial|base|mod|plus|minus|times|over|not|is|if|or|and|a?r?c?(sin|cos|tan)h?|log|ln|sqrt"
)
UNIT_NAMES = {
    "percent": "%",
    "meters": "m",
    "meter": "m",
    "centimeters": "cm",
    "inch": "inches",
    "degree": "degrees",
    "dollar": "dollars",
}
LABEL = re.compile(
    r"\s*((?:m?\\angle\s*)?[A-Z]{2,3}|[A-Za-z](?:\s*\([A-Za-z]\)|_\{?\w\}?)?)\s*(?:=|\\in(?![a-z]))(?!.*[=<>])"
)
WORDS = re.compile(r"[A-Z]|[A-Za-z]{3,}(?:[\s'-]+[A-Za-z]+)*")
# a numeral in another base, a time, a ratio
LITERAL = re.compile(r"[^_:]*\d\s*(?:_\s*\{?\s*\w+\s*\}?|:\s*\d+(?::\d+)?)")
DROPPED = ("=", "\\approx", "\\pmod", "\\bmod", "\\equiv", "\\dots", "\\ldots")  # by math-verify, in part
MATRIX = re.compile(
    r"\\begin\{([pbBvV]?)(?:matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{[pbBvV]?(?:matrix|array)\}", re.DOTALL
)
TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)


def equal(answer, gold, symbolic):
    """Whether two answers are the same one. symbolic(a, b) -> bool decides about scalar expressions
    that no rule covers.
    """
    answer, gold = " ".join(answer.split()), " ".join(gold.split())
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_LENGTH or not answer.isprintable() or re.search(r"\d{61}", answer):
        return False
    if any(c.isdecimal() and not c.isascii() for c in answer):
        return False
    return _same(_normal(answer), _normal(gold), symbolic)


def _normal(text):
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(".").strip().strip("*").strip()
    whole = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
    return whole[1].strip().rstrip(".") if whole else text


def _same(a, b, symbolic, depth=0):
    if _squeezed(a) == _squeezed(b):
        return bool(a.strip())
    if depth > 8 or not a.strip() or not b.strip():
        return False

    def again(x, y):
        return _same(x.strip(), y.strip(), symbolic, depth + 1)

    (label_a, rest_a), (label_b, rest_b) = _label(a), _label(b)
    if label_a or label_b:  # "x = 5" is 5, but not "y = 5"
        return (not (label_a and label_b) or label_a == label_b) and again(rest_a, rest_b)
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return x == y
    kind_a, items_a = _pieces(a)
    kind_b, items_b = _pieces(b)
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
    (value_a, unit_a), (value_b, unit_b) = _unit(a), _unit(b)
    if unit_a or unit_b:  # a unit may be left out, but not exchanged
        return (not (unit_a and unit_b) or unit_a == unit_b) and again(value_a, value_b)
    if LITERAL.fullmatch(a) or LITERAL.fullmatch(b):
        return re.sub(r"[\s{}]", "", a) == re.sub(r"[\s{}]", "", b)
    a, b = (re.sub(r"^\(([A-Z])\)$", r"\1", x.strip()) for x in (a, b))
    if WORDS.fullmatch(a) and WORDS.fullmatch(b):
        return a == b or len(a) > 1 and a.casefold() == b.casefold()  # one letter is a choice
    if any((sign in a) != (sign in b) for sign in DROPPED):
        return False
    if (
        re.search(r"\d\s+\d", a + "|" + b)
        or _letters(a) != _letters(b)
        and _letters(a.lower()) == _letters(b.lower())
    ):
        return False  # 3 5 is not 35, and X is not x
    return symbolic(_rational(a), _rational(b))


def _letters(text):
    """The variables of an expression."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", text)))


def _squeezed(text):
    """Without white space, but for that between digits: "3 1/2" is not 31/2."""
    return re.sub(r"(?<![\d,])\s+|\s+(?!\d)", "", text)


def _number(text):
    """Exact value of a decimal, a fraction, a mixed number or a power of ten; None if the text is
    none of these.
    """
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
        return _fraction(m[1]) * Fraction(10) ** int(m[2] or m[3])
    return None


def _fraction(text):
    return Fraction(text.replace(",", "").rstrip("."))


def _divide(a, b):
    return _fraction(a) / _fraction(b) if _fraction(b) else None


def _rational(text):
    """Decimals written as fractions, so that nothing downstream computes with floating point."""
    return re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)


def _label(text):
    m = LABEL.match(text)
    return (re.sub(r"[\s{}]", "", m[1]), text[m.end() :]) if m else ("", text)


def _unit(text):
    """(value, unit) of "5\\text{ cm}^2" or "5 cm^2"; the unit is "" where there is none."""
    m = UNIT.fullmatch(text)
    if not m or (m["words"] and _number(m["value"]) is None):  # "x^2 m" is a product
        return text, ""
    unit = m["text"] if m["text"] is not None else m["words"]
    words = re.split(r"[\s.]+", unit.strip(" .").casefold())
    if len(words) > 4 or any(NO_UNIT.fullmatch(word) for word in words):
        return text, ""
    return m["value"], " ".join(UNIT_NAMES.get(word, word) for word in words) + (
        m["power"] or m["power2"] or ""
    )


def _pieces(text):
    """(kind, items) of an answer with parts: "list" (also a set), "union", "matrix..", "(]".. by
    its brackets; ("", []) for a scalar.
    """
    if m := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", m[2].strip().removesuffix("\\\\"))]
        shape = "det" if m[1] in ("v", "V") else "matrix"
        return f"{shape} {[len(row) for row in rows]}", [entry for row in rows for entry in row]
    if "\\pm" in text and "," not in text:
        return "list", [
            text.replace("\\pm", "+").replace("\\mp", "-"),
            text.replace("\\pm", "-").replace("\\mp", "+"),
        ]
    parts = _split(text, ("\\cup",))
    if len(parts) > 1:
        return "union", parts
    if re.fullmatch(VALUE, text):
        return "", []
    parts = _split(
        re.sub(r"\\text\s*\{\s*(?:or|and)\s*\}|(?<=[\s\d])(?:or|and)(?=\s)", ",", text), (",", ";")
    )
    if len(parts) > 1:
        parts = [p for p in parts if p.strip()]  # "2, 3, and 5"
        return "list", [q for p in parts for q in (_pieces(p)[1] if "\\pm" in p else [p])]
    if m := re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL):
        return "list", [p for p in _split(m[1], (",", ";")) if p.strip()]
    if m := re.fullmatch(r"([(\[])(.*)([)\]])", text, re.DOTALL):
        parts = _split(m[2], (",", ";"))
        if len(parts) > 1:
            return m[1] + m[3], parts
    return "", []


def _split(text, separators):
    """Split at separators that stand outside of all brackets.

    A bracket that does not fit leaves the text whole.
    """
    parts, depth, start = [], 0, 0
    for m in TOKEN.finditer(text):
        token = m.group()
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if depth < 0:
            return [text]
        if depth == 0 and token in separators:
            parts.append(text[start : m.start()])
            start = m.end()
    return [*parts, text[start:]] if depth == 0 else [text]
