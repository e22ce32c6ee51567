"""Joining the process group, choosing the device, and what all ranks exchange."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# what torchrun sets
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def world_size():
    """How many ranks torchrun has started; 1 without it, in the environment of a scheduler or a notebook, too.

    Raises ValueError for variables of several ranks that torchrun has not set.
    """
    world, missing = os.environ.get("WORLD_SIZE", "1"), sorted(TORCHRUN - os.environ.keys())
    if missing and (world, os.environ.get("RANK", "0")) != ("1", "0"):
        given = ", ".join(f"{x}={os.environ[x]}" for x in ("RANK", "WORLD_SIZE") if x in os.environ)
        raise ValueError(
            f"the environment has {given}, but no {missing[0]}: start with torchrun --nproc_per_node=N, or unset these "
            "for one rank"
        )
    return 1 if missing else int(world)


def init_distributed():
    """Join torchrun's process group, or form one of a single rank. Returns this rank's device."""
    if world_size() == 1 and TORCHRUN - os.environ.keys():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        alone = dict.fromkeys(["RANK", "LOCAL_RANK"], "0")
        alone |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"], "1")
        os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def exit_all(code=0):
    """End this rank's process and the process group. All ranks call it, as the last thing they do.

    Python's own exit would race with the threads of gloo: one that has still to release a tensor of
    the last collective then aborts the process.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def drop_shared_memory(size):
    """Remove what vLLM on CPU has left of this rank's shared memory for a group of `size` ranks.

    It is left behind by a process that was killed, or that leaves without Python's exit, and would
    keep the next one from starting.
    """
    rank, folder = dist.get_rank(), Path("/dev/shm")
    first = rank // size * size
    ending = f"[{'-'.join(map(str, range(first, first + size)))}]-cpushm_{rank - first}"
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(ending):
            file.unlink(missing_ok=True)


def check_gpus():
    """Raise ValueError where the machine has GPUs that torch cannot use."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    command = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    try:
        found = subprocess.run(command.split(), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return
    drivers = found.stdout.split() if found.returncode == 0 else []
    if drivers:
        what = f"nvidia-smi lists {len(drivers)} GPUs with driver {drivers[0]}, but torch {torch.__version__}"
        needs = "cannot use them: it needs driver 580 or newer (CUDA 13)"
        if not torch.version.cuda:
            needs = "was built without CUDA: remove .venv and install again"
        raise ValueError(f"{what} {needs}; an empty CUDA_VISIBLE_DEVICES runs on CPU")


def refuse(message):
    """End the program with one line for its user, before the ranks have joined.

    Rank 0 prints it and torchrun ends the others. An error that another rank alone has is printed
    30 s later.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)
    sys.exit(message)


def gather_lists(items):
    """The lists of all ranks, concatenated in the order of the ranks. All ranks call it."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def from_rank_0(value):
    """Rank 0's value, on every rank. All ranks call it."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def sum_over_ranks(tensor):
    """The tensor, summed over all ranks in place; as it is where no process group exists."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
