"""``lab sweep --ahead``: a point gets ready while the one before it runs, and never shares its GPU with it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from lab.cli import sweep
from lab.cli.process import Launch

pytestmark = pytest.mark.distributed


def test_points_wait_for_their_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points on one stand-in GPU (the runs themselves are on the CPU): both start, the second waits."""
    monkeypatch.setattr(sweep, "_gpu_ids", lambda: ["0"])
    monkeypatch.setattr(sweep, "_on_gpu", lambda cfg: True)
    released: list[tuple[int, int]] = []  # runs alive and runs that wait, whenever one is let go

    def restart_clock(self: Launch) -> None:
        runs = driver.running
        released.append((len(runs), sum(r.turn is not None for r in runs)))

    monkeypatch.setattr(Launch, "restart_clock", restart_clock)
    overrides = ["model=tiny", "parallel=single", "train.seq_len=32,48", "train.steps=2", "tracker=none", "name=ahead"]
    points = sweep.study_points([*overrides, f"launch.output_dir={tmp_path}"])
    driver = sweep.Sweep(points, ahead=True)
    assert driver.run() == 0
    records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(tmp_path.glob("ahead/*/record.json"))]
    assert [r["status"] for r in records] == ["ok", "ok"]
    assert all((p.parent / "turn").is_file() for p in tmp_path.glob("ahead/*/record.json"))
    # When the second was let go, the first was gone: alone, and no longer only waiting.
    assert released[-1] == (1, 1)
    # The second's folder, made when it was started, is named by a time before the first one's end.
    ends = sorted(datetime.fromisoformat(r["finished_at"]).strftime("%Y%m%d-%H%M%S") for r in records)
    assert max(r["run_id"] for r in records)[: len(ends[0])] <= ends[0]
