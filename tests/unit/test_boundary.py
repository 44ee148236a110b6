"""Running out of memory: the simulated allocator under a limit, the largest batch, the verdicts, the command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab.analytic import predict
from lab.analytic.allocator import Allocator, OutOfMemory
from lab.analytic.boundary import (
    Boundary,
    Exhaustion,
    _largest,
    boundary,
    exhaustion,
    least_limit_bytes,
    replayed,
    with_micro_batch,
)
from lab.cli import sweep
from lab.cli.main import main
from lab.cli.points import Point
from lab.config import ConfigError, load
from lab.launch import limit_memory
from lab.record import RunRecord, write_record
from lab.report.boundary import BoundaryResult, BoundaryRun, Verdict, boundary_table, read_results, write_results
from lab.units import GIB, MIB
from lab.vocab import RunStatus, StepPhase

SMALL = ["hardware=h200", "model=tiny", "train.seq_len=1024", "train.steps=3"]


# -- the allocator -----------------------------------------------------------------------------------------------------


def test_a_refused_segment_frees_what_is_cached_and_is_asked_for_once_more() -> None:
    """Both pools and every stream give back; a segment with one live piece stays."""
    allocator = Allocator(limit_bytes=100 * MIB)
    small = allocator.malloc(1000)  # 2 MiB
    cached = [allocator.malloc(30 * MIB), allocator.malloc(20 * MIB, stream=1)]
    part, rest = allocator.malloc(5 * MIB), allocator.malloc(4 * MIB)  # one segment of 20 MiB
    for block in (small, *cached, rest):
        allocator.release(block)
    assert (allocator.reserved_bytes, allocator.num_retries) == (72 * MIB, 0)
    allocator.malloc(40 * MIB)
    assert (allocator.reserved_bytes, allocator.num_retries) == (60 * MIB, 1)
    allocator.release(part)


def test_the_limit_itself_is_allowed_and_2_mib_more_is_not() -> None:
    allocator = Allocator(limit_bytes=32 * MIB)
    allocator.malloc(30 * MIB)
    allocator.malloc(512)
    assert allocator.reserved_bytes == 32 * MIB
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(2 * MIB, event=7)
    assert (caught.value.event, caught.value.request_bytes, allocator.num_retries) == (7, 2 * MIB, 1)


def test_a_cached_block_of_another_stream_is_no_use_until_it_was_returned() -> None:
    allocator = Allocator(limit_bytes=50 * MIB)
    allocator.release(allocator.malloc(40 * MIB, stream=1))
    allocator.malloc(30 * MIB)
    assert (allocator.reserved_bytes, allocator.num_retries) == (30 * MIB, 1)


# -- prediction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.memory_limit_gib=0.5"],
        ["train.memory_limit_gib=1.4", "parallel=zero3", "world_size=2", "checkpointing=full"],
        ["train.memory_limit_gib=0.7", "parallel=fsdp", "world_size=2", "loss=chunked"],
    ],
)
def test_the_largest_batch_comes_through_and_the_next_does_not(overrides: list[str]) -> None:
    cfg = load([*SMALL, *overrides])
    found = boundary(cfg)
    limit = cfg.memory_limit_bytes
    assert limit == found.limit_bytes
    assert found.needed_bytes is not None
    assert found.margin_bytes is not None
    assert found.micro_batch_size >= 1
    assert found.needed_bytes <= limit < found.next_needed_bytes
    for batch, needed in ((0, found.needed_bytes), (1, found.next_needed_bytes)):
        runs = replayed(with_micro_batch(cfg, found.micro_batch_size + batch))
        assert exhaustion(runs, needed) is None
        assert exhaustion(runs, needed - 2 * MIB) is not None
        prediction = predict(with_micro_batch(cfg, found.micro_batch_size + batch))
        assert prediction.fits is (batch == 0)
        refused = [a for a in prediction.assumptions if a.startswith("out of memory in")]
        assert len(refused) == batch
        if batch == 0:
            assert max(prediction.steady.reserved_bytes, prediction.first_step.reserved_bytes) <= limit
    assert found.next_fails.request_bytes > 0


def test_where_the_build_alone_is_too_much_no_batch_fits() -> None:
    found = boundary(load([*SMALL, "train.memory_limit_gib=0.005"]))
    assert (found.micro_batch_size, found.needed_bytes, found.margin_bytes) == (0, None, None)
    assert (found.next_fails.step, found.next_fails.phase) == (None, StepPhase.BUILD)


def test_a_limit_that_never_bites_changes_nothing() -> None:
    cfg = load([*SMALL, "train.micro_batch_size=4"])
    wide = predict(replace(cfg, train=replace(cfg.train, memory_limit_gib=100.0)))
    assert (wide.steady, wide.fits) == (predict(cfg).steady, True)


def test_under_a_limit_that_bites_less_is_reserved() -> None:
    """Between what it needs and what it would reserve, cached segments go back to the driver."""
    cfg = load([*SMALL, "train.micro_batch_size=16", "checkpointing=full"])
    free = predict(cfg).steady.reserved_bytes
    need = least_limit_bytes(replayed(cfg), free)
    assert need < free
    tight = predict(replace(cfg, train=replace(cfg.train, memory_limit_gib=need / GIB)))
    assert tight.fits
    assert tight.steady.reserved_bytes <= need


def test_without_a_limit_the_gpu_is_the_limit() -> None:
    cfg = load(["hardware=h200", "model=7b", "model.num_layers=4", "train.seq_len=32768", "train.steps=2"])
    found = boundary(cfg)
    assert found.limit_bytes < cfg.hardware.capacity_bytes
    assert predict(with_micro_batch(cfg, found.micro_batch_size)).fits
    assert not predict(with_micro_batch(cfg, found.micro_batch_size + 1)).fits


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 8, 100])
def test_search(largest: int) -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n <= largest

    assert _largest(fits) == largest
    assert 0 not in asked
    assert {largest or 1, largest + 1} <= set(asked)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["hardware=cpu", "train.memory_limit_gib=4"], "needs a GPU"),
        (["hardware=h200", "train.memory_limit_gib=0"], "positive"),
        (["hardware=h200", "train.memory_limit_gib=200"], "at most the 140.4 GiB"),
    ],
)
def test_a_limit_that_cannot_be(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        load(overrides)


@pytest.mark.parametrize("overrides", [["hardware=cpu"], ["hardware=unknown_gpu"]])
def test_no_limit_to_be_had(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["boundary", *overrides]) == 2
    assert capsys.readouterr().err.startswith("lab: hardware=")


@pytest.mark.parametrize("total", [150_109_880_320, 85_031_714_816, 8_589_934_592])
def test_the_fraction_gives_the_limit_to_the_byte(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """static_cast<size_t>(fraction * total) in CUDACachingAllocator.cpp, setMemoryFraction."""
    fractions: list[float] = []
    properties = type("Properties", (), {"total_memory": total})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, _: fractions.append(f))
    for gib in (0.7, 4.0, 5.3, 7.999):
        cfg = load([*SMALL, f"train.memory_limit_gib={gib}"])
        limit_memory(cfg, torch.device("cuda", 0))
        assert int(fractions[-1] * total) == cfg.memory_limit_bytes
    limit_memory(load(SMALL), torch.device("cuda", 0))
    assert len(fractions) == 4
    with pytest.raises(ConfigError, match="less than the GPU's"):
        limit_memory(load([*SMALL, "train.memory_limit_gib=140"]), torch.device("cuda", 0))


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "verdict"),
    [
        (RunStatus.OK, RunStatus.OOM, Verdict.EXACT),
        (RunStatus.OK, RunStatus.OK, Verdict.TOO_LOW),
        (RunStatus.OOM, RunStatus.OOM, Verdict.TOO_HIGH),
        (RunStatus.OOM, RunStatus.FAILED, Verdict.TOO_HIGH),
        (RunStatus.OK, RunStatus.FAILED, Verdict.OPEN),
        (RunStatus.TIMEOUT, RunStatus.OOM, Verdict.OPEN),
        (None, None, Verdict.OPEN),
    ],
)
def test_verdicts(good: RunStatus | None, bad: RunStatus | None, verdict: Verdict, tmp_path: Path) -> None:
    found = Boundary(GIB, 3, GIB - 20 * MIB, GIB + 2 * MIB, Exhaustion(0, 1, StepPhase.BACKWARD, 512))
    runs = [BoundaryRun(found.micro_batch_size + i, s) for i, s in enumerate((good, bad)) if s is not None]
    result = BoundaryResult(["model=25m"], "model=25m", found, runs)
    assert result.verdict is verdict
    write_results(tmp_path / "b.json", [result, result])
    assert read_results(tmp_path / "b.json") == [result, result]
    assert verdict.value in boundary_table([result]) or not runs
    assert not result.tight
    small = replace(found, needed_bytes=found.limit_bytes - 10 * MIB)
    assert replace(result, boundary=small).tight
    assert "| 10* |" in boundary_table([replace(result, boundary=small)])


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_runs_both_sizes_and_gpus_are_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One configuration is exact, one runs one sequence more than predicted, one runs out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    open_now: list[list[str]] = []
    crowd: list[int] = []
    fails_from = {"0.3": 0, "0.4": 1, "0.5": -1}  # limit -> sequences beyond predicted + 1 at which memory runs out
    largest = {gib: boundary(load([*SMALL, f"train.memory_limit_gib={gib}"])).micro_batch_size for gib in fails_from}

    class FakeLaunch:
        seconds = 0.0

        def __init__(self, command: Sequence[str], run_id: str, logs: Path, extra: dict[str, str]) -> None:
            self.polls, self.folder = 0, logs.parent
            given = dict(o.split("=", 1) for o in command if "=" in o)
            gib, batch = given["train.memory_limit_gib"], int(given["train.micro_batch_size"])
            self.gpus = extra["CUDA_VISIBLE_DEVICES"].split(",")
            open_now.append(self.gpus)
            crowd.append(max(Counter(g for gpus in open_now for g in gpus).values()))
            ok = batch < largest[gib] + 1 + fails_from[gib]
            record = RunRecord(
                run_id=run_id,
                name="run",
                status=RunStatus.OK if ok else RunStatus.OOM,
                started_at="",
                finished_at="",
                command=[],
                config={},
                environment={"versions": {"torch": "2.11.0"}},
                oom=None if ok else {"step": 1, "phase": "backward", "reserved_bytes": 5},
            )
            write_record(self.folder / "record.json", record)

        def poll(self, record_path: Path) -> bool:
            self.polls += 1
            if self.polls == 3:
                open_now.remove(self.gpus)
            return self.polls >= 3

    monkeypatch.setattr(sweep, "Launch", FakeLaunch)
    output = tmp_path / "boundary.json"
    arguments = [*SMALL, "train.memory_limit_gib=0.3,0.4,0.5", f"launch.output_dir={tmp_path}"]
    options = ["--measure", "--jobs", "5", "--share", "2", "-o", str(output)]
    assert main(["boundary", *arguments, "-o", str(output)]) == 0
    assert [r.verdict for r in read_results(output)] == [Verdict.OPEN] * 3
    assert main(["boundary", "--predicted", str(output), *options]) == 1  # one predicted size ran out
    assert max(crowd) == 2
    assert len(crowd) == 6
    results = read_results(output)
    assert [r.verdict for r in results] == [Verdict.EXACT, Verdict.TOO_LOW, Verdict.TOO_HIGH]
    assert [r.micro_batch_size for r in results[0].runs] == [largest["0.3"], largest["0.3"] + 1]
    assert results[0].runs[1].phase == "backward"
    before = output.read_text()
    assert main(["boundary", "--predicted", str(output), *options]) == 1
    assert (output.read_text(), len(crowd)) == (before, 6)  # nothing was left to run
    part = read_results(output)
    part[0].runs.pop()
    part[1].runs[0].status = RunStatus.FAILED
    write_results(output, part)
    for record in tmp_path.glob("run/*/record.json"):  # another machine, which has none of the records
        record.unlink()
    assert main(["boundary", "--predicted", str(output), *options]) == 1
    assert len(crowd) == 8
    assert [[(r.micro_batch_size, r.status) for r in x.runs] for x in read_results(output)] == [
        [(r.micro_batch_size, r.status) for r in x.runs] for x in results
    ]
    capsys.readouterr()
    assert main(["boundary", "--table", str(output)]) == 0
    table = capsys.readouterr().out
    assert "3 configurations: 1 exact, 1 too low, 1 too high (0 of these with a margin marked *)" in table
    assert "| ok | oom, 1 backward | exact |" in table
    assert main(["boundary", "--table", str(output), "--json"]) == 0
    assert [r["verdict"] for r in json.loads(capsys.readouterr().out)] == ["exact", "too low", "too high"]
    assert main(["boundary", *arguments, "--measure", "--share", "0"]) == 2
    assert main(["boundary", *arguments, "--predicted", str(output)]) == 2
    assert main(["boundary", "--predicted", str(tmp_path / "none.json")]) == 2
    assert "--share=0: 1 or more" in capsys.readouterr().err


def test_predict_says_how_much_of_the_limit_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    for gib, text in (("1", "fits, "), ("0.05", "does not fit, ")):
        assert main(["predict", *SMALL, f"train.memory_limit_gib={gib}"]) == 0
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  limit")]
        assert text in line


def test_an_interrupted_measurement_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lab.cli import boundary as command

    class FakeSweep:
        def __init__(self, points: Sequence[Point], jobs: int, share: int) -> None:
            statuses = (RunStatus.OK, RunStatus.INTERRUPTED)
            self.recorded = {
                p.identity: ("", RunRecord(f"id{i}", "run", s, "", "", [], {}, {}))
                for i, (p, s) in enumerate(zip(points, statuses, strict=True))
            }

        def run(self) -> int:
            return 130

    monkeypatch.setattr(command, "Sweep", FakeSweep)
    output = tmp_path / "b.json"
    assert main(["boundary", *SMALL, "train.memory_limit_gib=0.3", "--measure", "-o", str(output)]) == 130
    (result,) = read_results(output)
    assert [(r.run_id, r.status) for r in result.runs] == [("id0", RunStatus.OK)]
    assert result.verdict is Verdict.OPEN
