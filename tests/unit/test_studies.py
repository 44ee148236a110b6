"""Choosing records, study tables, the textbook's formulas, and the tables of the READMEs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lab.cli.main import main
from lab.config import ConfigError
from lab.report.marked import remake
from lab.report.settings import applies, differing_settings, overrides_text
from lab.report.study import ledger_table, study_table
from lab.track.bundle import read_records
from lab.track.select import parse_where, select
from lab.vocab import StepPhase

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ROOT / "experiments" / "h200_matrix" / "records.jsonl"


def chosen(*where: str) -> list[str]:
    return [source for source, _ in select(read_records([MATRIX]), where)]


def test_studies_are_subsets_of_the_matrix() -> None:
    """A study's records are the matrix's own lines, not a copy that went its own way."""
    lines = set(MATRIX.read_text(encoding="utf-8").splitlines())
    for study in ("zero_stages", "checkpointing", "mixed_precision"):
        for bundle in (ROOT / "experiments" / study).glob("*.jsonl"):
            found = bundle.read_text(encoding="utf-8").splitlines()
            assert len(found) >= 8
            assert set(found) <= lines, bundle


@pytest.mark.parametrize(
    ("where", "count"),
    [
        (["parallel=hsdp"], 1),
        (["parallel.strategy=hsdp"], 1),
        (["model=7b", "parallel=zero3,fsdp", "world_size=4"], 2),
        (["train.max_grad_norm=1"], 2),  # recorded as 1.0
        (["train.max_grad_norm=1.0", "train.gradient_accumulation_steps=3"], 1),
        (["model.dropout=0.1", "train.max_grad_norm=null"], 1),
        (["model.bias=true"], 2),
        (["parallel=hsdp", "world_size=2"], 0),
        ([], 90),
    ],
)
def test_where_chooses_by_settings_and_groups(where: list[str], count: int) -> None:
    assert len(chosen(*where)) == count


def test_a_run_in_two_bundles_is_read_once() -> None:
    assert len(list(read_records([MATRIX, ROOT / "experiments"]))) == len(list(read_records([ROOT / "experiments"])))
    assert len(list(read_records([MATRIX, MATRIX]))) == 90


def test_where_leaves_out_records_without_the_setting() -> None:
    record = next(r for _, r in read_records([MATRIX]))
    invalid = replace(record, config={"overrides": ["parallel=zero3"]})
    assert list(select([("x", invalid)], ["parallel=zero3"])) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["compare", "--where", "parallel"], "--where=parallel: KEY=VALUE"),
        (["compare", "--where", "parallel="], "--where=parallel=: KEY=VALUE"),
        (["compare", "--where", "train.seq_length=3"], "did you mean train.seq_len?"),
        (["compare", str(MATRIX), "--where", "parallel=zero9"], "no record has these settings"),
        (["validate", str(MATRIX), "--where", "parallel=zero9"], "no finished run"),
        (["bundle", str(MATRIX), "--where", "parallel=zero9", "-o", "x.jsonl"], "hold no such record"),
        (["tables", "no/such/page.md"], "no such file"),
    ],
)
def test_a_wrong_choice_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert line in captured.err


def test_bundle_and_validate_take_the_chosen_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "records.jsonl"
    where = ["--where", "model=1b", "--where", "parallel=zero1,zero2", "--where", "world_size=4"]
    assert main(["bundle", str(MATRIX), *where, "-o", str(bundle)]) == 0
    assert len(bundle.read_text().splitlines()) == 2
    capsys.readouterr()
    assert main(["validate", str(MATRIX), *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == 2


def test_recorded_predictions_are_judged_as_they_were_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--recorded` reads the record's prediction, and nothing else does."""
    from lab.track.bundle import write_bundle

    record = next(r for _, r in select(read_records([MATRIX]), ["parallel=hsdp"]))
    assert record.prediction is not None
    wrong = replace(record.prediction, steady=replace(record.prediction.steady, allocated_bytes=1))
    path = tmp_path / "records.jsonl"
    write_bundle(path, [replace(record, prediction=wrong)])
    worst = []
    for options in ([], ["--recorded"]):
        assert main(["validate", str(path), "--json", *options]) == 0
        worst.append(json.loads(capsys.readouterr().out)["allocated"]["worst"])
    assert worst[0] < 5 < worst[1] == pytest.approx(100)


