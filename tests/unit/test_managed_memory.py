"""Room of CUDA managed memory, beside what NVML showed on an H200 (experiments/optimizers/managed_memory.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.analytic.managed_memory import BATCH, ROOT, ManagedMemory

PROBE = Path(__file__).resolve().parents[2] / "experiments" / "optimizers" / "managed_memory.json"
MEASURED = json.loads(PROBE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("probe", MEASURED, ids=lambda probe: "_".join(map(str, probe["sizes"])))
def test_the_card_is_asked_when_it_was(probe: dict[str, list[int]]) -> None:
    memory, rises, sizes = ManagedMemory(), [], probe["sizes"]
    before = count = 0
    while len(rises) < len(probe["rises"]):
        memory.take(sizes[count % len(sizes)])
        count += 1
        if memory.device_bytes > before:
            rises.append([count, memory.device_bytes - before])
            before = memory.device_bytes
    assert rises == probe["rises"]


def test_by_hand() -> None:
    memory = ManagedMemory()
    for _ in range(3 * 64):  # three fit a block of 2 MiB
        memory.take(ROOT // 3 - 1000)
    assert memory.device_bytes == BATCH
    memory.take(1)  # into the rest of a block
    assert memory.device_bytes == BATCH
    memory.take(ROOT)
    assert memory.device_bytes == 2 * BATCH
    assert memory.requested_bytes == 192 * (ROOT // 3 - 1000) + 1 + ROOT


def test_the_probe_is_there() -> None:
    assert len(MEASURED) >= 26
