"""The sweep driver against runs that go wrong in every way, played by ``fake_point``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from lab.cli import process, sweep
from lab.cli.main import main
from lab.record import RunRecord
from lab.track.bundle import read_records
from lab.vocab import RunStatus
from tests.distributed import fake_point

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]


def fake_command(overrides: Sequence[str], processes: int, logs: Path | None = None) -> list[str]:
    return [sys.executable, "-m", "tests.distributed.fake_point", *overrides]


@pytest.fixture(autouse=True)
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "torchrun_command", fake_command)
    monkeypatch.setattr(process, "LINGER_S", 0.5)
    monkeypatch.setattr(process.Launch.stop, "__defaults__", (0.5,))  # the grace between SIGTERM and SIGKILL
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "7")  # an outer launcher's: must not reach the points


def run_sweep(tmp_path: Path, seeds: Sequence[int], *arguments: str) -> tuple[int, dict[int, list[RunRecord]]]:
    """(exit code, records by seed)."""
    given = [f"seed={','.join(map(str, seeds))}", f"launch.output_dir={tmp_path}", "name=study", "hardware=cpu"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = main(["sweep", *given, *arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    found: dict[int, list[RunRecord]] = {}
    for _, record in read_records([tmp_path]):
        found.setdefault(int(record.config.get("seed", -1)), []).append(record)
    return code, found


def strays(run_id: str) -> list[psutil.Process]:
    """Living processes of a run: they carry its LAB_RUN_ID."""
    found = psutil.process_iter(["environ"])
    return [p for p in found if (p.info["environ"] or {}).get("LAB_RUN_ID") == run_id]


def test_every_end_of_a_point_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = [fake_point.OOM, fake_point.KILLED, fake_point.RAISES, fake_point.SIGTERM_OF_A_PEER]
    seeds += [fake_point.EXIT_1_AFTER_RECORD, fake_point.OK]
    code, found = run_sweep(tmp_path, seeds)
    assert code == 1
    status = {seed: records[0].status for seed, records in found.items()}
    assert status == {
        fake_point.OOM: RunStatus.OOM,
        fake_point.KILLED: RunStatus.FAILED,
        fake_point.RAISES: RunStatus.FAILED,
        fake_point.SIGTERM_OF_A_PEER: RunStatus.FAILED,
        fake_point.EXIT_1_AFTER_RECORD: RunStatus.OK,
        fake_point.OK: RunStatus.OK,
    }
    oom = found[fake_point.OOM][0]
    assert oom.prediction is not None
    assert oom.oom is not None
    assert oom.oom["allocated_bytes"] == 4
    assert [len(r.steps) for r in oom.ranks] == [1]
    assert found[fake_point.RAISES][0].error == "ValueError: on purpose"
    text = capsys.readouterr().out
    assert "[6/6]" in text
    assert "strategy" in text
    assert f"records: {tmp_path / 'study'}" in text
    assert "ValueError: on purpose" in text


def test_a_time_limit_kills_the_whole_tree(tmp_path: Path) -> None:
    started = time.monotonic()
    code, found = run_sweep(tmp_path, [fake_point.HANGS, fake_point.OK], "launch.timeout_s=8")
    assert time.monotonic() - started < 60
    assert code == 1
    hung = found[fake_point.HANGS][0]
    assert hung.status is RunStatus.TIMEOUT
    assert hung.error == "no end after 8 s (launch.timeout_s)"
    assert hung.prediction is not None
    assert found[fake_point.OK][0].status is RunStatus.OK
    assert strays(hung.run_id) == []


def test_a_run_that_hangs_after_its_record_is_ok(tmp_path: Path) -> None:
    code, found = run_sweep(tmp_path, [fake_point.LINGERS])
    assert code == 0
    assert found[fake_point.LINGERS][0].status is RunStatus.OK
    assert strays(found[fake_point.LINGERS][0].run_id) == []


def test_finished_points_are_skipped_and_failed_ones_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = [fake_point.OK, fake_point.OOM, fake_point.RAISES]
    run_sweep(tmp_path, seeds)
    capsys.readouterr()
    code, found = run_sweep(tmp_path, [*seeds, 20])
    assert {seed: len(records) for seed, records in found.items()} == {**dict.fromkeys(seeds, 1), 20: 1}
    assert code == 1  # the failed point still counts
    assert "4 points, 3 already recorded, 1 of them failed: --retry-failed" in capsys.readouterr().out
    _, found = run_sweep(tmp_path, seeds, "--retry-failed")
    assert {seed: len(found[seed]) for seed in seeds} == {fake_point.OK: 1, fake_point.OOM: 1, fake_point.RAISES: 2}


def test_invalid_points_are_recorded_once_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    for _ in range(2):
        code, found = run_sweep(tmp_path, [fake_point.OK], "parallel=single,ddp", "world_size=2")
        assert code == 0
        (invalid,) = found[-1]
        assert invalid.status is RunStatus.INVALID
        assert invalid.error == "world_size=2: parallel=single is one process; use parallel=ddp or start one process"
        assert "parallel=single" in invalid.config["overrides"]
        assert invalid.config["parallel"] == {"strategy": "single"}  # for the table
        assert [r.status for r in found[fake_point.OK]] == [RunStatus.OK]


def test_jobs_run_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first point ends when it sees the record of another, which one after the other it never would."""
    code, found = run_sweep(tmp_path, [fake_point.WAITS, 20, 21], "--jobs", "2", "launch.timeout_s=60")
    assert code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line[:5] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"]
    assert set(found) == {fake_point.WAITS, 20, 21}


