"""The first import of every program: what must be set before torch is imported, and before the ranks meet."""

import ctypes
import os
import signal

# read when torch is imported: idle threads that spin slow down the others
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

PR_SET_PDEATHSIG = 1  # linux/prctl.h
if "TORCHELASTIC_RUN_ID" in os.environ:  # the kernel ends a rank whose torchrun has died
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
