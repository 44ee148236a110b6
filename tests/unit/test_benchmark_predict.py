"""`lab benchmark predict`: which figures it prints, and that the settings it is given are those it times."""

from __future__ import annotations

import json

import pytest

from lab.cli import benchmark_predict
from lab.cli.main import main


def test_every_strategy_and_level_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, int, str]] = []

    def timed(cfg, level):  # type: ignore[no-untyped-def]
        seen.append((cfg.model.name, cfg.parallel.strategy.value, cfg.world_size, level.value))
        return 2.0, 1.0

    commands: list[list[str]] = []
    monkeypatch.setattr(benchmark_predict, "_in_process", timed)
    monkeypatch.setattr(benchmark_predict, "_as_command", lambda c: commands.append(list(c)) or 300.0)
    figures = benchmark_predict.prediction_cost([])
    strategies = [("single", 1), ("ddp", 4), ("zero1", 4), ("zero2", 4), ("zero3", 4), ("fsdp", 4)]
    levels = ["allocated", "device_used"]
    assert seen == [(m, s, n, level) for m in ("1b", "7b") for s, n in strategies for level in levels]
    assert figures["7b_zero3_x4_allocated_ms"] == 2.0
    assert figures["1b_single_x1_with_allocator_cpu_ms"] == 1.0
    assert figures["lab_predict_ms"] == 300.0
    assert commands == [["hardware=h200", "model=7b", "parallel=fsdp", "world_size=4"]]
    seen.clear()
    benchmark_predict.prediction_cost(["model=tiny", "parallel=zero2", "world_size=2", "train.seq_len=64"])
    assert seen == [("tiny", "zero2", 2, level) for level in levels]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """On a small model: times are of predictions that were made."""
    overrides = ["model=tiny", "parallel=single", "train.seq_len=64"]
    assert main(["benchmark", "predict", *overrides, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {
        *(f"tiny_single_x1_{level}_{kind}" for level in ("allocated", "with_allocator") for kind in ("ms", "cpu_ms")),
        "lab_predict",
        "lab_predict_ms",
    }
    # The allocator's simulation costs something, and a process of its own more than either.
    assert 0 < figures["tiny_single_x1_allocated_cpu_ms"] < figures["tiny_single_x1_with_allocator_cpu_ms"]
    assert figures["tiny_single_x1_with_allocator_cpu_ms"] < figures["lab_predict_ms"]
