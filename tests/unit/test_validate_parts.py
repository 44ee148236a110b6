"""`lab validate`: precision, category, the ten worst points with their largest residual, tolerances."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lab.cli.main import main
from lab.record import Residual, RunRecord
from lab.report.category_errors import UNATTRIBUTED, category_errors, largest_residual
from lab.track.bundle import read_records, write_bundle
from lab.track.select import select
from lab.vocab import MemoryBreakdown, MemoryCategory, StepPhase

MATRIX = Path(__file__).resolve().parents[2] / "experiments" / "h200_matrix" / "records.jsonl"
MIB = 1 << 20


def residual(where: str, predicted: int, measured: int, level: str = "allocated") -> Residual:
    return Residual(level, where, predicted, measured, 0)


def shifted(tmp_path: Path, unattributed_bytes: int) -> Path:
    """One recorded run, in whose forward that many bytes of activations have lost their category."""
    (record,) = [r for _, r in select(read_records([MATRIX]), ["parallel=hsdp"])]
    assert record.steady_step is not None
    for rank in record.ranks:
        forward = rank.steps[record.steady_step].phases[StepPhase.FORWARD]
        assert forward.ledger is not None
        held = forward.ledger[MemoryCategory.ACTIVATIONS] - unattributed_bytes
        forward.ledger = MemoryBreakdown({**forward.ledger, MemoryCategory.ACTIVATIONS: held})
        forward.unattributed_bytes = unattributed_bytes
    path = tmp_path / "records.jsonl"
    write_bundle(path, [record])
    return path


def peak_of(path: Path) -> int:
    record: RunRecord = next(r for _, r in read_records([path]))
    worst = record.worst("peak_allocated_bytes", record.steady_step or 0)
    assert worst is not None
    return worst[0]


def test_a_category_counts_where_it_is_furthest_off() -> None:
    found = [
        residual("peak", 1000, 1000),
        residual("peak", 5000, 9000, level="reserved"),
        residual("forward.end.activations", 110, 100),
        residual("backward.end.activations", 70, 100),
        residual("first_step.forward.end.activations", 900, 100),
        residual("build.end.parameters", 900, 100),
        residual("zero_grad.end.parameters", 100, 100),
    ]
    errors = {e.category: e for e in category_errors("x", "run", found, -5)}
    assert set(errors) == {"parameters", "activations", UNATTRIBUTED}
    activations = errors["activations"]
    assert (activations.error_bytes, activations.where, activations.percent) == (-30, "backward.end.activations", -3.0)
    assert errors["parameters"].percent == 0
    assert errors[UNATTRIBUTED].percent == -0.5
    assert category_errors("x", "run", found[1:], None) == []


def test_the_largest_residual_names_the_category_if_it_is_one() -> None:
    phase, category = residual("forward.end", 130, 100), residual("forward.end.activations", 130, 100)
    assert largest_residual([phase, category]) == category
    beyond = residual("backward.peak", 50, 100)
    assert largest_residual([phase, category, beyond, residual("first_step.peak", 0, 900)]) == beyond
    assert largest_residual([residual("peak", 1, 2)]) is None


def test_json_has_precisions_categories_and_largest_residuals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shifted(tmp_path, 100 * MIB)
    share = 100.0 * 100 * MIB / peak_of(path)
    assert main(["validate", str(path), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert {"points", "allocated", "reserved", "device_used", "states", "worst_points", "beyond_tolerance"} <= set(tree)
    assert {"median", "p90", "worst", "strategies"} == set(tree["allocated"])
    assert tree["precisions"]["allocated"] == {"bf16_mixed": tree["allocated"]["strategies"]["hsdp"]}
    activations = tree["categories"]["activations"]
    assert activations["worst_bytes"] == pytest.approx(100 * MIB, abs=MIB)
    assert activations["worst_where"] == "forward.end.activations"
    assert tree["categories"][UNATTRIBUTED]["worst"] == pytest.approx(share)
    assert tree["categories"]["parameters"]["worst"] == 0
    (worst,) = tree["worst_points"]
    assert worst["largest_residual"]["where"] == "forward.end.activations"
    assert worst["largest_residual"]["bytes"] == activations["worst_bytes"]


def test_unattributed_bytes_have_a_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shifted(tmp_path, 100 * MIB)
    share = 100.0 * 100 * MIB / peak_of(path)
    assert main(["validate", str(path), "--tolerance-unattributed", str(share * 1.01)]) == 0
    capsys.readouterr()
    assert main(["validate", str(path), "--tolerance-unattributed", str(share * 0.99)]) == 1
    text = capsys.readouterr().out
    assert f"beyond tolerance: unattributed +{share:.2f} %" in text
    assert main(["validate", str(path), "--tolerance-unattributed", str(share * 0.99), "--json"]) == 1
    (entry,) = json.loads(capsys.readouterr().out)["beyond_tolerance"]
    assert entry["level"] == UNATTRIBUTED


def test_text_and_markdown_by_precision_and_category(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--where", "parallel=single", "--where", "model=125m", "--where", "precision=fp32,fp16_mixed"]
    assert main(["validate", str(MATRIX), *where]) == 0
    text = capsys.readouterr().out
    rows = [line.split()[:3] for line in text.splitlines()]
    assert ["allocated", "fp32", "2"] in rows
    assert ["allocated", "fp16_mixed", "2"] in rows
    assert "largest residual" in text
    assert ["parameters", "4", "0.000"] in rows
    assert main(["validate", str(MATRIX), *where, "--markdown", "--by-strategy", "--by-precision"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| level | strategy/precision | runs |")
    assert [line.split(" | ")[1] for line in lines[2:6]] == ["all", "single", "fp32", "fp16_mixed"]
    assert main(["validate", str(MATRIX), *where, "--markdown", "--by-category"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| category | runs | median % |")
    assert lines[2].startswith("| parameters | 4 | 0.000 | 0.000 | 0.000 | +0 |")


def test_a_run_without_a_ledger_has_no_categories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = [r for _, r in select(read_records([MATRIX]), ["parallel=hsdp"])]
    for rank in record.ranks:
        for step in rank.steps:
            for phase, reading in step.phases.items():
                step.phases[phase] = replace(reading, ledger=None, unattributed_bytes=None)
    path = tmp_path / "records.jsonl"
    write_bundle(path, [record])
    assert main(["validate", str(path), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["categories"] == {}
    assert tree["points"] == 1


def test_logits_as_wide_as_something_else_are_left_out() -> None:
    """Attention weights of 8192 tokens beside a vocabulary of 8192: the ledger cannot tell which are which."""
    from lab.cli.validate import check
    from lab.config import load

    given = ["hardware=h200", "model=25m", "model.max_seq_len=8192", "train.seq_len=8192"]
    assert load([*given, "attention=eager"]).vocab_size_is_ambiguous
    assert not load([*given, "attention=flash"]).vocab_size_is_ambiguous
    assert not load([*given, "attention=eager", "model.vocab_size=8193"]).vocab_size_is_ambiguous
    assert load([*given, "model.intermediate_size=8192"]).vocab_size_is_ambiguous
    (source, record), *_ = select(read_records([MATRIX]), ["parallel=hsdp"])
    names = {c.category for c in next(check([(source, record)])).categories}
    record.config["model"]["vocab_size"] = record.config["model"]["hidden_size"]
    left = {c.category for c in next(check([(source, record)])).categories}
    assert names - left == {"activations", "logits_and_loss"}


def test_by_study_and_some_levels_alone(capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(MATRIX.parents[1] / name) for name in ("attention", "h200_blind2")]
    assert main(["validate", *folders, "--recorded", "--markdown", "--by-study", "--level", "allocated,states"]) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    levels = [(level.strip("| "), study) for level, study in rows]
    assert levels == [
        (level, study) for level in ("allocated", "states") for study in ("all", "attention", "h200_blind2")
    ]


def test_a_level_that_is_none_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(MATRIX), "--markdown", "--level", "used"]) == 2
    assert "--level=used" in capsys.readouterr().err
