r"""One spelling for what has several: normal("\\dfrac12") is "\\frac{1}{2}".

To know one more spelling, add a line to SPELLINGS.
"""

import re
import unicodedata

from grading.expressions import FUNCTIONS

CHARACTERS = {
    "−": "-", "–": "-", "±": "\\pm ", "×": "\\times ", "÷": "\\div ", "√": "sqrt ", "°": "^\\circ ",
    "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "′": "'", "’": "'", "²": "^2", "³": "^3",
    "∠": "\\angle ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "≤": "\\leq ", "≥": "\\geq ",
    "≠": "\\neq ", "∞": "\\infty ", "∅": "\\emptyset ", "ℝ": "\\R ",
}  # fmt: skip
for c in map(chr, [*range(0x391, 0x3A2), *range(0x3A3, 0x3AA), *range(0x3B1, 0x3CA)]):
    _, size, _, *name = unicodedata.name(c).replace("LAMDA", "LAMBDA").split()  # GREEK SMALL LETTER ALPHA
    CHARACTERS[c] = f"\\{name[-1].lower() if size == 'SMALL' else name[-1].capitalize()} "
CHARACTERS = str.maketrans(CHARACTERS)

VALUE = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
PARENTHESES = r"\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"


def _font(m):
    """Text in another font: a letter, a formula, or \\text."""
    bold, inside = re.match(r"\\(math|bold|bm|pmb|textbf|textit|emph)", m[0]), m[2].strip()
    if re.fullmatch("[A-Za-z]", inside) and (
        inside not in "mgshL" or not re.match(r"\\(text|mbox|mathrm)\b", m[0])
    ):
        return f"{{{inside}}}" if inside in "mgshL" else f" {inside}"  # a bold m is not a metre
    formula = bold and not re.fullmatch(r"[A-Za-z][A-Za-z\s.]*|%", inside)
    return f"{{{inside}}}" if formula else f"\\text{{{m[2]}}}"


def _repeating(m):
    """0.1\\overline{6} as a fraction."""
    nines = (10 ** len(m[3]) - 1) * 10 ** len(m[2])
    return f"\\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2] or '0')}}}{{{nines}}}"


