"""Symbolic equality by math-verify, in processes that the kernel ends when their time is up."""

import json
import os
import queue
import resource
import signal
import subprocess
import sys
import time

WORKER_BYTES = 4 << 30  # address space of a worker: Python, sympy, and what an answer may make of it


class Workers:
    """Processes that compare answers, each one pair at a time. Threads may share them."""

    def __init__(self, count):
        self._idle = queue.SimpleQueue()
        for worker in [_start_worker() for _ in range(count)]:
            self._idle.put(_ready(worker))

    def ask(self, answer, gold, seconds):
        """("equal", "different", or something else if the worker died of the pair; seconds)"""
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
        """End them. They also end when this process ends, since their input closes."""
        while not self._idle.empty():
            self._idle.get().stdin.close()


def _start_worker():
    command = [sys.executable, os.path.abspath(__file__)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def _ready(worker):
    """The worker, once it has loaded math-verify."""
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError(
            "a grader's worker did not start (its error is above); is math-verify[antlr4-13-2] installed?"
        )
    return worker


def _work():
    """A worker: it loads math-verify once, then forks a child that answers, and a new one if it dies."""
    limits = [
        bound
        for bound in (WORKER_BYTES, *resource.getrlimit(resource.RLIMIT_AS))
        if bound != resource.RLIM_INFINITY
    ]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), min(limits)))
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    # without the default's removal of units: to it the h of "\\pi r^2h" is one
    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
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
        # SIGALRM's default action ends the process, in whatever code it is stuck
        signal.setitimer(signal.ITIMER_REAL, timeout)
        parsing = dict(fallback_mode="no_fallback", parsing_timeout=None)
        exact = dict(float_rounding=30, numeric_precision=60, strict=True, timeout_seconds=None)
        try:
            a, b = (math_verify.parse(f"${text}$", latex, **parsing) for text in (answer, gold))
            same = bool(a and b) and math_verify.verify(b, a, **exact)
        except Exception:
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("equal" if same else "different", flush=True)


if __name__ == "__main__":
    _work()