def test_study_table_has_the_columns_that_differ_and_what_came_of_them() -> None:
    where = ["model=1b", "world_size=4", "parallel=zero1,zero3"]
    records = [r for _, r in select(read_records([MATRIX]), where)]
    common, table, note = study_table(records).split("\n\n")
    assert common.startswith("2 runs, model 1b, checkpointing none, precision bf16_mixed, ranks 4, micro-batch 4")
    assert "NVIDIA H200, torch 2." in common
    header, _, zero1, zero3 = table.splitlines()
    assert header == "| strategy | predicted GiB | measured GiB | error % | reserved GiB | step s | tokens/s |"
    assert zero1.startswith("| zero1 | 17.004 | 17.004 |")  # what this run measured
    assert zero3.startswith("| zero3 | 18.8")
    assert "maximum across all GPUs" in note
    assert "GiB = 2^30 bytes" in note
    with_textbook = study_table(records, with_textbook=True).split("\n\n")[1].splitlines()
    assert "| textbook states GiB | textbook total GiB | textbook error % |" in with_textbook[0]
    assert "| 3.551 |" in with_textbook[3]  # zero3: 16 bytes x 953 223 168 parameters / 4
    in_one = study_table(records, as_overrides=True)
    assert "| parallel=zero1 world_size=4 model=1b train.micro_batch_size=4 train.seq_len=2048 | 17.004 |" in in_one


def test_ledger_table_adds_up() -> None:
    where = ["model=1b", "world_size=2", "parallel=ddp,zero3"]
    records = [r for _, r in select(read_records([MATRIX]), where)]
    _, table, note = ledger_table(records, StepPhase.FORWARD).split("\n\n")
    header, _, *rows = table.splitlines()
    assert header.split(" | ")[0:2] == ["| strategy", "checkpointing"]
    assert len(rows) == 4
    for row in rows:
        *parts, total = (float(c) for c in row.strip("| ").split(" | ")[2:])
        assert sum(parts) == pytest.approx(total, abs=0.001 * len(parts))
    assert "end of forward" in note


def test_settings_that_do_not_apply_are_no_difference() -> None:
    none = {"checkpointing.kind": "none", "checkpointing.every_k": 2, "seed": 1}
    every = {"checkpointing.kind": "every_k", "checkpointing.every_k": 5, "seed": 2}
    other = {**every, "checkpointing.every_k": 3}
    assert not applies("checkpointing.every_k", none)
    assert differing_settings([none, every]) == ["seed"]
    assert differing_settings([none, every, other]) == ["checkpointing.every_k", "seed"]
    plain = {"quantization.kind": "none", "quantization.skip_modules": ["head"]}
    assert differing_settings([plain, {**plain, "quantization.skip_modules": ["head", "lm_head"]}]) == []
    asked = ["experiment=x", "a.b=1", "launch.timeout_s=3", "tracker=none", "hardware=h200"]
    assert overrides_text({"overrides": asked}) == "a.b=1"


def test_marked_tables_are_remade_and_the_rest_is_left() -> None:
    page = "a\n<!-- table: lab x --y 'b c' -->\nold\n<!-- /table -->\nz\n<!-- table: lab w -->\n<!-- /table -->\n"
    calls: list[list[str]] = []

    def run(arguments: list[str]) -> str:
        calls.append(arguments)
        return "| 1 |\n" if arguments[0] == "x" else "plain\n"

    new, tables = remake(page, run)
    assert calls == [["x", "--y", "b c"], ["w"]]
    assert [t.stale for t in tables] == [True, True]
    assert "-->\n\n| 1 |\n\n<!-- /table -->\nz\n" in new
    assert "```text\nplain\n```" in new
    assert [t.stale for t in remake(new, run)[1]] == [False, False]
    for wrong in ("<!-- table: lab x -->\nno end\n", "<!-- table: rm x -->\n<!-- /table -->\n"):
        with pytest.raises(ValueError, match="marker of a table"):
            remake(wrong, run)


def test_tables_check_sees_a_stale_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: lab predict hardware=cpu --points -->\nold\n<!-- /table -->\n")
    assert main(["tables", str(page), "--check"]) == 1
    assert "old" in page.read_text()
    assert main(["tables", str(page)]) == 0
    assert "allocated GiB" in page.read_text()
    assert main(["tables", str(page), "--check"]) == 0
    capsys.readouterr()


def test_predicted_points_are_one_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "hardware=cpu", "checkpointing=none,full", "--points"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert rows[2].startswith("| checkpointing=none |")


def test_an_unknown_setting_in_where_raises() -> None:
    with pytest.raises(ConfigError, match="no such setting"):
        parse_where(["nonsense=1"])
