"""The lab command: what it prints, what it refuses in one line, what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lab.analytic import predict
from lab.cli.main import COMMANDS, main
from lab.config import load, to_json
from lab.record import PhaseReading, RankMeasurement, RunMetrics, RunRecord, StepMeasurement, write_record
from lab.report.errors import quantile
from lab.report.text import markdown_table, text_table
from lab.vocab import STEP_PHASES, RunStatus


def write_run(root: Path, run_id: str, overrides: list[str], error: float = 0.0, status: str = "ok") -> Path:
    """A record whose measurement is today's prediction, made ``error`` (a fraction) smaller."""
    cfg = load([*overrides, "hardware=cpu"])
    prediction = predict(cfg)
    phases = {
        phase: PhaseReading(
            end_allocated_bytes=expected.end.total_bytes,
            peak_allocated_bytes=round(expected.peak.total_bytes / (1 + error)),
            ledger=expected.end.categories,
            unattributed_bytes=0,
        )
        for phase, expected in prediction.steady.phases.items()
        if phase in STEP_PHASES
    }
    ranks = [
        RankMeasurement(
            r, r, "h", "cpu", "cpu_storage_tracker", steps=[StepMeasurement(i, 0.5, 1.0, phases) for i in (0, 1)]
        )
        for r in range(cfg.world_size)
    ]
    record = RunRecord(
        run_id,
        cfg.name,
        RunStatus(status),
        "2025-01-01T00:00:00+00:00",
        [],
        to_json(cfg),
        {},
        prediction=prediction,
        ranks=ranks,
        metrics=RunMetrics(9.0, 8.5, 0.5, 1024.0),
    )
    path = root / cfg.name / run_id / "record.json"
    write_record(path, record)
    return path


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonsense"], "command=nonsense: no such command"),
        (["predict", "model=huge"], "model=huge: no such option"),
        (["predict", "train.seq_length=3"], "did you mean train.seq_len?"),
        (["predict", "--nonsense"], "--help"),
        (["predict", "parallel=single", "world_size=2"], "world_size=2: parallel=single is one process"),
        (["train", "parallel=single", "world_size=2"], "world_size=2: parallel=single is one process"),
        (["sweep", "experiment=nonsense"], "experiment=nonsense: no such option"),
        (["sweep", "experiment=zero_stages", "model=huge"], "model=huge: no such option"),
        (["sweep", "--jobs", "0", "experiment=zero_stages"], "--jobs=0: 1 or more"),
        (["compare", "no/such/folder"], "records=no/such/folder: no such file or folder"),
        (["validate", "no/such/folder"], "records=no/such/folder: no such file or folder"),
        (["bundle", "no/such/folder", "-o", "x.txt"], "--output=x.txt: must end in .jsonl"),
        (["bundle"], "required"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert line in captured.err
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_of_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own way out of --help
        code = int(stop.code or 0)
    assert code == 0
    assert "usage: lab" in capsys.readouterr().out


def test_predict_imports_no_torch_and_prints_the_stable_object() -> None:
    code = (
        "import sys; from lab.cli.main import main\n"
        "code = main(['predict', 'parallel=zero2', 'world_size=2', '--json'])\n"
        "assert not {'torch', 'numpy', 'wandb', 'deepspeed', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = {"allocated_bytes", "reserved_bytes", "device_used_bytes", "categories", "phases", "first_step"}
    assert expected | {"assumptions"} <= set(found)
    assert {"end", "peak"} <= set(found["phases"]["forward"])


def test_predict_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "model=25m", "hardware=cpu"]) == 0
    text = capsys.readouterr().out
    assert "backward peak" in text
    assert "GiB = 2^30 bytes" in text


def test_compare_json_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "1", ["parallel=ddp", "world_size=2", "optimizer.lr=1e-4"], error=0.25)
    write_run(tmp_path, "2", ["parallel=zero1", "world_size=2"])
    assert main(["compare", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["status"] for r in rows] == ["ok", "ok"]
    assert rows[0]["overrides"][0] == "parallel=ddp"
    assert rows[0]["allocated_error_percent"] == pytest.approx(25.0, abs=40)
    assert rows[0]["allocated_error_percent"] > rows[1]["allocated_error_percent"] == pytest.approx(0.0)
    assert Path(rows[1]["record"]).is_file()
    assert main(["compare", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    header = text.splitlines()[0]
    assert header.startswith("strategy")
    assert "optimizer.lr" in header  # it differs
    assert "optimizer.eps" not in header  # it does not
    assert "9.000 → 8.500" in text
    assert "maximum across all GPUs" in text


def test_compare_without_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_validate_finds_the_error_and_holds_it_to_the_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "1", ["parallel=single"])
    write_run(tmp_path, "2", ["parallel=ddp", "world_size=2"], error=0.5)
    write_run(tmp_path, "3", ["parallel=ddp", "world_size=2", "seed=2"], status="failed")
    assert main(["validate", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"] == 2
    assert set(found["allocated"]) == {"median", "p90", "worst", "strategies"}
    assert found["allocated"]["strategies"]["single"]["worst"] == 0.0
    assert found["allocated"]["worst"] == found["allocated"]["strategies"]["ddp"]["worst"] > 30.0
    assert found["states"]["worst"] == 0.0
    assert found["worst_points"][0]["run"].startswith("tiny ddp")
    assert main(["validate", str(tmp_path), "--tolerance-allocated", "5"]) == 1
    assert "beyond tolerance: allocated" in capsys.readouterr().out
    assert main(["validate", str(tmp_path), "--tolerance-allocated", "60", "--tolerance-states", "0"]) == 0


def test_validate_predicts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded prediction plays no part: only configuration and measurement do."""
    from lab.record import read_record

    path = write_run(tmp_path, "1", ["parallel=single"])
    record = read_record(path)
    assert record.prediction is not None
    wrong = replace(record.prediction, steady=replace(record.prediction.steady, allocated_bytes=10**15))
    write_record(path, replace(record, prediction=wrong))
    assert main(["validate", str(tmp_path), "--tolerance-allocated", "0"]) == 0
    capsys.readouterr()


def test_bundle_validates_like_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs", "1", ["parallel=ddp", "world_size=2"], error=0.5)
    bundle = tmp_path / "records.jsonl"
    assert main(["bundle", str(tmp_path / "runs"), "-o", str(bundle)]) == 0
    capsys.readouterr()
    results = []
    for path in (tmp_path / "runs", bundle):
        assert main(["validate", str(path), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["allocated"])
    assert results[0] == results[1]


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    for index in range(3):
        write_run(tmp_path, str(index), ["parallel=single", f"seed={index}"])
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "lab.cli", "compare", str(tmp_path), "--json"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_quantile_interpolates() -> None:
    assert quantile([3.0], 0.9) == 3.0
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([float(v) for v in range(11)], 0.9) == 9.0


def test_tables_align_numbers_to_the_right() -> None:
    rows = [["ddp", "1.0"], ["fsdp", "-12.5"]]
    assert text_table(["a", "b"], rows).splitlines() == ["a         b", "----  -----", "ddp     1.0", "fsdp  -12.5"]
    assert markdown_table(["a", "b"], rows).splitlines()[1] == "|---|---:|"


@pytest.mark.parametrize(
    ("overrides", "verdict"),
    [
        (["model=tiny"], "fits, "),
        (["model=7b", "parallel=ddp", "parallel.ddp.release_first_bucket=false"], "does not fit, "),
    ],
)
def test_predict_says_whether_it_fits(overrides: list[str], verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "hardware=h200", *overrides, "world_size=1", "train.micro_batch_size=2"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("capacity"))
    assert verdict in line
