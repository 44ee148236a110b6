"""What the CPU tracker wraps in torch while it runs, because dispatch does not show it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_PAUSE_SECONDS = 0.0002
_MOST_PAUSES = 50
_TASKS = "/proc/self/task"
_WORKER_NAME = b"pt_gloo_runloop"  # torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, runLoop


@contextmanager
def seeing_resizes(see: Callable[[Any], None]) -> Iterator[None]:
    """``see(storage)`` after every ``UntypedStorage.resize_``: FSDP2 frees and refills whole parameters with it."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        result = original(storage, size)
        see(storage)
        return result

    torch.UntypedStorage.resize_ = resize_
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original


def settle() -> None:
    """Let gloo's worker threads drop what they still hold, at most 10 ms.

    A worker tells that a collective is done first and drops its references to the tensors then. A caller
    that runs on at once may drop its own before; the tensors then live on until the worker is scheduled
    and gets the interpreter's lock, and memory differs from run to run. A worker that has nothing left
    to do sleeps. Where threads have no names (not Linux), one pause has to do.
    """
    for _ in range(_MOST_PAUSES):
        time.sleep(_PAUSE_SECONDS)  # gives the interpreter's lock away
        if not _a_worker_runs():
            return


@contextmanager
def settling_collectives() -> Iterator[None]:
    """``settle`` after every wait for a collective on this process."""
    if not dist.is_available():
        yield
        return
    original = dist.Work.wait

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(work, *args, **kwargs)
        settle()
        return result

    dist.Work.wait = wait
    try:
        yield
    finally:
        dist.Work.wait = original


def _a_worker_runs() -> bool:
    """Whether a gloo worker of this process is running or waits for a core: ``NAME) R`` in its stat line."""
    try:
        for task in os.listdir(_TASKS):
            with open(f"{_TASKS}/{task}/stat", "rb") as stream:
                line = stream.read(64)
            if _WORKER_NAME in line and line[line.rfind(b")") + 2 : line.rfind(b")") + 3] != b"S":
                return True
    except OSError:  # no /proc, or a thread that ended between the two calls
        return False
    return False
