r"""Scalar expressions for math-verify's parser, with nothing in them that the parser would drop, merge or
misread.

    plain("r - R", names)  ->  "\\variable{r} - \\variable{R}"
"""

import re

FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp"
GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|omicron|varpi"
    "|rho|varrho|sigma|varsigma|tau|upsilon|phi|varphi|chi|psi|omega"
    "|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|hbar|ell"
)
KNOWN = (  # commands that the parser reads as usual
    FUNCTIONS + "|variable|frac|sqrt|pi|infty|cdot|times|div|mod|binom|sum|prod|int|lim|to|gcd|lcm|max|min"
    "|lfloor|rfloor|lceil|rceil"
)
ACCENTS = "bar|overline|vec|overrightarrow|hat|widehat|tilde|dot|mathcal|mathfrak"
NAME = re.compile(  # a variable with everything attached to it; or a command, to skip it
    r"(?P<call>(?<![a-zA-Z\\])f'*\s*\((?:[^()]|\([^()]*\))*\))|"
    rf"(\\(?:{ACCENTS})\s*\{{\s*\\?\w+\s*\}}|\\(?:{GREEK})(?![a-zA-Z])|(?<!\\)[^\W\d_])"
    r"(\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-zA-Z]+|\d+|[a-zA-Z]))?"
    r"((?:\s*'|\s*\^\s*(?:\\prime(?![a-zA-Z])|\{(?:\s|'|\\prime)+\}))*)|\\[a-zA-Z]+"
)
BOUND = re.compile(r"\\(int|lim)(?![a-z])|\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d\s*[a-z]")
DEGREES = re.compile(  # of an operand
    r"(\d+|\\variable\{\w+\}|\\frac\{[^{}]*\}\{[^{}]*\}|\([^()]*\))\s*(?:\^\s*\\circ|\^\s*\{\s*\\circ\s*\})"
)
LEFT_OVER = re.compile(  # numbers side by side, an index of no variable, a sign that the parser drops, 1/2x
    r"/\s*\d+\s*(?:\\variable|\()|\d\s+\d|(?<!\\log)(?<!\\sum)(?<!\\prod)(?<!\\int)(?<!\\lim)_|[^\w\s+\-*/^{}()\[\]|!,=\\]"
)
OPERAND = "\0"  # what follows belongs to a function
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
ENDS = {*"+-*/=,|", "\\cdot", "\\times", "\\div", "\\mod", *("\\" + name for name in FUNCTIONS.split("|"))}


def plain(text, names):
    """The LaTeX with one name for each variable; `names` keeps the names from text to text.

    Raises ValueError for text that the parser would misread.
    """
    text = re.sub(r"\\operatorname\*?\s*\{\s*([a-z]+)\s*\}", r"\\\1 ", text)
    text = re.sub(r"\\[lr]vert(?![a-z])", "|", text.replace("\\bmod", "\\mod"))
    text = re.sub(  # nothing computes with floating point
        r"(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text
    )
    if re.search(r"(?<![a-zA-Z\\])(to|by|of|from|per|remainder)(?![a-zA-Z])", text):
        raise ValueError(f"words, which the parser would multiply: {text}")
    bound, indexed = BOUND.search(text), "\\sum" in text or "\\prod" in text

    def name(m):
        call, letter, below, primes = m.groups()
        if not call and not letter:
            return m[0]
        if call:  # f(2x) is not 2f(x); another letter before a parenthesis is a factor
            key = re.sub(r"\s", "", call)
        else:
            key = (
                re.sub(r"\s", "", letter),
                re.sub(r"[\s{}]", "", below or ""),
                len(re.findall("'|prime", primes)),
            )
        if not call and not any(key[1:]) and re.fullmatch("[A-Za-z]", letter):
            if bound and letter not in "eiEI":
                return letter
            if letter != "i" or not indexed:
                return rf"\variable{{{letter}}}"
        return rf"\variable{{n{names.setdefault(key, len(names))}}}"

    text = NAME.sub(name, text)
    text = re.sub(r"([\^_])\s*(\d+)", r"\1{\2}", text)
    text = DEGREES.sub(r"(\\frac{\\pi \1}{180})", text)
    text = re.sub(r"\s+_", "_", text)
    unknown = set(re.findall(r"\\([a-zA-Z]+|.)", text)) - set(KNOWN.split("|"))
    infinite = "\\infty" in text and not re.fullmatch(r"\s*[-+]?\s*\\infty\s*", text) and not bound
    if unknown or infinite and not indexed or LEFT_OVER.search(text):
        raise ValueError(f"the parser would misread {text}")
    text = _arguments(text)
    # a number beside a parenthesis or a fraction in front of one is a factor, not part of a mixed number
    text = re.sub(r"(?<=[\d)}])\s*(?=\()|(?<=[)}])\s*(?=\d|\\frac)", r"\\cdot ", text)
    return text.replace(OPERAND, "")


def _arguments(text):
    r"""With parentheses around the argument of each function: the parser reads \sin x \cdot y as sin(xy)."""
    tokens, out, i = TOKEN.findall(text), [], 0
    while i < len(tokens):
        out.append(tokens[i])
        i += 1
        function = re.fullmatch(rf"\\({FUNCTIONS})", out[-1])
        if not function and out[-1] not in ("\\sum", "\\prod", "\\int", "\\lim"):
            continue
        while i < len(tokens) and tokens[i] in ("^", "_", " "):
            end = _end(tokens, i + 1) if tokens[i] != " " else i + 1
            out.append("".join(tokens[i:end]))
            i = end
        out.append(OPERAND)
        if function and i < len(tokens) and tokens[i] not in ("(", "{", "[", "|"):
            end = i
            while end < len(tokens) and tokens[end] not in ENDS and tokens[end] not in (")", "}", "]"):
                end = _end(tokens, end)
            if end < len(tokens) and tokens[end] == "/":
                raise ValueError(f"is the divisor part of the function's argument? {text}")
            out.append("(" + _arguments("".join(tokens[i:end])) + ")")
            i = end
    return "".join(out)


def _end(tokens, i):
    """The end of the token or group that begins at i."""
    depth = 0
    while i < len(tokens):
        depth += (tokens[i] in ("(", "{", "[")) - (tokens[i] in (")", "}", "]"))
        i += 1
        if depth <= 0:
            break
    return i
