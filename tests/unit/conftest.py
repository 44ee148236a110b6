"""Fixtures that several test files share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lab.measure import StorageTracker


@pytest.fixture
def tracker() -> Iterator[StorageTracker]:
    """A running tracker; what earlier tests left is collected first."""
    from lab.measure import StorageTracker  # brings torch, which most of these tests do without

    gc.collect()
    tracker = StorageTracker()
    tracker.start()
    yield tracker
    tracker.stop()
