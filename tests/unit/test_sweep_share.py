"""``lab sweep --share``: points share a GPU as far as their predictions fit it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.analytic import predict
from lab.cli import sweep
from lab.cli.sweep import Sweep, _Running
from lab.config import ConfigError

POINTS = ["model=tiny", "parallel=single", "train.seq_len=64,128", "hardware=h200", "tracker=none", "name=share"]


def test_a_point_joins_where_both_predictions_fit(tmp_path: Path) -> None:
    first, second = sweep.study_points([*POINTS, f"launch.output_dir={tmp_path}"])
    assert first.cfg is not None
    assert second.cfg is not None
    both = sum(predict(cfg).steady.device_used_bytes for cfg in (first.cfg, second.cfg))
    for capacity, fits in ((both, True), (both - 1, False)):
        cfgs = [replace(c, hardware=replace(c.hardware, capacity_bytes=capacity)) for c in (first.cfg, second.cfg)]
        points = [replace(p, cfg=c) for p, c in zip((first, second), cfgs, strict=True)]
        driver = Sweep(points, jobs=2, share=2)
        driver.running.append(_Running(points[0], cfgs[0], None, None, [], "", ["0"]))  # type: ignore[arg-type]
        assert driver._fits_beside(points[1], "0") is fits
        assert driver._fits_beside(points[1], "1")  # nobody there


def test_share_and_ahead_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--share=2: not with --ahead"):
        sweep.run([*POINTS, "--share", "2", "--ahead"])


def test_a_shared_gpu_has_no_device_use_and_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lab.config import load
    from lab.config.device import SHARED_GPU_VARIABLE
    from lab.measure.device_use import DeviceUse
    from lab.metrics import run_metrics

    monkeypatch.setenv(SHARED_GPU_VARIABLE, "1")
    use = DeviceUse(torch.device("cuda", 0))
    assert use.read() is None
    assert "other runs were on this GPU" in use.notes[0]
    assert run_metrics(load(["model=tiny"]), 1, [], 0.5).step_seconds is None
    monkeypatch.delenv(SHARED_GPU_VARIABLE)
    assert run_metrics(load(["model=tiny"]), 1, [], 0.5).step_seconds == 0.5
