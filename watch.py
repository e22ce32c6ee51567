"""Ranks that watch each other: a signal, a failure or a hang on one of them ends the run on all of them, in time and with the reason.

    with Watch(hang_timeout=90) as watch:    # on every rank, once the process group is there
        with watch.phase("sample"), watch.droppable():
            watch.step()                     # a sign of progress; leaves the droppable block where the run is to stop
        if watch.stopping():                 # a meeting of all ranks, which all get the same answer
            ...                              # save, and leave

A thread of each rank meets those of the others once a second and tells them how far its rank is. So everybody learns of everybody:

    signal    SIGTERM or SIGINT to any rank: all stop, at once before `graceful` is set, later at the next meeting; another one, AGAIN seconds
              later, ends the process (sooner it may be the same: a scheduler's to all processes, then torchrun's to its ranks)
    failure   an exception ends its rank with the reason, and the others with it; in a droppable block, after the next meeting
    hang      in a phase and neither waiting nor showing progress for hang_timeout seconds; or, frozen, silent for SILENT seconds
    death     of a rank (its connection closes) or of torchrun, which would leave its ranks behind

The exit code is 128 + the number of the signal (SIGTERM 143, SIGINT 130), or 1.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


class Dropped(Exception):
    """Raised by step(): the phase under way is given up. droppable() catches it."""


class Watch:
    """See above. hang_timeout: seconds; None: nobody is taken to hang. together: so many consecutive ranks (those that share an engine) take the
    same steps, and leave a droppable block after the same one.
    """

    EVERY = 1.0  # seconds between the meetings of the threads
    SILENT = 60  # seconds until a frozen rank is given up
    GRACE = 60  # seconds from a signal to the end of a phase
    AGAIN = 2.0  # seconds until a signal is a second one

    def __init__(self, hang_timeout=None, together=1):
        self.rank, self.world, self.hang_timeout = dist.get_rank(), dist.get_world_size(), hang_timeout
        self.stop, self.error = 0, None  # stop: number of the signal, or -1 after an error in a droppable block, here or elsewhere
        self.graceful = False  # set it once there is something to save
        self.beats, self.steps, self.phase_name, self.waits, self.failed, self.closing = 0, 0, None, False, False, False
        self.told, self.cause = threading.Event(), None  # told: the others know of this rank's failure, or it knows the cause, another's
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.SILENT))
        self.lockstep = dist.new_subgroups(together)[0] if together > 1 else None

    # --- for the main thread --------------------------------------------------------------------------------------------------------

    def beat(self):
        """A sign of progress."""
        self.beats += 1

    def step(self):
        """A sign of progress inside of a droppable block; raises Dropped if the run is to stop."""
        self.beat()
        self.steps += 1
        if self.lockstep is None:
            if self.stop:
                raise Dropped
        elif self.steps % 16 == 0:  # a rank that left alone would leave the others waiting inside the engine
            stop = torch.tensor([self.stop != 0], dtype=torch.int32)
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=self.lockstep)
            if stop.item():
                raise Dropped

    def each(self, items):
        """The items, each a sign of progress."""
        for item in items:
            self.beat()
            yield item

    @contextmanager
    def phase(self, name):
        """Inside, this rank must show progress."""
        self.beat()
        self.phase_name = name
        try:
            yield
        finally:
            self.phase_name = None
            self.beat()

    @contextmanager
    def droppable(self):
        """What stands inside is given up where the run is to stop, and where it fails: then the run is to stop. Without collectives."""
        try:
            yield
        except Dropped:
            pass
        except Exception as error:
            traceback.print_exc()
            self.say(f"failed: {error!r}; all ranks save what they have and stop")
            self.error, self.stop = error, -1

    def stopping(self):
        """Whether the run is to stop; all ranks call it and get the same answer."""
        stop = torch.tensor([max(self.stop, self.stop != 0)], dtype=torch.int32)  # an error as 1: any signal's number is larger
        self.waits = True
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        self.waits = False
        self.beat()
        self.stop = self.stop or (stop.item() if stop.item() > 1 else -stop.item())
        return bool(stop.item())

    def exit_code(self):
        return 128 + self.stop if self.stop > 0 else 1 if self.stop else 0

    def say(self, message):
        print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)

    def __enter__(self):
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)  # so that a signal is heard even while the main thread waits in compiled code
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        self.thread = threading.Thread(target=self._meet, daemon=True)
        self.thread.start()
        return self

    def close(self):
        """End the watch, once all ranks are here."""
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
        """Leave at once: exit hooks of the engine and of NCCL may wait for other ranks."""
        self.say(message)
        os._exit(code)

    # --- for its threads ------------------------------------------------------------------------------------------------------------

    def _listen(self, pipe):
        heard = None
        while True:
            for number in os.read(pipe, 64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    if not self.graceful or heard and time.monotonic() - heard > self.AGAIN:
                        os._exit(128 + number)
                    heard, self.stop = heard or time.monotonic(), number

    def _meet(self):
        progress, stopped_at = [(None, 0.0)] * self.world, None  # of each rank: (beats, since when they have not changed)
        while True:
            time.sleep(self.EVERY)
            if self.parent not in (None, os.getppid()):
                self._end("torchrun is gone; this rank stops", 1)
            own = dict(
                stop=self.stop, beats=self.beats, phase=self.phase_name, waits=self.waits, failed=self.failed, closing=self.closing
            )  # fmt: skip
            ranks = [None] * self.world
            try:
                dist.all_gather_object(ranks, own, group=self.group)
            except RuntimeError:
                self._end_for(f"stops, since another rank is gone, or has been silent for {self.SILENT} s")
            if own["failed"]:
                return self.told.set()
            if failed := [i for i, r in enumerate(ranks) if r["failed"]]:
                self._end_for(f"stops, since rank {failed[0]} failed")
            if all(r["closing"] for r in ranks):
                return
            now = time.monotonic()
            if not self.stop and (stop := next((r["stop"] for r in ranks if r["stop"]), 0)):
                self.stop = stop
            if self.stop > 0 and not self.graceful and not self.closing:
                os._exit(128 + self.stop)
            stopped_at = stopped_at or (self.stop and now) or None
            if self.stop > 0 and self.phase_name and now - stopped_at > self.GRACE:
                self._end(f"{self.phase_name} did not end within {self.GRACE} s; what was saved before stands", 128 + self.stop)
            for i, r in enumerate(ranks):
                if r["beats"] != progress[i][0] or r["waits"]:
                    progress[i] = r["beats"], now
            self._end_hang(ranks, [now - since for _, since in progress])

    def _end_for(self, cause):
        """End this rank for what befell another, which speaks first."""
        self.cause = cause
        self.told.set()
        time.sleep(1)
        self._end(cause, 1)

    def _end_hang(self, ranks, idle):
        """End the run if ranks have been idle for too long, in seconds."""
        limit = lambda r: self.hang_timeout * (1 if r["phase"] else 20)  # starting and saving take longer
        hung = [i for i, r in enumerate(ranks) if self.hang_timeout and idle[i] > limit(r)]
        if not hung:
            return
        if self.rank in hung:
            faulthandler.dump_traceback(all_threads=True)
        where = ", ".join(f"rank {i} in {ranks[i]['phase'] or 'starting or saving'} for {idle[i]:.0f} s" for i in hung)
        self._end(f"no progress: {where}; all ranks stop (a machine that is only slow needs a larger --hang_timeout)", 1)
