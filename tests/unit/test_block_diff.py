"""`lab diff`: peaks of a recorded history, and blocks that do not cancel, on small cases and on a real run's events."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from lab.analytic.explain import peak_blocks
from lab.block_diff import diff_blocks, total_bytes
from lab.cli.main import main
from lab.config import load
from lab.history import HistoryBlock, blocks_at_peak

DATA = Path(__file__).parent / "data"


def event(action: str, addr: int, size: int) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "frames": [{"filename": "m.py", "line": 7, "name": "f"}]}


def snapshot(events: list[dict[str, Any]], live: dict[int, int]) -> dict[str, Any]:
    blocks = [{"address": a, "size": s, "requested_size": s, "state": "active_allocated"} for a, s in live.items()]
    return {"segments": [{"blocks": blocks}], "device_traces": [[], events]}


def test_the_peak_is_found_going_back_from_the_end() -> None:
    history = [event("alloc", 2, 1000), event("alloc", 3, 5000), event("free_completed", 3, 5000)]
    found = blocks_at_peak(snapshot(history, {1: 512, 2: 1000}))
    assert sorted(b.request_bytes for b in found) == [512, 1024, 5120]
    assert {b.where for b in found if b.request_bytes != 512} == {"m.py:7 f"}


def test_what_was_there_before_the_recording_counts() -> None:
    history = [event("free_completed", 9, 4096), event("alloc", 2, 512)]
    assert [b.request_bytes for b in blocks_at_peak(snapshot(history, {2: 512}))] == [4096]


def test_equal_sizes_cancel_and_the_rest_is_named() -> None:
    cfg = load(["hardware=h200", "model=tiny", "train.seq_len=64"])
    predicted = peak_blocks(cfg, 0)
    measured = [HistoryBlock(p.tensor_bytes, "") for p in predicted]
    assert diff_blocks(predicted, measured) == []
    missing = max(predicted, key=lambda p: p.tensor_bytes)
    measured.remove(HistoryBlock(missing.tensor_bytes, ""))
    measured.append(HistoryBlock(123 * 512, "loss.py:3 loss"))
    left = diff_blocks(predicted, measured)
    assert [(x.side, x.total_bytes) for x in left] == [("predicted", missing.tensor_bytes), ("measured", 123 * 512)]
    assert left[1].names == ("loss.py:3 loss (1)",)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The events of a real run (1b, fp32, checkpointed) in the form of a snapshot, in a run folder."""
    trace = json.loads(gzip.decompress((DATA / "allocator_trace_ck1b.json.gz").read_bytes()))
    events, live = [], {}
    for kind, address, size, _ in trace["events"]:
        if kind == "a":
            live[address] = size
            events.append({"action": "alloc", "addr": address, "size": size})
        elif kind == "f":
            events.append({"action": "free_completed", "addr": address, "size": live.pop(address)})
    return tmp_path_factory.mktemp("run"), snapshot(events, live)


def test_a_real_run_cancels_but_for_scalars(real_run: tuple[Path, dict[str, Any]]) -> None:
    overrides = ["model=1b", "precision=fp32", "checkpointing=full", "train.micro_batch_size=4", "train.seq_len=2048"]
    cfg = load([*overrides, "train.steps=4", "hardware=h200"])
    predicted, measured = peak_blocks(cfg, 0), blocks_at_peak(real_run[1])
    assert abs(sum(p.tensor_bytes for p in predicted) - total_bytes(measured)) <= 4096
    assert all(x.size_bytes <= 512 for x in diff_blocks(predicted, measured))


def test_a_run_without_a_snapshot_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "measure=snapshot" in error


def test_the_command_on_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lab.config import to_json
    from lab.record import RunRecord, write_record
    from lab.vocab import RunStatus

    cfg = load(["hardware=h200", "model=tiny", "train.seq_len=64"])
    record = RunRecord("id", "look", RunStatus.OK, "2026-01-01T00:00:00+00:00", [], to_json(cfg), {})
    write_record(tmp_path / "record.json", record)
    live = {i: p.tensor_bytes for i, p in enumerate(peak_blocks(cfg, 0))}
    live[10_000] = 1 << 20
    (tmp_path / "snapshot_rank_0.pickle").write_bytes(pickle.dumps(snapshot([], live)))
    assert main(["diff", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "difference -1,048,576 B" in out
    assert "measured" in out.splitlines()[-1]