FONT = rf"\\(mbox|hbox|emph|boldsymbol|bm|pmb|text|(?:text|math)(?:bf|it|rm|sf|tt|sc|up|normal))\s*{BRACED}"
DOTS = r"\s*(?:\.{2,}|…|\\[cl]?dots(?![a-zA-Z]))"
BASES = dict(
    two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, eleven=11, twelve=12, sixteen=16
)
SPELLINGS = [  # several spellings become one, in this order
    (r"(?<=\d)(?:,\s*\\!|\{,\s*\}|\\,)\s*(?=\d{3}(?!\d))", ""),
    (r"\\(left|right|displaystyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])\.?|\\!|(?<!\\)(?:\$|\\[()\[\]])", ""),
    (r"^\s*\*\*(.*)\*\*\s*$", r"\1"),
    (r"\s*\*\*\s*", "^"),
    (r"\\\\\s*\[[^\]]*\]|\\(cr|newline)(?![a-z])", r"\\\\"),
    (r"(?<!\\)\\[,;: ]|\\(q?quad|thinspace)(?![a-zA-Z])|~", " "),
    (r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1"),
    (r"\\(frac|binom)\s*(\w|\\pi(?![a-z]))", r"\\\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{BRACED})\s*(\w|\\pi(?![a-z]))", r"\1{\3}"),
    (r"\{\s*\\(?:rm|bf)\s+([^{}]*)\}", r"\\text{\1}"),
    (r"\\(?:rm|bf|it)(?![a-z])|\\math(?:rm|bf|it)\s+(?=\w)", " "),
    (r"_\s*\{?\s*\\(?:mathrm|mbox|text[a-z]*)\s*\{\s*(\w+)\s*\}(\s*\})?", r"_{\1}"),
    (rf"(?<=\d)\s*_\s*\{{?\s*({'|'.join(BASES)})(?![a-z])\s*\}}?", lambda m: f"_{{{BASES[m[1]]}}}"),
    *[(FONT, _font)] * 2,
    (r"(?<![\\A-Za-z])sqrt\s*(?=[\w({])", r"\\sqrt "),
    (r"\\(vec|hat|bar|tilde|overline)\s+(\w)", r"\\\1{\2}"),
    *[(rf"(\\sqrt\s*(?:\[[^\[\]]*\])?)\s*{PARENTHESES}", r"\1{\2}")] * 2,
    (r"(\\sqrt\s*(?:\[[^\[\]]*\])?)\s*(\w|\\pi(?![a-z]))", r"\1{\2}"),
    (rf"\^\s*{PARENTHESES}", r"^{\1}"),
    (r"\^\s*(-\s*(?:\d+|[A-Za-z](?![A-Za-z])))", r"^{\1}"),
    (r"\\sqrt\s*\[\s*(\d*[13579])\s*\]\s*\{\s*-\s*(\d+)\s*\}", r"(-\\sqrt[\1]{\2})"),  # the real root
    (r"\\?%", r"\\text{%}"),
    (r"\^\s*\{\s*\\circ\s*\}|(?<=\d)\^\s*(?:o(?![a-z])|\{\s*o\s*\})|\\degrees?(?![a-zA-Z])", r"^\\circ "),
    (r"\^\s*\\circ\s*(?:\\text\s*\{\s*)?([CF])(?![a-zA-Z])\s*\}?", r"\\text{ °\1}"),
    (rf"(?:\bUS|(?<![\d.,]))\s*\\\$\s*({VALUE})", r"\1\\text{ $ }"),
    (r"(?<=\d)\s*\\\$\s*$", r"\\text{ $ }"),
    (r"^\s*(-?)\s*\\\$(.+)$", r"\1\2\\text{ $ }"),
    (rf"([€£¥₹])\s*({VALUE})", r"\2\\text{ \1 }"),
    (r"(?<![\d)}])!=|\\not\s*=", r"\\neq "),
    (r">=|\\(ge|geqslant)(?![a-zA-Z])", r"\\geq "),
    (r"<=|=<|\\(le|leqslant)(?![a-zA-Z])", r"\\leq "),
    (r"\\ne(?![a-zA-Z])", r"\\neq "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(lbrace|rbrace)(?![a-zA-Z])", lambda m: "\\{" if m[1][0] == "l" else "\\}"),
    (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"(?<!\\)\\(?:(?:mathbb|Bbb)\s*(?:\{\s*R\s*\}|R)|R|reals)(?![a-zA-Z])", r"(-\\infty,\\infty)"),
    (
        r"\(\s*(?:\\[bp]?mod|mod|\\text\s*\{\s*mod\s*\})(?![a-z])\s*(\w+)\s*\)|\\pmod\s*\{?\s*(\w+)\s*\}?",
        r"\\pmod{\1\2}",
    ),
    (rf"(?<![A-Za-z\\])((?:{FUNCTIONS})(?=\s*[\w(\\{{^|])|pi|theta)(?![A-Za-z])", r"\\\1 "),
    (r"^-?\d{1,3}(?:,\d{3})+(?=\s*(?:\\pi|\\sqrt|[a-z](?![a-z])))", lambda m: m[0].replace(",", "")),
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?(?!\s*\d)", _repeating),
    (r"(\d+)\.()\((\d+)\)$", _repeating),
    # digits that are seen to repeat: one three times, several twice
    (rf"(?<![\d,])(\d*)\.(\d*?)(\d)\3{{2,}}{DOTS}", _repeating),
    (rf"(?<![\d,])(\d*)\.(\d*?)(\d{{2,}}?)\3+{DOTS}", _repeating),
    (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
    (r"^\(?\s*([A-Z])\s*\)$|^\{\s*\(\s*([A-Z])\s*\)\s*\}$", r"\1\2"),
]
SPELLINGS = [(re.compile(pattern), new) for pattern, new in SPELLINGS]
TEXT = re.compile(r"\\text\s*\{\s*((?!.*\b(?:and|or)\b)[A-Za-z]{2,}(?:[\s'-]+[A-Za-z]+)*)[\s.]*\}")


def normal(text):
    """The answer in one spelling."""
    text = text.translate(CHARACTERS)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    text = re.sub(r"(?<!\.)\.$", "", text.strip()).strip().strip("*").strip()
    text = re.sub(rf"^{BRACED}$", r"\1", text).strip()
    whole = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
    return whole[1].strip().rstrip(".") if whole and not TEXT.fullmatch(text) else text
