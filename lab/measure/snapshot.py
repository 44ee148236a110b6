"""measure=snapshot: the CUDA allocator's history of the last step, a pickle for pytorch.org/memory_viz."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MAX_ENTRIES = 200_000  # allocations and frees kept, a few KB of host memory each with their stacks


@contextmanager
def record_snapshot(path: Path) -> Iterator[None]:
    """Record every allocation inside, with Python stacks, and write the pickle at the end, also after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, stacks="python")
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