def test_jobs_on_gpus_have_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two points of two GPUs and one of one, on three GPUs: never one GPU in two points."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    seen: list[tuple[str, set[str]]] = []
    open_now: dict[str, set[str]] = {}

    class FakeLaunch:
        def __init__(self, command: Sequence[str], run_id: str, logs: Path, extra: dict[str, str]) -> None:
            self.run_id, self.polls, self.seconds = run_id, 0, 0.0
            mine = set(extra["CUDA_VISIBLE_DEVICES"].split(","))
            assert not any(mine & other for other in open_now.values())
            open_now[run_id] = mine
            seen.append((run_id, mine))

        def poll(self, record_path: Path) -> bool:
            self.polls += 1
            if self.polls > 2:
                open_now.pop(self.run_id)
            return self.polls > 2

    monkeypatch.setattr(sweep, "Launch", FakeLaunch)
    points = ["parallel=ddp", "world_size=2,1", "seed=1,2", "hardware=h200"]
    main(["sweep", *points, f"launch.output_dir={tmp_path}", "--jobs", "3"])
    assert sorted(len(gpus) for _, gpus in seen) == [1, 1, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_records_and_no_processes(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys; from lab.cli import process, sweep; from lab.cli.main import main\n"
        "from tests.distributed.test_sweep_driver import fake_command\n"
        "sweep.torchrun_command = fake_command; process.Launch.stop.__defaults__ = (0.5,)\n"
        f"sys.exit(main(['sweep', 'seed={fake_point.HANGS},20', 'name=study', 'launch.output_dir={tmp_path}']))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("study/*/hangs")) and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=30)
    assert driver.returncode == 130
    (record,) = [r for _, r in read_records([tmp_path])]
    assert (record.status, record.error) == (RunStatus.INTERRUPTED, "interrupted by Ctrl-C or SIGTERM")
    assert len(record.ranks[0].steps) == 1
    assert "interrupted" in output
    assert strays(record.run_id) == []


def test_a_killed_driver_takes_its_run_along(tmp_path: Path) -> None:
    code = (
        "from lab.cli import sweep; from lab.cli.main import main\n"
        "from tests.distributed.test_sweep_driver import fake_command\n"
        "sweep.torchrun_command = lambda *a: ['sleep', '600']\n"
        f"main(['sweep', 'seed=1', 'name=study', 'launch.output_dir={tmp_path}'])"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (running := psutil.Process(driver.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(running) == 1
    psutil.wait_procs(running, timeout=5)
    assert not running[0].is_running()
