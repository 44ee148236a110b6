"""Step and phase times without a wait: marks are set in passing and read when the device is past them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from lab.record import StepMeasurement
from lab.vocab import StepPhase


class Clock(Protocol):
    """``mark`` notes a moment of the device; ``elapsed`` is None while the device has not come to ``end``."""

    def mark(self) -> Any: ...
    def elapsed(self, begin: Any, end: Any, wait: bool) -> float | None: ...
    def reuse(self, mark: Any) -> None: ...


class StepTimes:
    """Fills in the seconds of finished steps, in order."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begin: Any = None
        self._marks: list[tuple[StepPhase, Any, Any]] = []
        self._waiting: list[tuple[StepMeasurement, Any, Any, list[tuple[StepPhase, Any, Any]]]] = []

    def begin_step(self) -> None:
        self._marks = []
        self._begin = self._clock.mark()

    def add_phase(self, phase: StepPhase, begin: Any, end: Any) -> None:
        self._marks.append((phase, begin, end))

    def end_step(self, step: StepMeasurement) -> None:
        self._waiting.append((step, self._begin, self._clock.mark(), self._marks))

    def finished(self, wait: bool) -> Iterator[tuple[StepMeasurement, str | None]]:
        """Steps whose times are now known, with an error where the device failed and they never will be."""
        while self._waiting:
            step, begin, end, marks = self._waiting[0]
            error = None
            try:
                seconds = self._clock.elapsed(begin, end, wait)
                if seconds is None:
                    return
                step.seconds = seconds
                for phase, start, stop in marks:
                    step.phases[phase].seconds += self._clock.elapsed(start, stop, wait) or 0.0
            except RuntimeError as failure:  # a CUDA error from another kernel: the counters still stand
                error = str(failure).splitlines()[0]
            else:
                for mark in (begin, end, *(m for _, start, stop in marks for m in (start, stop))):
                    self._clock.reuse(mark)
            self._waiting.pop(0)
            yield step, error
