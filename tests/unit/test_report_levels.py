"""The table of levels: what lies between allocated, reserved and device use."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.cli.main import main

MATRIX = Path(__file__).resolve().parents[2] / "experiments" / "h200_matrix" / "records.jsonl"


def test_levels_and_what_lies_between(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--where", "model=1b", "--where", "world_size=4", "--where", "parallel=zero1,fsdp"]
    assert main(["compare", str(MATRIX), *where, "--levels"]) == 0
    _, table, note = capsys.readouterr().out.strip().split("\n\n")
    head, _, *rows = table.splitlines()
    assert head.startswith(
        "| strategy | allocated GiB | error % | reserved GiB | error % | device used GiB | error % |"
    )
    assert len(rows) == 2
    for row in rows:
        _, allocated, _, reserved, _, device, _, between, share, outside = row.strip("| ").split(" | ")
        assert float(between) == pytest.approx(float(reserved) - float(allocated), abs=0.0011)
        assert float(outside) == pytest.approx(float(device) - float(reserved), abs=0.0011)
        assert float(share) == pytest.approx(100 * float(between) / float(reserved), abs=0.06)
        assert 1.0 < float(outside) < 3.0
    assert "reserved minus allocated" in note


def test_a_cpu_record_has_dashes_where_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Device use is not read on a CPU."""
    from dataclasses import replace

    from lab.track.bundle import read_records, write_bundle

    record = next(r for _, r in read_records([MATRIX]))
    for rank in record.ranks:
        for step in rank.steps:
            for phase in step.phases.values():
                phase.device_used_bytes = None
    write_bundle(tmp_path / "r.jsonl", [replace(record, prediction=None)])
    assert main(["compare", str(tmp_path / "r.jsonl"), "--levels", "--overrides"]) == 0
    row = capsys.readouterr().out.split("\n\n")[1].splitlines()[2].strip("| ").split(" | ")
    assert row[2] == row[4] == row[5] == row[6] == row[9] == "-"
    assert float(row[7]) > 0
