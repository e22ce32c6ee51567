r"""Is the final answer of a text right? The reward of RL: it is exact, never hangs, and never executes what it reads.

    grader = Grader(workers=4, timeout=1.0)
    grader.grade(texts, golds)  # [True, False, ...]

Rules take an answer and the gold one apart into plain pieces: lists and sets (in any order), tuples and intervals (in order, with
their brackets), matrices, numbers (compared as exact fractions), words. Only a scalar expression that is none of these goes to
math-verify, in a worker process that the kernel ends when its time is up. Unlike the paper's reward nothing is approximate: there
is no percentage rule and no tolerance of 1e-3 (paper.md).
"""

import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

MAX_LENGTH = 400  # characters of an answer; no gold answer of MATH or GSM8K has half as many
WORKER_BYTES = 4 << 30  # address space of a worker: Python, sympy, and what an answer may make of it

# --- the final answer of a text -------------------------------------------------------------------------------------------------


def extract_answer(text):
    r"""The final answer that a response states: the last \boxed{..}, else the last "#### ..", else the last "The answer is ..".

    None where there is none. A last box that is empty or never closed is no answer, and an earlier one does not take its place.
    """
    box = text.rfind("\\boxed")
    if box >= 0:
        opening = re.compile(r"\s*\{").match(text, box + len("\\boxed"))
        return _inside_braces(text, opening.end()) if opening else None
    for pattern in (r"####[ \t]*([^\n]*)", r"[Tt]he (?:final )?answer is:?[ \t]*([^\n]*?)(?=\.\s|\.?$|\n)"):
        stated = re.findall(pattern, text)
        if stated:
            return stated[-1].strip() or None
    return None


def _inside_braces(text, start):
    """The stripped text from start to the brace that closes the one before start; None if it is empty or the brace never closes."""
    depth = 1
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(m.group(), 0)
        if depth == 0:
            return text[start : m.start()].strip() or None
    return None


# --- rules ----------------------------------------------------------------------------------------------------------------------

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
MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<=\s)(\d+)\s*/\s*(\d+))")
SCIENTIFIC = re.compile(rf"({VALUE})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*([-+]?\d{{1,3}})\s*\}}|(\d))")
UNIT = re.compile(
    r"(?P<value>.*[^\s{(\[,])\s*(?:\\text\s*\{(?P<text>[^{}]*)\}(?:\s*\^\s*\{?(?P<power>\d)\}?)?"
    r"|(?<=\d)\s+(?P<words>(?!or\b|and\b|pi\b)(?:[A-Za-z]{2,}|[gmhsL]\b)(?:[\s./]+[A-Za-z]+)*)(?:\s*\^\s*\{?(?P<power2>\d)\}?)?)",
    re.DOTALL,
)
NO_UNIT = re.compile(  # words that say how many, or something else altogether
    r"hundred|thousand|[mb]illion|dozen|squared|cubed|factorial|base|mod|plus|minus|times|over|not|is|if|or|and|a?r?c?(sin|cos|tan)h?|log|ln|sqrt"
)
UNIT_NAMES = {"percent": "%", "meters": "m", "meter": "m", "centimeters": "cm", "inch": "inches", "degree": "degrees", "dollar": "dollars"}
LABEL = re.compile(r"\s*((?:m?\\angle\s*)?[A-Z]{2,3}|[A-Za-z](?:\s*\([A-Za-z]\)|_\{?\w\}?)?)\s*(?:=|\\in(?![a-z]))(?!.*[=<>])")
WORDS = re.compile(r"[A-Z]|[A-Za-z]{3,}(?:[\s'-]+[A-Za-z]+)*")
LITERAL = re.compile(r"[^_:]*\d\s*(?:_\s*\{?\s*\w+\s*\}?|:\s*\d+(?::\d+)?)")  # a numeral in another base, a time, a ratio
MATRIX = re.compile(r"\\begin\{([pbBvV]?)(?:matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{[pbBvV]?(?:matrix|array)\}", re.DOTALL)
TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)


def equal(answer, gold, symbolic):
    """Whether two answers are the same one. symbolic(a, b) -> bool decides about scalar expressions that no rule covers."""
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
    for sign in ("=", "\\approx", "\\pmod", "\\bmod", "\\equiv", "\\dots", "\\ldots"):  # what math-verify drops in part
        if (sign in a) != (sign in b):
            return False
    if re.search(r"\d\s+\d", a + "|" + b) or _letters(a) != _letters(b) and _letters(a.lower()) == _letters(b.lower()):
        return False  # 3 5 is not 35, and X is not x
    return symbolic(_rational(a), _rational(b))


