"""W&B: what the offline run holds, who decides the mode, and that a failure costs one note."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.analytic import predict
from lab.compare import residuals
from lab.config import RunConfig, load, to_json
from lab.record import PhaseReading, RankMeasurement, RunMetrics, RunRecord, StepMeasurement
from lab.track import RunFolder, make_tracker
from lab.track.wandb_tracker import wandb_mode
from lab.units import GIB
from lab.vocab import MemoryBreakdown, MemoryCategory, RunStatus, StepPhase


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return load([f"launch.output_dir={tmp_path}", "name=study", "tracker=wandb", "hardware=cpu"])


def step(index: int, rank: int, loss: float | None) -> StepMeasurement:
    ledger = MemoryBreakdown({MemoryCategory.PARAMETERS: GIB})
    phases = {
        phase: PhaseReading(peak_allocated_bytes=(index + rank + 1) * GIB, end_allocated_bytes=GIB, ledger=ledger)
        for phase in (StepPhase.FORWARD, StepPhase.BACKWARD)
    }
    return StepMeasurement(index, 0.25, loss, phases)


def record_of(cfg: RunConfig, folder: RunFolder) -> RunRecord:
    ranks = [
        RankMeasurement(r, r, "h", "cpu", "cpu_storage_tracker", steps=[step(i, r, 5.0 - i) for i in range(3)])
        for r in range(2)
    ]
    prediction = predict(cfg)
    return RunRecord(
        folder.run_id,
        cfg.name,
        RunStatus.OK,
        "",
        [],
        to_json(cfg),
        {},
        prediction=prediction,
        ranks=ranks,
        residuals=residuals(prediction, ranks),
        metrics=RunMetrics(5.0, 3.0, 0.25, 1024.0),
    )


def read_offline(folder: RunFolder) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(history rows, summary, the run's own entry) of the one offline run in the folder, by W&B's own reader."""
    (path,) = folder.wandb_path.glob("offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    history = [e["history"]["item"] for e in entries if e["type"] == "history"]
    summary: dict[str, Any] = {}
    for entry in entries:
        if entry["type"] == "summary":
            summary.update(entry["summary"].get("update", {}))
    return history, summary, next(e["run"] for e in entries if e["type"] == "run")


def test_offline_run_reads_back(cfg: RunConfig) -> None:
    folder = RunFolder.create(cfg, "run-1")
    tracker = make_tracker(cfg, folder, rank=0)
    for index in range(3):
        tracker.log_step(step(index, 0, None))  # the loss is not known before the end
    tracker.finish(record_of(cfg, folder))
    assert tracker.notes == []
    history, summary, run = read_offline(folder)
    assert (run["project"], run["run_group"]) == ("training-memory-lab", "study")
    assert run["config"]["update"]["parallel"]["strategy"] == "single"
    forward = {r["step"]: r["memory_gib/allocated_peak/forward"] for r in history if "step_seconds" in r}
    assert forward == {0: 1.0, 1: 2.0, 2: 3.0}
    assert {r["step"]: r["loss"] for r in history if "loss" in r} == {0: 5.0, 1: 4.0, 2: 3.0}
    assert [r["ranks_gib/allocated_peak/rank_1"] for r in history if "ranks_gib/allocated_peak/rank_1" in r] == [
        2,
        3,
        4,
    ]
    assert summary["measured_gib/allocated/peak"] == 4.0  # the worst rank's, not rank 0's
    assert summary["predicted_gib/allocated/peak"] == predict(cfg).steady.allocated_bytes / GIB
    assert summary["error_percent/allocated/peak"] < 0
    assert summary["measured_gib/allocated/forward.end.parameters"] == 1.0
    assert (summary["status"], summary["last_loss"]) == ("ok", 3.0)


def test_ranks_other_than_0_and_tracker_none_write_nothing(cfg: RunConfig, tmp_path: Path) -> None:
    folder = RunFolder.create(cfg, "run-2")
    quiet = load([f"launch.output_dir={tmp_path}", "name=study", "tracker=none", "hardware=cpu"])
    for tracker in (make_tracker(cfg, folder, rank=1), make_tracker(quiet, folder, rank=0)):
        tracker.log_step(step(0, 0, 1.0))
        tracker.finish(record_of(cfg, folder))
        assert tracker.notes == []
    assert not folder.wandb_path.exists()


def test_a_failing_wandb_is_one_note(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "wandb":
            raise ImportError("wandb is broken")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    folder = RunFolder.create(cfg, "run-3")
    tracker = make_tracker(cfg, folder, rank=0)
    tracker.log_step(step(0, 0, 1.0))
    tracker.finish(record_of(cfg, folder))
    assert tracker.notes == ["W&B: start failed: ImportError: wandb is broken"]


def test_a_failure_in_the_middle_ends_the_tracking_not_the_run(cfg: RunConfig) -> None:
    folder = RunFolder.create(cfg, "run-4")
    tracker = make_tracker(cfg, folder, rank=0)
    run = tracker._run  # type: ignore[attr-defined]
    tracker.log_step(StepMeasurement(0, "no number", None))  # type: ignore[arg-type]
    tracker._run = type("Gone", (), {"log": lambda self, values: 1 / 0})()  # type: ignore[attr-defined]
    tracker.log_step(step(1, 0, 1.0))
    tracker.log_step(step(2, 0, 1.0))
    tracker.finish(record_of(cfg, folder))
    assert tracker.notes == ["W&B: log failed: ZeroDivisionError: division by zero"]
    run.finish()


@pytest.mark.parametrize(
    ("configured", "variables", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "x" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}, "offline"),
        ("offline", {"WANDB_API_KEY": "x" * 40}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_mode(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, configured: str, variables: dict[str, str], expected: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(configured) == expected


def test_a_login_in_netrc_is_found(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(path))
    assert wandb_mode("auto") == "online"
