"""What was on the GPU before the run is none of the run's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lab.measure import device_use
from lab.measure.device_use import DeviceUse, count_kept_memory, gpu_uses
from lab.record import PhaseReading, RankMeasurement, StepMeasurement
from lab.vocab import StepPhase

MIB = 1 << 20


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card with 700 MiB in use, in place of the NVML library."""
    fake = SimpleNamespace(
        used=700 * MIB,
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: "handle",
        nvmlDeviceGetHandleByUUID=lambda uuid: "handle",
        nvmlDeviceGetUUID=lambda handle: b"GPU-1",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=fake.used),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(device_use, "nvml_handle", lambda nvml, index: "handle")
    return fake


@pytest.mark.parametrize(("idle", "foreign"), [(600, 100), (700, 0), (800, 0)])
def test_what_was_there_before_is_taken_off(nvml: SimpleNamespace, idle: int, foreign: int) -> None:
    before = gpu_uses()
    assert before == {"GPU-1": 700 * MIB}
    nvml.used = 2000 * MIB
    use = DeviceUse(torch.device("cuda", 0), before, idle * MIB)
    assert use.foreign_bytes == foreign * MIB
    assert use.read() == (2000 - foreign) * MIB


def test_without_a_reading_before_or_a_known_idle_card_nothing_is_taken_off(nvml: SimpleNamespace) -> None:
    for use in (DeviceUse(torch.device("cuda", 0)), DeviceUse(torch.device("cuda", 0), gpu_uses(), 0)):
        assert use.foreign_bytes is None
        assert use.read() == 700 * MIB


def test_no_library_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_uses() == {}


def test_memory_that_the_driver_kept_counts_where_the_run_takes_it_over() -> None:
    step = StepMeasurement(0, 1.0, phases={StepPhase.ZERO_GRAD: PhaseReading(device_used_bytes=900)})
    step.phases[StepPhase.FORWARD] = PhaseReading()  # device use is read once per step
    build = PhaseReading(device_used_bytes=700)
    rank = RankMeasurement(0, 0, "host", "gpu", "cuda_caching_allocator", build, [step], device_foreign_bytes=112)
    count_kept_memory(rank)
    assert (build.device_used_bytes, step.phases[StepPhase.ZERO_GRAD].device_used_bytes) == (812, 1012)
    assert step.phases[StepPhase.FORWARD].device_used_bytes is None
    assert rank.device_foreign_bytes is None
