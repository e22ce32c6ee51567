"""Ranks that watch each other: a signal, a failure or a hang on one rank ends all, with the reason.

    with Watch(hang_timeout=90) as watch:                # on every rank, once the process group is there
        try:
            with watch.phase("sample", can_stop=True):
                watch.step()                             # a sign of progress; raises Stopped if the run should stop
            with watch.phase("train"):
                ...
        except Stopped:                                  # raised on all ranks or on none
            ...                                          # save, and leave with watch.exit_code()

Once a second a thread of each rank exchanges its rank's state with the other threads. They react to:

    signal    SIGTERM, SIGINT or SIGHUP to any rank stops all ranks: at once before `graceful` is set, later at the
              end of the next phase that can stop. Another signal at least AGAIN seconds later ends the process at
              once. (One that comes sooner can be the same: a scheduler signals all processes, then torchrun signals
              its ranks.)
    failure   an exception ends its rank with the reason, and the other ranks too; in a phase that can stop, all ranks
              stop at the end of the phase, as after a signal
    hang      a rank is in a phase, does not wait for others and shows no progress for hang_timeout seconds; or the
              rank is frozen and silent for SILENT seconds
    death     the connection of a rank closes (startup.py handles the death of torchrun)

The exit code is 128 + the number of the signal (SIGTERM 143, SIGINT 130), or 1.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Stopped(Exception):
    """Raised when the run should stop: by step(), on one rank, to leave a phase; at its end, on all ranks."""


class Watch:
    """One rank's part in the watch over all ranks; every rank makes one.

    hang_timeout: seconds; None: never report a hang. tensor_parallel: this many consecutive ranks share an
    engine, so they take the same steps, and leave a phase that can stop after the same step.
    """

    EVERY = 1.0  # seconds between two exchanges
    SILENT = 60  # seconds until a frozen rank is given up
    GRACE = 60  # seconds from a signal to the end of a phase
    AGAIN = 2.0  # seconds until another signal counts as a second one

    def __init__(self, hang_timeout=None, tensor_parallel=1):
        self.rank, self.world, self.hang_timeout = dist.get_rank(), dist.get_world_size(), hang_timeout
        self.stop = False  # whether the run should stop, because of:
        self.signal = 0  # number of the signal to this or another rank; 0: none
        self.error = None  # this rank's exception in a phase that can stop
        self.graceful = False  # set it as soon as there is something to save
        self.agreed = False  # all ranks know that the run stops
        self.phase_name, self.waits, self.beats, self.steps = None, False, 0, 0
        self.failed, self.closing = False, False
        self.told = threading.Event()  # the others know of this rank's failure, or it knows of theirs:
        self.cause = None
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.SILENT))
        self.sharers = dist.new_subgroups(tensor_parallel)[0] if tensor_parallel > 1 else None

    # --- for the main thread ---

    def beat(self, *_):
        """A sign of progress."""
        self.beats += 1

    def step(self):
        """A sign of progress in a phase that can stop; raises Stopped if the run should stop."""
        self.beat()
        self.steps += 1
        if self.sharers is None:
            if self.stop:
                raise Stopped
        elif self.steps % 16 == 0:  # together: one rank alone would leave the others waiting in the engine
            stop = torch.tensor([self.stop], dtype=torch.int32)
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=self.sharers)
            if stop.item():
                raise Stopped

    def each(self, items):
        """The items, each of them a sign of progress."""
        for item in items:
            self.beat()
            yield item

    def follow(self, *networks):
        """Count each layer that these FSDP networks compute as a sign of progress."""
        for network in networks:
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.register_forward_pre_hook(self.beat)

    @contextmanager
    def phase(self, name, can_stop=False):
        """A part of the run in which this rank must show progress.

        A phase that can stop holds no collectives, so a rank can leave it alone, by step() or by failing.
        All ranks meet at the end of such a phase. If one of them should stop, Stopped is raised on all.
        """
        self.beat()
        self.phase_name = name
        try:
            yield
        except Stopped:
            if not can_stop:
                raise
        except Exception as error:
            if not can_stop:
                raise
            traceback.print_exc()
            self.say(f"failed: {error!r}; all ranks save what they have and stop")
            self.error, self.stop = error, True
        finally:
            self.phase_name = None
            self.beat()
        if can_stop:
            self._meet()

    def _meet(self):
        """All ranks meet; raises Stopped on all of them if one should stop."""
        found = torch.tensor([self.stop, self.signal], dtype=torch.int32)
        self.waits = True
        dist.all_reduce(found, dist.ReduceOp.MAX)
        self.waits = False
        self.beat()
        stop, number = found.tolist()
        if stop:
            self.stop, self.signal, self.agreed = True, self.signal or number, True
            raise Stopped

    def exit_code(self):
        return 128 + self.signal if self.signal else int(self.stop)

    def say(self, message):
        print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)

    def __enter__(self):
        sys.stdout.reconfigure(line_buffering=True)  # os._exit would drop what is not written yet
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)  # a signal is noticed even while the main thread waits in compiled code
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        self.thread = threading.Thread(target=self._exchange, daemon=True)
        self.thread.start()
        return self

    def close(self):
        """End the watch, as soon as all ranks have called this."""
        self.closing, self.graceful = True, False
        self.thread.join()

    def __exit__(self, kind, error, _):
        if error is None:
            return self.close()
        self.failed = True
        self.told.wait(3 * self.EVERY)
        if self.cause:
            self._end(self.cause, 1)
        traceback.print_exception(error)
        self._end(f"failed: {error!r}; all ranks stop", 1)

    def _end(self, message, code):
        """Leave at once: exit hooks of the engine and of NCCL can wait for other ranks."""
        self.say(message)
        os._exit(code)

    # --- for its threads ---

    def _listen(self, pipe):
        first = None  # when the first signal came
        while True:
            for number in os.read(pipe, 64):
                if number in SIGNALS:
                    if not self.graceful or first and time.monotonic() - first > self.AGAIN:
                        os._exit(128 + number)
                    first, self.signal, self.stop = first or time.monotonic(), number, True

    def _exchange(self):
        progress = [(None, 0.0)] * self.world  # per rank: beats, and when they last changed
        signalled = None  # when this rank learned of a signal
        while True:
            time.sleep(self.EVERY)
            own = dict(stop=self.stop, signal=self.signal, phase=self.phase_name, beats=self.beats)
            own |= dict(waits=self.waits, failed=self.failed, closing=self.closing)
            ranks = [None] * self.world
            try:
                dist.all_gather_object(ranks, own, group=self.group)
            except RuntimeError:
                self._end_for(f"stops because another rank is gone, or has been silent for {self.SILENT} s")
            if own["failed"]:
                return self.told.set()
            if failed := [i for i, r in enumerate(ranks) if r["failed"]]:
                self._end_for(f"stops because rank {failed[0]} failed")
            if all(r["closing"] for r in ranks):
                return
            now = time.monotonic()
            if any(r["stop"] for r in ranks):
                self.stop = True
            if number := max(r["signal"] for r in ranks):
                self.signal = self.signal or number
            if self.signal:
                signalled = signalled or now
                if not self.graceful and not self.closing:
                    os._exit(128 + self.signal)
                if self.phase_name and now - signalled > self.GRACE:
                    late = f"{self.phase_name} did not end within {self.GRACE} s"
                    self._end(f"{late}; what was saved before is kept", 128 + self.signal)
            for i, r in enumerate(ranks):
                if r["beats"] != progress[i][0] or r["waits"]:
                    progress[i] = r["beats"], now
            self._end_hang(ranks, [now - since for _, since in progress])

    def _end_for(self, cause):
        """End this rank because of another rank, which reports its reason first."""
        self.cause = cause
        self.told.set()
        time.sleep(1)
        self._end(cause, 1)

    def _end_hang(self, ranks, idle):
        """End the run if a rank hangs. idle: seconds of each rank since its last sign of progress."""
        if not self.hang_timeout:
            return
        # starting and saving are not phases and can take longer
        limits = [self.hang_timeout * (1 if r["phase"] else 20) for r in ranks]
        hung = [i for i in range(self.world) if idle[i] > limits[i]]
        if not hung:
            return
        if self.rank in hung:
            with tempfile.TemporaryFile() as stacks:  # in one piece, not mixed with other ranks' stacks
                faulthandler.dump_traceback(stacks, all_threads=True)
                stacks.seek(0)
                os.write(2, stacks.read())
        where = ", ".join(
            f"rank {i} in {ranks[i]['phase'] or 'starting or saving'} for {idle[i]:.0f} s" for i in hung
        )
        advice = "a machine that is only slow needs a larger --hang_timeout"
        self._end(f"no progress: {where}; all ranks stop ({advice})", 1)
