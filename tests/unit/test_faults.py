"""What a run died of, told from the words that its ranks left, and what an error says of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.config import load
from lab.faults import is_out_of_memory, one_line, requested_bytes, verdict
from lab.record import write_json_atomic
from lab.run_state import RunState
from lab.track import RunFolder
from lab.vocab import RunStatus


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    cfg = load(["hardware=cpu", "parallel=ddp", "world_size=3", f"launch.output_dir={tmp_path}"])
    return RunState(cfg, [], rank=0, folder=RunFolder.create(cfg, "run-1"), peers={1: os.getpid(), 2: os.getpid()})


def leave(state: RunState, kind: str, rank: int, written_at: float, **content: Any) -> None:
    assert state.folder is not None
    path = state.folder.path / f"{kind}_rank_{rank}.json"
    write_json_atomic(path, {"rank": rank, "error": f"{kind} of {rank}", **content})
    os.utime(path, (written_at, written_at))


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_out_of_memory_anywhere_wins(state: RunState) -> None:
    leave(state, "failed", 0, 1.0)
    leave(state, "oom", 2, 3.0)
    leave(state, "oom", 1, 2.0, step=4)
    status, error, oom = verdict(state, "Connection closed by peer", interrupted=True)
    assert (status, error) == (RunStatus.OOM, "rank 1: oom of 1")
    assert oom is not None
    assert oom["step"] == 4


def test_the_first_failure_is_the_cause(state: RunState) -> None:
    leave(state, "failed", 2, 1.0)
    leave(state, "failed", 0, 2.0)  # lost its peer
    assert verdict(state, "Connection closed by peer")[:2] == (RunStatus.FAILED, "rank 2: failed of 2")


def test_own_failure(state: RunState) -> None:
    leave(state, "failed", 0, 1.0)
    leave(state, "failed", 2, 2.0)
    assert verdict(state, "ValueError: boom") == (RunStatus.FAILED, "rank 0: ValueError: boom", None)


def test_a_signal_to_everyone_is_an_interruption(state: RunState, dead_pid: int) -> None:
    state.peers[1] = dead_pid  # it was told to stop and did
    leave(state, "interrupted", 1, 1.0)
    assert verdict(state, "interrupted by SIGTERM", interrupted=True)[0] is RunStatus.INTERRUPTED
    assert verdict(state, "Connection closed by peer")[0] is RunStatus.INTERRUPTED


def test_a_peer_that_died_without_a_word_was_killed(state: RunState, dead_pid: int) -> None:
    state.peers[2] = dead_pid
    for interrupted in (True, False):
        status, error, _ = verdict(state, "SIGTERM", interrupted)
        assert status is RunStatus.FAILED
        assert "rank 2 died without a word" in error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_cpu_allocator_refusal_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert requested_bytes(str(caught.value)) == 1 << 62


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has", 5 << 29),
        ("Tried to allocate 512.00 MiB", 512 << 20),
        ("you tried to allocate 4096 bytes. Error code 12", 4096),
        ("something else", None),
    ],
)
def test_requested_bytes(message: str, expected: int | None) -> None:
    assert requested_bytes(message) == expected


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(one_line(ValueError("x" * 1000))) == 500
