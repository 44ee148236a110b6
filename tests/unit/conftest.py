"""Fixtures that several test files share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lab.measure import StorageTracker


@pytest.fixture
def tracker() -> Iterator[StorageTracker]:
    """A running tracker; what earlier tests left is collected first."""
    gc.collect()
    tracker = StorageTracker()
    tracker.start()
    yield tracker
    tracker.stop()
