"""The hardware table holds what `lab hardware` derives from the committed records, and nothing typed in beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.analytic.hardware import outside_allocator_bytes
from lab.cli.hardware import hardware_row
from lab.cli.main import main
from lab.config import load
from lab.track.bundle import read_records

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_h200_row_is_what_its_records_say() -> None:
    derived = hardware_row(record for _, record in read_records([EXPERIMENTS / "h200_matrix"]))
    row = load(["hardware=h200"]).hardware
    assert set(derived) == {"cuda_context_bytes", "nccl_bytes", "nccl_further_bytes", "nccl_one_rank_bytes"}
    assert derived == {name: getattr(row, name) for name in derived}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel=single"], ()),
        (["parallel=ddp", "world_size=2"], ("nccl_bytes",)),
        (["parallel=zero3", "world_size=4"], ("nccl_bytes",)),
        (["parallel=zero2", "world_size=1"], ("nccl_one_rank_bytes",)),
        (["parallel=fsdp", "world_size=1"], ()),
        (["parallel=hsdp", "world_size=4"], ("nccl_bytes", "nccl_further_bytes")),
        (["parallel=hsdp", "world_size=2"], ("nccl_bytes",)),  # shards of one rank: no second group of two
    ],
)
def test_what_lies_outside_the_allocator(overrides: list[str], parts: tuple[str, ...]) -> None:
    cfg = load(["hardware=h200", *overrides])
    row = cfg.hardware
    expected = row.idle_bytes + row.cuda_context_bytes + sum(getattr(row, part) for part in parts)
    assert outside_allocator_bytes(cfg) == expected


def test_a_cpu_has_nothing_outside() -> None:
    assert outside_allocator_bytes(load(["hardware=cpu"])) == 0


def test_no_gpu_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