def _letters(text):
    """The variables of an expression."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", text)))


def _squeezed(text):
    """Without white space, but for that between digits: "3 1/2" is not 31/2."""
    return re.sub(r"(?<![\d,])\s+|\s+(?!\d)", "", text)


def _number(text):
    """Exact value of a decimal, a fraction, a mixed number or a power of ten; None if the text is none of these."""
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
    words = re.split(r"[\s.]+", (m["text"] if m["text"] is not None else m["words"]).strip(" .").casefold()) if m else []
    if not m or (m["words"] and _number(m["value"]) is None):  # "x^2 m" is a product
        return text, ""
    if len(words) > 4 or any(NO_UNIT.fullmatch(word) for word in words):
        return text, ""
    return m["value"], " ".join(UNIT_NAMES.get(word, word) for word in words) + (m["power"] or m["power2"] or "")


def _pieces(text):
    """(kind, items) of an answer with parts: "list" (also a set), "union", "matrix..", "(]".. by its brackets; ("", []) for a scalar."""
    if m := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", m[2].strip().removesuffix("\\\\"))]
        shape = "det" if m[1] in ("v", "V") else "matrix"
        return f"{shape} {[len(row) for row in rows]}", [entry for row in rows for entry in row]
    if "\\pm" in text and "," not in text:
        return "list", [text.replace("\\pm", "+").replace("\\mp", "-"), text.replace("\\pm", "-").replace("\\mp", "+")]
    parts = _split(text, ("\\cup",))
    if len(parts) > 1:
        return "union", parts
    if re.fullmatch(VALUE, text):
        return "", []
    parts = _split(re.sub(r"\\text\s*\{\s*(?:or|and)\s*\}|(?<=[\s\d])(?:or|and)(?=\s)", ",", text), (",", ";"))
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
    """Split at separators that stand outside of all brackets. A bracket that does not fit leaves the text whole."""
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


# --- worker processes -----------------------------------------------------------------------------------------------------------


class Grader:
    """Grades with `workers` processes for the symbolic part; a pair that needs it for longer than timeout seconds is False.

    counts: pairs graded, answered from the cache (every distinct pair is graded once), timed_out, and texts with no_answer.
    on_graded is called after each pair, in the thread that graded it.
    """

    MAX_CACHE = 500_000  # pairs

    def __init__(self, workers=1, timeout=1.0, on_graded=lambda: None):
        self.timeout, self.cache, self.on_graded = timeout, {}, on_graded
        self.counts = dict(graded=0, cached=0, timed_out=0, no_answer=0)
        self._threads, self._started = ThreadPoolExecutor(workers), {}  # _started: pair -> Future
        self._idle = queue.SimpleQueue()
        started = [_start_worker() for _ in range(workers)]
        for worker in started:
            self._idle.put(_ready(worker))

    def start(self, texts, golds):
        """Begin to grade, in the background, what grade will be asked later. Returns the pairs of a final answer and its gold answer."""
        pairs = [(extract_answer(text), gold) for text, gold in zip(texts, golds, strict=True)]
        for pair in pairs:
            if pair not in self.cache and pair not in self._started and pair[0] is not None:
                self._started[pair] = self._threads.submit(self._grade_pair, pair)
        return pairs

    def grade(self, texts, golds):
        """Whether each text's final answer equals its gold answer (the bare answer). Lists of equal length -> list of bool."""
        pairs = self.start(texts, golds)
        if len(self.cache) > self.MAX_CACHE:
            self.cache = {pair: self.cache[pair] for pair in pairs if pair in self.cache}
        new = {pair for pair in pairs if pair in self._started}
        results = {pair: self._started.pop(pair).result() for pair in new}
        known = self.cache | results
        # a pair that ran out of time, perhaps on a busy machine, gets another chance; what is too long is not worth its memory
        self.cache |= {pair: right for pair, right in results.items() if right is not None and len(pair[0]) <= MAX_LENGTH}
        missing = sum(answer is None for answer, _ in pairs)
        timed_out = sum(right is None for right in results.values())
        for name, count in dict(graded=len(new), cached=len(pairs) - missing - len(new), timed_out=timed_out, no_answer=missing).items():
            self.counts[name] += count
        return [bool(known.get(pair)) for pair in pairs]

    def _grade_pair(self, pair):
        """True, False, or None if the pair's time is up."""
        left = self.timeout

        def symbolic(answer, gold):
            nonlocal left
            if left <= 0:
                raise TimeoutError
            reply, seconds = self._ask(answer, gold, left)
            left -= seconds
            if reply not in ("equal", "different"):
                raise TimeoutError
            return reply == "equal"

        try:
            return equal(*pair, symbolic)
        except TimeoutError:
            return None
        finally:
            self.on_graded()

    def _ask(self, answer, gold, seconds):
        """What a worker says of a pair ("equal", "different", or something else if it died of it), and the seconds it took."""
        worker = self._idle.get()
        start = time.perf_counter()
        try:
            worker.stdin.write(json.dumps([answer, gold, seconds]) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except BrokenPipeError:
            reply = ""
        took = time.perf_counter() - start
        if not reply:  # gone altogether: killed from outside, say
            worker = _ready(_start_worker())
        self._idle.put(worker)
        return reply.strip(), took

    def close(self):
        """End the workers. They end by themselves, too, when this process ends in whatever way: their input closes."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stdin.close()


def is_correct(text, gold):
    """Whether one text's final answer equals the bare gold answer, by the same rules and within the same time limit."""
    global _grader
    _grader = _grader or Grader()
    return _grader.grade([text], [gold])[0]


_grader = None


def _start_worker():
    command = [sys.executable, os.path.abspath(__file__)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _ready(worker):
    """The worker, once it has loaded math-verify."""
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError("a grader's worker did not start (its error stands above); is math-verify[antlr4-13-2] installed?")
    return worker


def _work():
    """A worker: this process loads math-verify once, then forks a child that answers. When the kernel ends a child, it forks another."""
    limits = [bound for bound in (WORKER_BYTES, *resource.getrlimit(resource.RLIMIT_AS)) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), min(limits)))
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    # without the default's removal of units: to it the h of "\\pi r^2h" is one
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    latex = [math_verify.LatexExtractionConfig(normalization_config=rules)]
    print("ready", flush=True)
    while True:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # parsers complain there
            _answer(math_verify, latex)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:  # its input has closed
            return
        print("killed", flush=True)


def _answer(math_verify, latex):
    for line in iter(sys.stdin.readline, ""):
        answer, gold, timeout = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)  # SIGALRM's default action ends the process, in whatever code it is stuck
        try:
            a, b = (math_verify.parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None) for text in (answer, gold))
            same = bool(a and b) and math_verify.verify(b, a, float_rounding=30, numeric_precision=60, strict=True, timeout_seconds=None)
        except Exception:
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("equal" if same else "different", flush=True)


if __name__ == "__main__":
    _work()
