"""The meter: a step's phases, the allocator's counters at their ends, the peaks inside them, their time.

At the start of a phase the allocator's peak is reset, at its end the counters are read: host-side calls
of some tens of microseconds, no wait for the device. Times are CUDA events, read when the device has
passed them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lab.measure.backend import Backend, Counters
from lab.measure.device_use import DeviceUse, HostUse
from lab.record import PhaseReading, RankMeasurement, StepMeasurement
from lab.vocab import MemoryCategory, StepPhase

LiveTensors = Callable[[], Iterable[tuple[MemoryCategory, Tensor]]]


class Meter:
    """With measure=off: remembers where the run is and does nothing else."""

    def __init__(self, rank: int, local_rank: int) -> None:
        self.current_phase: StepPhase | None = StepPhase.BUILD  # after an exception: the phase it came from
        self.current_step = -1  # -1 while building
        self.on_step: Callable[[StepMeasurement], None] | None = None
        self.snapshot_dir: Any = None  # folder for level=snapshot; set by whoever knows the run's folder
        self._result = RankMeasurement(rank, local_rank, platform.node(), "cpu", "off")

    def start(self) -> None:
        """Before the model is built."""

    def set_live_tensors(self, live_tensors: LiveTensors) -> None:
        """Who knows which live tensor belongs to which category (engine, data, loop); asked at ledgers."""

    def build_done(self) -> None:
        """After the engine is built, before the first step."""
        self.current_phase = None

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """One optimizer step."""
        self.current_step = index
        yield

    @contextmanager
    def phase(self, phase: StepPhase) -> Iterator[None]:
        """One phase of the step; entered once per micro-step for forward and backward."""
        self.current_phase = phase
        yield
        self.current_phase = None

    def now(self) -> PhaseReading | None:
        """The counters at this moment, for the record of an OOM."""
        return None

    @property
    def unfinished_step(self) -> StepMeasurement | None:
        """The phases so far of a step that an exception ended."""
        return None

    def measurement(self) -> RankMeasurement:
        """Everything measured so far; complete steps only. Callable at any time, also after a fault."""
        return self._result

    def stop(self) -> None:
        """After the last step; further calls do nothing."""


class AllocatorMeter(Meter):
    """Counters of every phase of every step; ledgers and snapshots where the configuration asks for them."""

    def __init__(
        self,
        backend: Backend,
        device: torch.device,
        rank: int,
        local_rank: int,
    ) -> None:
        super().__init__(rank, local_rank)
        self._backend = backend
        self._device_use, self._host_use = DeviceUse(device), HostUse()
        self._result = RankMeasurement(
            rank, local_rank, platform.node(), backend.device_name, backend.source, notes=[*backend.notes]
        )
        self._result.notes += self._device_use.notes
        self._step: StepMeasurement | None = None
        self._marks: list[tuple[StepPhase, Any, Any]] = []
        self._untimed: list[_Untimed] = []
        self._running = False
        self._base = Counters(0, 0, 0, 0, 0, 0)  # of the phase: the counts of retries and OOMs grow for ever

    def start(self) -> None:
        self._running = True
        self._backend.start()
        self._backend.reset_peak()
        self._base = self._backend.read()

    def build_done(self) -> None:
        reading = PhaseReading()
        _take(reading, self._base, self._backend.read())
        self._read_uses(reading)
        self._result.build = reading
        self.current_phase = None

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        self.current_step = index
        step = self._step = StepMeasurement(index, 0.0, None)
        self._marks = []
        begin = self._backend.mark()
        yield  # an exception leaves self._step behind, as the unfinished step
        end = self._backend.mark()
        if step.phases:
            self._read_uses(step.phases[list(step.phases)[-1]])
        self._step = None
        self._untimed.append(_Untimed(step, begin, end, self._marks))
        self._time_steps(wait=False)

    @contextmanager
    def phase(self, phase: StepPhase) -> Iterator[None]:
        self.current_phase = phase
        backend = self._backend
        backend.reset_peak()
        begin = backend.mark()
        base = self._base
        finished = False
        try:
            yield
            finished = True
        finally:
            counters = backend.read()
            self._base = counters
            step = self._step
            if step is not None:
                _take(step.phases.setdefault(phase, PhaseReading()), base, counters)
                self._marks.append((phase, begin, backend.mark()))
        if finished:
            self.current_phase = None

    def now(self) -> PhaseReading | None:
        reading = PhaseReading()
        _take(reading, self._base, self._backend.read())
        self._read_uses(reading)
        return reading

    @property
    def unfinished_step(self) -> StepMeasurement | None:
        return self._step

    def measurement(self) -> RankMeasurement:
        self._time_steps(wait=True)
        return self._result

    def stop(self) -> None:
        if not self._running:
            return
        self._running = False
        self._time_steps(wait=True)
        self._backend.stop()
        self._device_use.close()

    def _read_uses(self, reading: PhaseReading) -> None:
        reading.device_used_bytes = self._device_use.read()
        reading.host_rss_bytes = self._host_use.read()

    def _time_steps(self, wait: bool) -> None:
        """Fill in the times of steps that the device has finished, and hand those steps out in order."""
        while self._untimed:
            untimed = self._untimed[0]
            try:
                seconds = self._backend.elapsed(untimed.begin, untimed.end, wait)
                if seconds is None:
                    return
                for phase, begin, end in untimed.marks:
                    untimed.step.phases[phase].seconds += self._backend.elapsed(begin, end, wait) or 0.0
                untimed.step.seconds = seconds
                for mark in untimed.all_marks():
                    self._backend.reuse(mark)
            except RuntimeError as error:  # the device failed: the counters of the step still stand
                self._result.notes.append(f"step {untimed.step.step} has no times: {str(error).splitlines()[0]}")
            self._untimed.pop(0)
            self._result.steps.append(untimed.step)
            if self.on_step is not None:
                self.on_step(untimed.step)


class _Untimed:
    """A finished step whose events the device may not have passed yet."""

    def __init__(self, step: StepMeasurement, begin: Any, end: Any, marks: list[tuple[StepPhase, Any, Any]]) -> None:
        self.step, self.begin, self.end, self.marks = step, begin, end, marks

    def all_marks(self) -> Iterator[Any]:
        yield from (self.begin, self.end)
        for _, begin, end in self.marks:
            yield from (begin, end)


def _take(reading: PhaseReading, base: Counters, now: Counters) -> None:
    """Counters at a phase's end into its reading: ends last, peaks largest, counts added over micro-steps."""
    reading.end_allocated_bytes = now.allocated
    reading.end_active_bytes = now.active
    reading.end_reserved_bytes = now.reserved
    reading.peak_allocated_bytes = max(reading.peak_allocated_bytes, now.peak_allocated)
    reading.peak_active_bytes = max(reading.peak_active_bytes, now.peak_active)
    reading.peak_reserved_bytes = max(reading.peak_reserved_bytes, now.peak_reserved)
    reading.num_alloc_retries += now.num_alloc_retries - base.num_alloc_retries
    reading.num_ooms += now.num_ooms - base.num_ooms
