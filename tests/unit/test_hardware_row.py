"""The hardware table holds what `lab hardware` derives from the committed records, and nothing typed in beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from lab.analytic.hardware import asks_cudnn, communicators, outside_allocator_bytes
from lab.cli import hardware
from lab.cli.hardware_row import Probe, hardware_row, row_name, row_yaml
from lab.cli.main import main
from lab.cli.points import study_points
from lab.config import HardwareConfig, load, run_config_from_json
from lab.config.typed import build
from lab.record import RunRecord
from lab.track.bundle import read_records
from lab.vocab import RunStatus

TRAINED = ("model=hf", "model.path=configs/hf/gpt2.json", "model.random_weights=true")
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_h200_row_is_what_its_records_say() -> None:
    derived = hardware_row(record for _, record in read_records([EXPERIMENTS / "h200_matrix"]))
    row = load(["hardware=h200"]).hardware
    parts = {"cuda_context_bytes", "cudnn_bytes", "nccl_bytes", "nccl_further_bytes"}
    assert set(derived) == parts | {"nccl_one_rank_bytes", "nccl_one_rank_further_bytes", "nccl_idle_bytes"}
    assert derived == {name: getattr(row, name) for name in derived}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel=single"], ()),
        (["parallel=ddp", "world_size=2"], ("nccl_bytes",)),
        (["parallel=zero3", "world_size=4"], ("nccl_bytes",)),
        (["parallel=zero2", "world_size=1"], ("nccl_one_rank_bytes",)),
        (["parallel=ddp", "world_size=1"], ("nccl_one_rank_bytes",)),
        (["parallel=fsdp", "world_size=1"], ("nccl_idle_bytes",)),
        (["parallel=hsdp", "world_size=4"], ("nccl_bytes", "nccl_further_bytes")),
        (["parallel=hsdp", "world_size=2"], ("nccl_bytes",)),  # shards of one rank: no second group of two
    ],
)
def test_what_lies_outside_the_allocator(overrides: list[str], parts: tuple[str, ...]) -> None:
    row = load(["hardware=h200"]).hardware
    expected = row.idle_bytes + row.cuda_context_bytes + sum(getattr(row, part) for part in parts)
    for attention in ("eager", "math", "mem_efficient", "flash"):
        assert outside_allocator_bytes(load(["hardware=h200", f"attention={attention}", *overrides])) == expected
    assert outside_allocator_bytes(load(["hardware=h200", "precision=fp32", *overrides])) == expected
    for asking in ("attention=auto", "attention=cudnn"):  # in bf16, PyTorch's own choice asks cuDNN first
        assert outside_allocator_bytes(load(["hardware=h200", asking, *overrides])) == expected + row.cudnn_bytes


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["parallel=zero3", "world_size=2", "precision=fp16_mixed"], 2),
        (["parallel=zero3", "world_size=1", "precision=fp16_mixed", "engine=accelerate"], 2),
        (["parallel=zero3", "world_size=2", "precision=bf16_pure"], 1),
        (["parallel=zero2", "world_size=2", "precision=fp16_mixed"], 1),
        (["parallel=fsdp", "world_size=2", "precision=fp16_mixed"], 1),
        (["parallel=single", "precision=fp16_mixed"], 0),
        (["parallel=ddp", "world_size=1", "engine=accelerate"], 0),
        (["parallel=ddp", "world_size=2", "engine=hf_trainer", *TRAINED], 1),
        (["parallel=zero2", "world_size=2", "engine=hf_trainer", *TRAINED], 2),
        (["parallel=zero3", "world_size=2", "engine=hf_trainer", *TRAINED], 2),
        (["parallel=zero2", "world_size=1", "engine=hf_trainer", *TRAINED], 1),
    ],
)
def test_fp16_under_zero3_and_a_trainers_zero_have_a_second_communicator(overrides: list[str], count: int) -> None:
    cfg = load(["hardware=h200", "attention=cudnn", *overrides])
    row = cfg.hardware
    assert communicators(cfg) == count
    if cfg.world_size == 1:
        parts = row.nccl_one_rank_bytes, row.nccl_one_rank_further_bytes
    else:
        parts = row.nccl_bytes, row.nccl_further_bytes
    bare = row.idle_bytes + row.cuda_context_bytes + row.cudnn_bytes
    assert outside_allocator_bytes(cfg) == bare + sum(parts[:count])


def test_a_cpu_has_nothing_outside() -> None:
    assert outside_allocator_bytes(load(["hardware=cpu"])) == 0


def test_no_gpu_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_gpu_run_of_the_matrix_is_explained_within_8_mib() -> None:
    """What lies between NVML's device use and the allocator's segments, run by run."""
    row = load(["hardware=h200"]).hardware
    seen = 0
    for _, record in read_records([EXPERIMENTS / "h200_matrix"]):
        cfg = run_config_from_json({**record.config, "hardware": vars(row)})
        assert record.steady_step is not None
        for rank in record.ranks:
            for phase in rank.steps[record.steady_step].phases.values():
                if phase.device_used_bytes:
                    outside = phase.device_used_bytes - phase.end_reserved_bytes
                    assert abs(outside - outside_allocator_bytes(cfg)) <= 8 << 20
                    seen += 1
    assert seen >= 83


PROBE = Probe("NVIDIA X9 80GB", 80 << 30, 600 << 20, 100, 512, 32 << 20, 1 << 20)


def test_the_whole_row_is_yaml_that_the_lab_reads() -> None:
    records = [record for _, record in read_records([EXPERIMENTS / "h200_matrix"])]
    derived = hardware_row(records, idle_bytes=600 << 20)
    assert derived["cuda_context_bytes"] > hardware_row(records)["cuda_context_bytes"]
    text = row_yaml(row_name(PROBE.gpu_name), PROBE, derived, records[0].environment)
    row = build(HardwareConfig, yaml.safe_load(text))
    assert (row.name, row.gpu_name, row.device_type) == ("x9_80gb", "NVIDIA X9 80GB", "cuda")
    assert row.capacity_bytes == 80 << 30
    assert row.cublas_workspace_bytes == 32 << 20
    assert {name: getattr(row, name) for name in derived} == derived
    table = set(yaml.safe_load((EXPERIMENTS.parent / "configs" / "hardware" / "h200.yaml").read_text()))
    assert set(yaml.safe_load(text)) == table
    numbers = [line for line in text.splitlines() if line.split(": ")[1:2] and line.split(": ")[1][:1].isdigit()]
    assert all("#" in line for line in numbers)
    assert "driver 580.159.04, torch 2.11.0" in text
    without = row_yaml("x9", PROBE, {k: v for k, v in derived.items() if k != "nccl_further_bytes"}, {})
    points = "parallel=zero3 precision=fp16_mixed world_size=2"
    assert f"nccl_further_bytes: 0 # a second communicator; open: needs {points}" in without


@pytest.mark.parametrize(("gpus", "points"), [(1, 6), (2, 10), (8, 12)])
def test_measure_runs_what_there_are_gpus_for(
    gpus: int, points: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records of the matrix stand in for the study's runs, in the order of its points."""
    ran: list[tuple[str, int]] = []
    matrix = [record for _, record in read_records([EXPERIMENTS / "h200_matrix"])]

    def like(strategy: str, world_size: int, attention: str, fp16: bool) -> RunRecord:
        found = [run_config_from_json(r.config) for r in matrix]
        return next(
            r
            for r, c in zip(matrix, found, strict=True)
            if (c.parallel.strategy.value, c.world_size) == (strategy, world_size)
            and asks_cudnn(c) is (attention != "math")
            and (c.precision.kind == "fp16_mixed") is fp16
        )

    class FakeSweep:
        def __init__(self, points: Sequence[object], ahead: bool) -> None:
            self.recorded: dict[str, tuple[str, RunRecord]] = {}
            for point in points:
                cfg = point.cfg  # type: ignore[attr-defined]
                key = (cfg.parallel.strategy.value, cfg.world_size)
                ran.append(key)
                record = like(*key, cfg.attention.backend.value, cfg.precision.kind == "fp16_mixed")
                self.recorded[point.identity] = ("", record)  # type: ignore[attr-defined]

        def run(self) -> int:
            return 0

    monkeypatch.setattr(hardware, "visible_gpu_names", lambda: ["NVIDIA X9 80GB"] * gpus)
    monkeypatch.setattr(hardware, "read_probe", lambda: PROBE)
    monkeypatch.setattr(hardware, "Sweep", FakeSweep)
    monkeypatch.setattr(hardware, "study_points", lambda given: study_points([*given, "hardware=h200"]))
    output = tmp_path / "x9.yaml"
    assert main(["hardware", "--measure", "-o", str(output)]) == 0
    assert len(ran) == points
    row = build(HardwareConfig, yaml.safe_load(output.read_text()))
    assert row.name == "x9"
    assert row.cudnn_bytes == load(["hardware=h200"]).hardware.cudnn_bytes
    assert (row.nccl_bytes > 0) is (gpus >= 2)
    assert (row.nccl_further_bytes > 0) is (gpus >= 2)
    assert row.nccl_one_rank_further_bytes > 0
    assert row.nccl_one_rank_bytes > row.nccl_idle_bytes > 0
    assert f"written: {output}" in capsys.readouterr().out


def test_measure_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpu_names", list)
    for arguments in (["--measure"], ["--measure", "experiments"], ["--measure", "-o", "no/such/folder/x.yaml"]):
        assert main(["hardware", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_failed_runs_say_nothing_of_the_row() -> None:
    records = [record for _, record in read_records([EXPERIMENTS / "h200_matrix"])]
    for record in records:
        record.status = RunStatus.FAILED
    assert hardware_row(records) == {}
