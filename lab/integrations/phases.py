"""A step's phases as a Trainer's events tell them: opened one after the other, each closing the one before."""

from __future__ import annotations

from contextlib import ExitStack

from lab.measure import Meter
from lab.vocab import StepPhase


class PhaseSwitch:
    """Drives a meter from events instead of ``with`` blocks."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.step_index = -1
        self.phase: StepPhase | None = None
        self._step, self._phase = ExitStack(), ExitStack()

    @property
    def in_step(self) -> bool:
        return self.step_index >= 0

    def begin_step(self, index: int) -> None:
        self.end_step()
        self._step.enter_context(self.meter.step(index))
        self.step_index = index

    def to(self, phase: StepPhase | None) -> None:
        """Close the phase that is open and open ``phase``; outside a step nothing happens."""
        self._phase.close()
        self.phase = phase if self.in_step else None
        if self.phase is not None:
            self._phase.enter_context(self.meter.phase(self.phase))

    def end_step(self) -> None:
        self.to(None)
        self._step.close()
        self.step_index = -1
