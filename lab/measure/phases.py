"""The meter: a step's phases, the allocator's counters at their ends, the peaks inside them, their time.

At the start of a phase the allocator's peak is reset, at its end the counters are read: host-side calls
of some tens of microseconds, no wait for the device. A ledger step does more and takes longer, so its
times stand apart; the counters it reads are those of any other step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from lab.measure.backend import Backend, Counters, CudaBackend
from lab.measure.census import by_size
from lab.measure.device_use import DeviceUse, HostUse
from lab.measure.ledger import Ledger, LedgerReading
from lab.measure.meter import LiveTensors, Meter, UnseenAllocations
from lab.measure.snapshot import record_snapshot
from lab.measure.timing import StepTimes
from lab.record import PhaseReading, RankMeasurement, StepMeasurement
from lab.vocab import MemoryCategory, StepPhase


class AllocatorMeter(Meter):
    """Counters of every phase of every step; ledgers and a snapshot at the steps that are named."""

    def __init__(
        self,
        backend: Backend,
        device: torch.device,
        rank: int,
        local_rank: int,
        ledger: Ledger | None = None,
        ledger_steps: Collection[int] = (),
        snapshot_step: int | None = None,
        device_use: DeviceUse | None = None,
    ) -> None:
        super().__init__(rank, local_rank, backend.device_name, backend.source)
        self._backend, self._times = backend, StepTimes(backend)
        self._device_use, self._host_use = device_use or DeviceUse(device), HostUse()
        self._result.device_foreign_bytes = self._device_use.foreign_bytes
        self._result.notes += [*backend.notes, *self._device_use.notes]
        self._ledger, self._ledger_steps, self._snapshot_step = ledger, ledger_steps, snapshot_step
        self._live_tensors: LiveTensors = tuple
        self._unseen: UnseenAllocations = tuple
        self._readings: dict[StepPhase, LedgerReading] = {}  # of the newest step with a ledger
        self._readings_step = -1
        self._step: StepMeasurement | None = None
        self._base = Counters(0, 0, 0, 0, 0, 0)  # at the last phase's end: retries and OOMs are counted for ever
        self._running = False

    def start(self) -> None:
        self._running = True
        self._backend.start()
        self._backend.reset_peak()
        self._base = self._backend.read()

    def set_live_tensors(self, live_tensors: LiveTensors, unseen: UnseenAllocations = tuple) -> None:
        self._live_tensors, self._unseen = live_tensors, unseen

    def claim(self, category: MemoryCategory, tensor: Tensor) -> None:
        if ledger := self._ledger_now():
            ledger.claim(category, tensor)

    def build_done(self) -> None:
        self._result.build = PhaseReading()
        self._close(StepPhase.BUILD, self._result.build, self._ledger)
        self._read_uses(self._result.build)
        self.current_phase = None

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        self.current_step = index
        step = self._step = StepMeasurement(index, 0.0, None)
        if ledger := self._ledger_now():
            self._readings, self._readings_step = {}, index
        self._times.begin_step()
        with self._snapshot() if index == self._snapshot_step else nullcontext():
            yield  # an exception leaves self._step behind
        if step.phases:
            self._read_uses(list(step.phases.values())[-1])
        if ledger is not None:
            ledger.settle_workspaces(list(self._readings.values()))
            for phase, reading in self._readings.items():
                step.phases[phase].unattributed_bytes = reading.unattributed_bytes
        self._step = None
        self._times.end_step(step)
        self._hand_out(wait=False)

    @contextmanager
    def phase(self, phase: StepPhase) -> Iterator[None]:
        self.current_phase = phase
        backend, step, ledger = self._backend, self._step, self._ledger_now()
        backend.reset_peak()
        begin = backend.mark()
        failed = True
        try:
            with ledger.watch_forward() if ledger and phase is StepPhase.FORWARD else nullcontext():
                yield
            failed = False
        finally:
            end = backend.mark()
            if step is not None:
                self._times.add_phase(phase, begin, end)
                self._close(phase, step.phases.setdefault(phase, PhaseReading()), None if failed else ledger)
        self.current_phase = None

    def mark_skipped(self) -> None:
        super().mark_skipped()
        if self._step is not None:
            self._step.skipped = True
            if self.current_step == self._snapshot_step:
                self._result.notes.append(
                    "measure=snapshot: its step was skipped; the prediction is of one that is taken"
                )

    def now(self) -> PhaseReading | None:
        reading = PhaseReading()
        _take(reading, self._base, self._backend.read())
        self._read_uses(reading)
        return reading

    @property
    def unfinished_step(self) -> StepMeasurement | None:
        return self._step

    def measurement(self) -> RankMeasurement:
        self._hand_out(wait=True)
        when = f"step {self._readings_step}" if self._readings_step >= 0 else "before the first step"
        left = [
            f"unattributed at the end of {phase.value}, {when}: {by_size(reading.unclaimed)}"
            for phase, reading in self._readings.items()
            if reading.unclaimed
        ]
        return dataclasses.replace(self._result, steps=list(self._result.steps), notes=[*self._result.notes, *left])

    def stop(self) -> None:
        if self._running:
            self._running = False
            self._hand_out(wait=True)
            self._backend.stop()
            self._device_use.close()

    def _ledger_now(self) -> Ledger | None:
        return self._ledger if self.current_step in self._ledger_steps else None

    def _close(self, phase: StepPhase, reading: PhaseReading, ledger: Ledger | None) -> None:
        """The counters, and a ledger where there is one, into the reading of a phase that ends."""
        known = list(self._live_tensors()) if ledger else []
        if missed := self._backend.register(tensor for _, tensor in known):
            self._result.notes.append(f"{missed} B of the engine's tensors were first seen at the end of {phase.value}")
        now = self._backend.read()
        _take(reading, self._base, now)
        self._base = now
        if ledger is not None:
            counted = self._readings[phase] = ledger.count(known, self._backend.census(), self._unseen())
            reading.ledger, reading.unattributed_bytes = counted.categories, counted.unattributed_bytes
            reading.tensors = counted.tensors

    def _read_uses(self, reading: PhaseReading) -> None:
        reading.device_used_bytes = self._device_use.read()
        reading.host_rss_bytes = self._host_use.read()

    def _hand_out(self, wait: bool) -> None:
        for step, error in self._times.finished(wait):
            if error is not None:
                self._result.notes.append(f"step {step.step} has no times: {error}")
            self._result.steps.append(step)
            if self.on_step is not None:
                self.on_step(step)

    def _snapshot(self) -> AbstractContextManager[None]:
        if self._backend.source == CudaBackend.source and self.snapshot_dir is not None:
            return record_snapshot(self.snapshot_dir / f"snapshot_rank_{self._result.rank}.pickle")
        why = "a CPU has no allocator to record" if self.snapshot_dir is not None else "no folder was given"
        self._result.notes.append(f"measure=snapshot: no snapshot was taken, {why}")
        return nullcontext()


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
