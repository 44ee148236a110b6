"""Predictions for commands that show many records: within one process each configuration is predicted once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lab.analytic import predict
from lab.config import RunConfig
from lab.record import Prediction

_kept: dict[str, Prediction] | None = None  # by the configuration's text; None outside ``predictions_kept``


def predicted(cfg: RunConfig) -> Prediction:
    """``predict(cfg)``; within ``predictions_kept`` what it said of an equal configuration before. Not to be changed.

    A prediction depends on its configuration alone, so the text of all settings, the run's name included, is its key.
    """
    if _kept is None:
        return predict(cfg)
    key = repr(cfg)
    if key not in _kept:
        _kept[key] = predict(cfg)
    return _kept[key]


@contextmanager
def predictions_kept() -> Iterator[None]:
    """Several tables of the same records: ``predicted`` remembers, until the outermost of these ends."""
    global _kept
    before = _kept
    _kept = {} if before is None else before
    try:
        yield
    finally:
        _kept = before
