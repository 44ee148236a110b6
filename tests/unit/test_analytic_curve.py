"""The step's memory curve: it is the prediction's, event by event, and what a snapshot holds takes the same form."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from lab.analytic import predict
from lab.analytic.curve import memory_curve
from lab.cli.main import main
from lab.config import load, to_json
from lab.curve import CurvePoint
from lab.history import curve_of
from lab.record import RunRecord, write_record
from lab.vocab import MemoryBreakdown, RunStatus, StepPhase

DATA = Path(__file__).parent / "data"
SMALL = ["model=tiny", "model.num_layers=4", "train.seq_len=64"]
CASES = [
    ["hardware=h200"],
    ["hardware=h200", "parallel=ddp", "world_size=2"],
    ["hardware=h200", "parallel=zero2", "world_size=3", "train.gradient_accumulation_steps=2"],
    ["hardware=h200", "parallel=zero3", "world_size=4", "checkpointing=full"],
    ["hardware=h200", "parallel=fsdp", "world_size=4", "checkpointing=every_k"],
    ["hardware=cpu", "parallel=zero1", "world_size=2", "train.max_grad_norm=1.0"],
    ["hardware=cpu", "attention=eager", "loss=chunked"],
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda o: "-".join(o[:2]))
def test_the_curve_is_the_prediction(overrides: list[str]) -> None:
    cfg = load([*SMALL, *overrides])
    steady, points = predict(cfg).steady, memory_curve(cfg)
    assert max(p.allocated_bytes or 0 for p in points) == steady.allocated_bytes
    assert points[-1].allocated_bytes == steady.phases[StepPhase.ZERO_GRAD].end.total_bytes
    for phase in steady.phases:
        assert [p.allocated_bytes for p in points if p.phase == phase.value and p.label == "end"][-1] == (
            steady.phases[phase].end.total_bytes
        )
    if cfg.hardware.device_type == "cuda":
        assert max(p.reserved_bytes or 0 for p in points) == steady.reserved_bytes
        assert all(p.requested_bytes <= (p.allocated_bytes or 0) <= (p.reserved_bytes or 0) for p in points)
    else:
        assert all(p.reserved_bytes is None and p.requested_bytes == p.allocated_bytes for p in points)


def test_its_changes_add_up_in_total_and_by_category() -> None:
    """From the start on: the running total, and on a CPU the categories at each phase's end."""
    cfg = load([*SMALL, "hardware=cpu", "parallel=zero3", "world_size=2"])
    points, phases = memory_curve(cfg), predict(cfg).steady.phases
    total = points[0].requested_bytes
    ends = {p.phase: i for i, p in enumerate(points) if p.label == "end"}
    sums = MemoryBreakdown(phases[StepPhase.FORWARD].end.categories)
    for i, point in enumerate(points):
        if point.kind != "move":
            total += point.change_bytes
        assert total == point.requested_bytes
        if ends["forward"] < i <= ends["backward"] and point.change_bytes:
            sums[point.category] += point.change_bytes  # type: ignore[index]  # categories are strings
            if point.kind == "move":
                sums[point.from_category] -= point.change_bytes  # type: ignore[index]
    assert sums == phases[StepPhase.BACKWARD].end.categories
    assert {p.kind for p in points} == {"allocate", "free", "move", "mark"}


def test_predict_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*SMALL, "hardware=h200"]
    for name in ("curve.json", "curve.csv"):
        assert main(["predict", *overrides, "--curve", str(tmp_path / name)]) == 0
    points = memory_curve(load(overrides))
    assert [CurvePoint(**row) for row in json.loads((tmp_path / "curve.json").read_text())] == points
    with (tmp_path / "curve.csv").open(newline="") as stream:
        assert [int(row["allocated_bytes"]) for row in csv.DictReader(stream)] == [p.allocated_bytes for p in points]
    capsys.readouterr()
    assert main(["predict", *overrides, "--curve", str(tmp_path / "curve.png")]) == 2
    assert ".json or .csv" in capsys.readouterr().err


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """A real run's events (1b, fp32, checkpointed, H200) in the form of a snapshot."""
    trace = json.loads(gzip.decompress((DATA / "allocator_trace_ck1b.json.gz").read_bytes()))
    names = {"a": "alloc", "f": "free_completed", "s": "segment_alloc"}
    events, live = [], {}
    for kind, address, size, _ in trace["events"]:
        if kind == "a":
            live[address] = size
        elif kind == "f":
            size = live.pop(address)
        events.append({"action": names[kind], "addr": address, "size": size})
    blocks = [{"address": a, "size": s, "requested_size": s, "state": "active_allocated"} for a, s in live.items()]
    segments = [{"blocks": blocks, "total_size": trace["reserved_bytes"]}]
    return {"segments": segments, "device_traces": [[], events]}


def test_a_recorded_history_takes_the_same_form(recorded: dict[str, Any]) -> None:
    """The recording begins with an empty allocator, so both totals begin at 0; in between they follow the events."""
    points = curve_of(recorded)
    assert (points[0].requested_bytes, points[0].reserved_bytes) == (0, 0)
    total = 0
    for point in points:
        total += point.change_bytes
        assert total == point.requested_bytes <= (point.reserved_bytes or 0)
    assert points[-1].reserved_bytes == recorded["segments"][0]["total_size"]


def test_the_real_run_lies_on_the_predicted_curve(recorded: dict[str, Any]) -> None:
    """Peak of the requests, predicted and measured; the recording also holds the first steps."""
    overrides = ["model=1b", "precision=fp32", "checkpointing=full", "train.micro_batch_size=4", "train.seq_len=2048"]
    predicted = memory_curve(load([*overrides, "train.steps=4", "hardware=h200"]))
    measured = curve_of(recorded)
    assert abs(max(p.requested_bytes for p in predicted) - max(p.requested_bytes for p in measured)) <= 4096


def test_diff_writes_both(tmp_path: Path, recorded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load([*SMALL, "hardware=h200"])
    record = RunRecord("id", "look", RunStatus.OK, "2026-01-01T00:00:00+00:00", [], to_json(cfg), {})
    write_record(tmp_path / "record.json", record)
    (tmp_path / "snapshot_rank_0.pickle").write_bytes(pickle.dumps(recorded))
    assert main(["diff", str(tmp_path), "--curve", str(tmp_path / "step.json")]) == 0
    predicted, measured = (
        json.loads((tmp_path / f"step.{side}.json").read_text()) for side in ("predicted", "measured")
    )
    assert predicted[0].keys() == measured[0].keys()
    assert [CurvePoint(**row) for row in predicted] == memory_curve(cfg, 0)
    assert len(measured) == len(curve_of(recorded))
    capsys.readouterr()
