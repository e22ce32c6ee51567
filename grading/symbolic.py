"""Symbolic equality, in processes that the kernel ends when an answer has used up its time.

math-verify's parser reads the LaTeX; sympy then has to prove that the two are equal. What sympy cannot prove
is different: numbers that agree in many digits never count as equal.
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
from pathlib import Path

from grading.expressions import plain

WORKER_BYTES = 4 << 30  # address space of a worker: Python, sympy, and what an answer can make of it
# seconds of wall clock that an answer can take, and how many more for each second of its CPU time:
# only an answer that sleeps takes so long, or any answer on a hopelessly busy machine
FAR, FAR_PER_SECOND = 30, 30
RELATION = re.compile(r"\((.*)\)(=|\\neq|<|\\leq)\((.*)\)")


class Workers:
    """Processes that compare answers, each one pair at a time. Threads can share them."""

    def __init__(self, count):
        self._idle = queue.SimpleQueue()
        for worker in [_start_worker() for _ in range(count)]:
            self._idle.put(_ready(worker))

    def ask(self, answer, gold, seconds):
        """("equal", "different", or something else if the pair killed the worker; CPU seconds)."""
        worker = self._idle.get()
        try:
            worker.stdin.write(json.dumps([answer, gold, seconds]) + "\n")
            worker.stdin.flush()
            reply, *took = worker.stdout.readline().split()
        except (BrokenPipeError, ValueError):  # it is gone, for example killed from outside
            worker, reply, took = _ready(_start_worker()), "", []
        self._idle.put(worker)
        return reply, float(took[0]) if took else seconds

    def close(self):
        """End the workers. They also end with this process, because their input closes."""
        while not self._idle.empty():
            self._idle.get().stdin.close()


def _start_worker():
    command = [sys.executable, "-c", "from grading.symbolic import work; work()"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], start_new_session=True, **pipes)


def _ready(worker):
    """The worker, after it has loaded math-verify."""
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError(
            "a grader's worker did not start (its error is above); is math-verify[antlr4-13-2] installed?"
        )
    return worker


def work():
    """A worker: it loads math-verify once, then forks a child that answers, and a new one if it dies."""
    limits = [
        bound
        for bound in (WORKER_BYTES, *resource.getrlimit(resource.RLIMIT_AS))
        if bound != resource.RLIM_INFINITY
    ]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), min(limits)))
    math = _Math()
    print("ready", flush=True)
    while True:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # where parsers complain
            _answer(math)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:  # its input has closed
            return
        print("killed", flush=True)


def _answer(math):
    # the default action of both signals ends the process, in whatever code it is stuck
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for line in iter(sys.stdin.readline, ""):
        answer, gold, seconds = json.loads(line)
        before = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time: how busy the machine is does not matter
        signal.setitimer(signal.ITIMER_REAL, FAR + FAR_PER_SECOND * seconds)
        try:
            same = math.same(answer, gold)
        except Exception:
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("equal" if same else "different", time.process_time() - before, flush=True)


# --- proof ---


class _Math:
    """math-verify's parser, and proofs by sympy."""

    def __init__(self):
        import sympy
        from latex2sympy2_extended.latex2sympy2 import ConversionConfig
        from math_verify.parser import latex2sympy

        self.sympy, self.latex2sympy = sympy, latex2sympy
        self.config = ConversionConfig(lowercase_symbols=False)
        self.constants = {
            sympy.Symbol(name, real=True): value for name, value in (("e", sympy.E), ("i", sympy.I))
        }

    def same(self, answer, gold):
        names, texts = {}, (answer, gold)
        relations = [RELATION.fullmatch(text) for text in texts]
        if all(relations):
            a, b = (self.parse(m[1], names) - self.parse(m[3], names) for m in relations)
            return relations[0][2] == relations[1][2] and self.same_relation(a, b, relations[0][2])
        a, b = (self.parse(text, names) for text in texts)
        return a == b or self.is_zero(a - b)

    def same_relation(self, a, b, sign):
        """Whether both relations to 0 are the same: one difference is the other times a number."""
        if a.free_symbols != b.free_symbols or not a.free_symbols:
            return False
        for point in self.points(a.free_symbols):
            at_a, at_b = a.subs(point), b.subs(point)
            if self.is_not_zero(at_a) and self.is_not_zero(at_b):
                factor = at_a / at_b  # a negative one would turn < round
                return (sign in ("=", "\\neq") or bool(factor.evalf(15) > 0)) and self.is_zero(a - factor * b)
        return False

    def parse(self, text, names):
        options = dict(is_real=True, normalization_config=None, conversion_config=self.config)
        value = self.latex2sympy(plain(text, names), **options).xreplace(self.constants).doit()
        s = self.sympy
        infinite = value.has(s.oo, -s.oo) and value not in (s.oo, -s.oo)
        if not isinstance(value, s.Expr) or infinite or value.has(s.nan, s.zoo, s.Float):
            raise ValueError(f"no number and no expression: {text}")
        return value

    def points(self, symbols):
        """Points at which expressions are evaluated; none of them is special."""
        symbols = sorted(symbols, key=str)
        for shift, sign in ((17, 1), (29, 1), (41, -1)):
            yield {
                x: self.sympy.Rational(shift + 6 * i, 11 + 2 * i) * sign ** (i + 1)
                for i, x in enumerate(symbols)
            }

    def is_not_zero(self, value, point=None):
        """Whether a number is certainly not 0: one of its digits is known, however small the number is."""
        parts = value.evalf(15, subs=point).as_real_imag()
        return any(
            part.is_Float and part._prec > 1 and part != 0 or part.is_Rational and part for part in parts
        )

    def is_zero(self, difference):
        """Whether sympy proves that a difference is 0 everywhere."""
        s = self.sympy
        if difference == 0 or s.expand(difference) == 0:
            return True
        symbols = difference.free_symbols
        for point in self.points(symbols) if symbols else [None]:
            if self.is_not_zero(difference, point):
                return False
        if not symbols and difference.is_algebraic:
            x = s.Dummy()
            return s.minimal_polynomial(difference, x) == x
        if s.expand(s.numer(s.together(difference))) == 0 or s.simplify(difference) == 0:
            return True
        return s.simplify(s.expand_log(s.expand_trig(s.logcombine(difference)))) == 0
