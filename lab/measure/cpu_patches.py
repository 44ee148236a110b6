"""Two methods of torch that the CPU tracker wraps while it runs, because dispatch does not show them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

SETTLE_SECONDS = 0.0005


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


@contextmanager
def settling_collectives() -> Iterator[None]:
    """A pause after every wait for a collective.

    gloo's worker threads tell that a collective is done first and drop their references to its tensors
    then. A caller that runs on at once may drop its own before them; the tensors then live on until the
    worker is scheduled and gets the interpreter's lock, and peaks differ from run to run.
    """
    if not dist.is_available():
        yield
        return
    original = dist.Work.wait

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(work, *args, **kwargs)
        time.sleep(SETTLE_SECONDS)
        return result

    dist.Work.wait = wait
    try:
        yield
    finally:
        dist.Work.wait = original
