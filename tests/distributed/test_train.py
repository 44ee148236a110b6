"""lab.train under torchrun, end to end: a good run, faults on a rank, signals, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lab.record import RunRecord, read_record
from lab.vocab import STEP_PHASES, MemoryCategory, RunStatus, StepPhase
from tests.distributed.small_run import ENVIRONMENT, small_run

pytestmark = pytest.mark.distributed
FAULTY = Path(__file__).with_name("faulty_train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    return small_run(tmp_path, steps=4)


def the_record(folder: Path) -> RunRecord:
    paths = list(folder.glob("outputs/*/*/record.json"))
    assert len(paths) == 1, paths
    return read_record(paths[0])


def test_zero3_leaves_one_complete_record(tmp_path: Path, small: list[str]) -> None:
    command = [*TORCHRUN, "-m", "lab.train", "parallel=zero3", "precision=bf16_mixed", *small]
    command += ["parallel.zero.reduce_bucket_size=20000"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    record = the_record(tmp_path)
    assert record.status is RunStatus.OK
    assert [r.rank for r in record.ranks] == [0, 1]
    for rank in record.ranks:
        assert [s.step for s in rank.steps] == [0, 1, 2, 3]
        assert all(s.loss is not None and 3 < s.loss < 9 and s.seconds > 0 for s in rank.steps)
        assert set(rank.steps[-1].phases) == set(STEP_PHASES)
        ledger = rank.steps[-1].phases[StepPhase.BACKWARD].ledger
        assert ledger is not None
        assert ledger[MemoryCategory.COMM_BUFFERS] == 2 * 20_000
        assert ledger[MemoryCategory.GRADIENTS] > 0
    first, last = ([r.steps[i].loss for r in record.ranks] for i in (0, -1))
    assert record.metrics.first_loss == pytest.approx(sum(x for x in first if x) / 2)
    assert record.metrics.last_loss == pytest.approx(sum(x for x in last if x) / 2)
    assert record.metrics.last_loss < record.metrics.first_loss
    assert record.metrics.tokens_per_second == pytest.approx(2 * 32 / (record.metrics.step_seconds or 0))
    assert record.command[:2] == ["-m", "lab.train"]
    folder = next(tmp_path.glob("outputs/run/*"))
    assert (folder / "prediction.json").stat().st_mtime_ns <= (folder / "rank_0.jsonl").stat().st_mtime_ns
    assert [len((folder / f"rank_{r}.jsonl").read_text().splitlines()) for r in (0, 1)] == [4, 4]
    assert done.stdout.count("zero3") == 1, "one table, from rank 0"
    assert done.stderr.count("step 4/4") == 1, "progress from rank 0 only"


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        ("oom", RunStatus.OOM, "rank 1: OutOfMemoryError: CUDA out of memory"),
        ("error", RunStatus.FAILED, "rank 1: ValueError: on purpose"),
        ("killed", RunStatus.FAILED, "rank 1 died without a word"),
    ],
)
def test_fault_of_another_rank(tmp_path: Path, small: list[str], fault: str, status: RunStatus, error: str) -> None:
    command = [*TORCHRUN, str(FAULTY), fault, "parallel=ddp", *small]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    record = the_record(tmp_path)
    assert (record.status, (record.error or "")[: len(error)]) == (status, error)
    assert [len(r.steps) for r in record.ranks] == [2, 2], "the finished steps of both ranks"
    assert all(s.loss is not None for s in record.ranks[0].steps)
    assert record.prediction is not None
    if fault == "oom":
        assert record.oom is not None
        assert (record.oom["rank"], record.oom["phase"], record.oom["step"]) == (1, "forward", 2)
        assert record.oom["requested_bytes"] == 2 << 30
        # Weights, moments and DDP's bucket of the small model at least.
        assert record.oom["allocated_bytes"] > 5 * 4 * 2048 * 128
        assert record.oom["peak_allocated_bytes"] >= record.oom["allocated_bytes"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_rank_0_waits_in_a_collective(tmp_path: Path, small: list[str], number: signal.Signals) -> None:
    command = [*TORCHRUN, str(FAULTY), "hang", "parallel=ddp", *small]
    with (tmp_path / "log").open("wb") as log:
        launched = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 150
        while sum(len(p.read_text().splitlines()) for p in tmp_path.glob("outputs/*/*/rank_*.jsonl")) < 4:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert launched.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        ranks = psutil.Process(launched.pid).children(recursive=True)
        launched.send_signal(number)
        launched.wait(timeout=25)
    finally:
        launched.kill()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive, "no stray processes"
    record = the_record(tmp_path)
    assert record.status is RunStatus.INTERRUPTED
    assert record.error == f"interrupted by {number.name}"
    assert [len(r.steps) for r in record.ranks] == [2, 2]
    assert record.ranks[0].build is not None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.num_heads=3"], "lab: model.num_heads=3: must divide model.hidden_size=128"),
        (["world_size=2", "parallel=zero3"], "lab: world_size=2: start it with torchrun"),
        (["train.seq_len=2000", "train.micro_batch_size=99"], "lab: data=text: the corpus makes"),
    ],
)
def test_refusal_is_one_line_and_nothing_else(
    tmp_path: Path, small: list[str], overrides: list[str], line: str
) -> None:
    named = {o.partition("=")[0] for o in overrides}
    command = [sys.executable, "-m", "lab.train", *overrides, *(o for o in small if o.partition("=")[0] not in named)]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "WORLD_SIZE"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("outputs/run"))


def test_measure_off_still_knows_losses_and_time(tmp_path: Path, small: list[str]) -> None:
    command = [sys.executable, "-m", "lab.train", *small, "measure=off", "precision=fp32"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    record = the_record(tmp_path)
    assert record.ranks[0].source == "off"
    assert [len(s.phases) for s in record.ranks[0].steps] == [0] * 4
    assert record.metrics.step_seconds is not None
    assert record.metrics.last_loss == record.ranks[0].steps[-1].loss
    assert json.loads((next(tmp_path.glob("outputs/run/*")) / "record.json").read_text())["residuals"] == []
