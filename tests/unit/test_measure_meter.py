"""The meter: which counters end up in which reading, times that come late, faults in the middle."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.config import load
from lab.measure import AllocatorMeter, gather, make_meter
from lab.measure.backend import Counters, CpuBackend, make_backend
from lab.measure.census import Census
from lab.record import RankMeasurement, StepMeasurement, from_json, to_json
from lab.vocab import STEP_PHASES, StepPhase

CPU = torch.device("cpu")


class FakeDevice:
    """A backend whose counters a test sets and whose clock runs only when told to."""

    source, device_name = "cuda_caching_allocator", "fake"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.counters = Counters(0, 0, 0, 0, 0, 0)
        self.time, self.passed, self.broken = 0.0, 0.0, False
        self.reused = 0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read(self) -> Counters:
        return self.counters

    def reset_peak(self) -> None:
        now = self.counters
        self.counters = dataclasses.replace(
            now, peak_allocated=now.allocated, peak_active=now.active, peak_reserved=now.reserved
        )

    def register(self, tensors: Any) -> int:
        return sum(0 for _ in tensors)

    def census(self) -> Census:
        return Census({}, lambda storage: None)

    def mark(self) -> float:
        self.time += 1.0
        return self.time

    def elapsed(self, begin: float, end: float, wait: bool) -> float | None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access\nmore lines")
        return end - begin if wait or end <= self.passed else None

    def reuse(self, mark: float) -> None:
        self.reused += 1

    def use(self, allocated: int, peak: int, retries: int = 0, ooms: int = 0) -> None:
        reserved = max(self.counters.reserved, peak + 100)
        self.counters = Counters(allocated, peak, allocated + 1, peak + 1, reserved, reserved, retries, ooms)


def run_phase(meter: AllocatorMeter, device: FakeDevice, phase: StepPhase, *use: int) -> None:
    with meter.phase(phase):
        assert meter.current_phase is phase
        device.use(*use)


def test_peaks_are_the_largest_and_ends_the_last_of_the_micro_steps() -> None:
    device = FakeDevice()
    meter = AllocatorMeter(device, CPU, 3, 1)
    meter.start()
    device.use(50, 60)
    meter.build_done()
    with meter.step(0):
        run_phase(meter, device, StepPhase.FORWARD, 500, 900, 1, 0)
        run_phase(meter, device, StepPhase.BACKWARD, 200, 1000, 1, 0)
        run_phase(meter, device, StepPhase.FORWARD, 510, 700, 3, 1)
        run_phase(meter, device, StepPhase.BACKWARD, 250, 800, 3, 1)
    result = meter.measurement()
    forward, backward = (result.steps[0].phases[p] for p in (StepPhase.FORWARD, StepPhase.BACKWARD))
    assert result.build is not None
    assert (result.build.end_allocated_bytes, result.build.peak_allocated_bytes) == (50, 60)
    assert (forward.end_allocated_bytes, forward.peak_allocated_bytes) == (510, 900)
    assert (forward.end_active_bytes, forward.peak_active_bytes) == (511, 901)
    assert (forward.num_alloc_retries, forward.num_ooms) == (3, 1)
    assert (backward.end_allocated_bytes, backward.peak_allocated_bytes) == (250, 1000)
    assert (backward.num_alloc_retries, backward.num_ooms) == (0, 0)
    assert backward.peak_reserved_bytes == 1100
    assert backward.host_rss_bytes  # the step's last phase carries the uses that are read once a step
    assert forward.host_rss_bytes is None
    assert (result.rank, result.local_rank, result.source, result.device) == (3, 1, device.source, "fake")
    assert meter.current_phase is None


def test_times_are_read_when_the_device_has_passed_them() -> None:
    device, seen = FakeDevice(), []
    meter = AllocatorMeter(device, CPU, 0, 0)
    meter.on_step = lambda step: seen.append((step.step, step.seconds))
    meter.start()
    meter.build_done()
    for index in range(2):
        with meter.step(index):
            run_phase(meter, device, StepPhase.FORWARD, 5, 5)
            run_phase(meter, device, StepPhase.FORWARD, 5, 5)
        assert seen == []  # marks 1-6 and 7-12 are not passed
    device.passed = 6
    with meter.step(2):
        pass
    assert seen == [(0, 5.0)]
    assert device.reused == 6
    result = meter.measurement()  # waits
    assert [s for s, _ in seen] == [0, 1, 2]
    assert result.steps[1].phases[StepPhase.FORWARD].seconds == 2.0
    meter.stop()
    assert [s.step for s in meter.measurement().steps] == [0, 1, 2]


def test_a_broken_device_leaves_the_counters_and_a_note() -> None:
    device = FakeDevice()
    meter = AllocatorMeter(device, CPU, 0, 0)
    meter.start()
    with meter.step(0):
        run_phase(meter, device, StepPhase.FORWARD, 500, 900)
    device.broken = True
    result = meter.measurement()
    assert result.steps[0].phases[StepPhase.FORWARD].peak_allocated_bytes == 900
    assert result.notes == ["step 0 has no times: CUDA error: an illegal memory access"]


def test_an_oom_keeps_where_it_was_and_what_was_measured() -> None:
    device = FakeDevice()
    meter = AllocatorMeter(device, CPU, 0, 0)
    meter.start()
    meter.build_done()
    with meter.step(0):
        run_phase(meter, device, StepPhase.FORWARD, 500, 900)

    def second_step() -> None:
        with meter.step(1):
            run_phase(meter, device, StepPhase.FORWARD, 500, 900)
            with meter.phase(StepPhase.BACKWARD):
                device.use(2000, 3000, 1, 1)
                raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        second_step()
    assert (meter.current_step, meter.current_phase) == (1, StepPhase.BACKWARD)
    assert [s.step for s in meter.measurement().steps] == [0]
    assert meter.unfinished_step is not None
    failed = meter.unfinished_step.phases[StepPhase.BACKWARD]
    assert (failed.peak_allocated_bytes, failed.num_ooms) == (3000, 1)
    now = meter.now()
    assert now is not None
    assert now.end_allocated_bytes == 2000


def run(meter: Any, steps: int) -> RankMeasurement:
    meter.start()
    weight = torch.nn.Parameter(torch.ones(1000))
    meter.build_done()
    for index in range(steps):
        with meter.step(index):
            with meter.phase(StepPhase.FORWARD):
                loss = (weight * weight).sum()
            with meter.phase(StepPhase.BACKWARD):
                loss.backward()
            del loss
            with meter.phase(StepPhase.OPTIMIZER_STEP):
                pass
            with meter.phase(StepPhase.ZERO_GRAD):
                weight.grad = None
    meter.stop()
    result: RankMeasurement = meter.measurement()
    return result


def test_cpu_run_to_the_byte() -> None:
    gc.collect()
    cfg = load(["model=tiny", "train.steps=3", "hardware=cpu"])
    result = run(make_meter(cfg, CPU, 0, 0), 3)
    assert result.build is not None
    assert result.build.end_allocated_bytes == 4000
    for step in result.steps:
        assert list(step.phases) == list(STEP_PHASES)
        ends = {p: r.end_allocated_bytes for p, r in step.phases.items()}
        peaks = {p: r.peak_allocated_bytes for p, r in step.phases.items()}
        assert ends[StepPhase.FORWARD] == 4000 + 4  # the loss; the product is gone, its inputs are the weight
        assert peaks[StepPhase.FORWARD] == 2 * 4000 + 4
        assert ends[StepPhase.BACKWARD] == 2 * 4000 + 4
        assert ends[StepPhase.ZERO_GRAD] == 4000
        assert all(r.end_reserved_bytes == r.end_active_bytes == r.end_allocated_bytes for r in step.phases.values())
        assert 0 < sum(r.seconds for r in step.phases.values()) <= step.seconds
    assert [s.step for s in result.steps if s.phases[StepPhase.FORWARD].ledger is not None] == [0, 2]
    assert from_json(RankMeasurement, json.loads(json.dumps(to_json(result)))) == result
    assert gather(result, 1) == [result]


def test_off_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.measure.make_backend", lambda device: pytest.fail("measure=off made a backend"))
    seen: list[StepMeasurement] = []
    meter = make_meter(load(["measure=off", "hardware=cpu"]), CPU, 0, 0)
    meter.on_step = seen.append
    before = torch.UntypedStorage.resize_
    meter.start()
    assert torch.UntypedStorage.resize_ is before
    result = run(meter, 2)
    assert (result.source, result.steps, result.build, seen) == ("off", [], None, [])
    assert meter.now() is None
    assert meter.current_step == 1


def test_snapshot_on_a_cpu_is_a_note(tmp_path: Path) -> None:
    meter = AllocatorMeter(CpuBackend(), CPU, 0, 0, snapshot_step=1)
    meter.snapshot_dir = tmp_path
    notes = run(meter, 2).notes
    assert any("no snapshot was taken, a CPU has no allocator" in note for note in notes)
    assert list(tmp_path.iterdir()) == []


def test_compiled_runs_have_no_ledger() -> None:
    result = run(make_meter(load(["train.compile=true", "train.steps=2", "hardware=cpu"]), CPU, 0, 0), 2)
    assert all(r.ledger is None for s in result.steps for r in s.phases.values())
    assert any(note.startswith("train.compile: no ledgers") for note in result.notes)


def test_backend_by_device() -> None:
    assert isinstance(make_backend(CPU), CpuBackend)
    with pytest.raises(ValueError, match="mps"):
        make_backend(torch.device("mps"))
