"""Predictions for commands that show many records: within one process each configuration is predicted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from lab.analytic import predict
from lab.config import RunConfig
from lab.record import Prediction

WORTH_PROCESSES = 64  # configurations: below, starting processes takes longer than they save
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


def predicted_each(cfgs: Sequence[RunConfig], processes: int = 1) -> list[Prediction]:
    """``predicted`` of every configuration, in order, each equal one once; many on several processes.

    Those import the caller's main module, which has to bear that: the `lab` command does.
    """
    global _kept
    known = dict(_kept or {})
    wanted = {repr(cfg): cfg for cfg in cfgs}
    missing = {key: cfg for key, cfg in wanted.items() if key not in known}
    if processes > 1 and len(missing) >= WORTH_PROCESSES:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            known.update(zip(missing, pool.map(predict, missing.values(), chunksize=8), strict=True))
    else:
        known.update((key, predict(cfg)) for key, cfg in missing.items())
    if _kept is not None:
        _kept = known
    return [known[repr(cfg)] for cfg in cfgs]


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
