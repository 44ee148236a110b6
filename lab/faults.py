"""How a run ends when it does not end well: out of memory, an exception, Ctrl-C, SIGTERM, a dead peer.

Rank 0 may sit in a collective that never returns when another rank dies, and Python runs signal handlers
on the main thread only. So signals wake a thread (``signal.set_wakeup_fd``), which writes the record from
what is known and ends the process. torchrun sends SIGTERM to the ranks that are left.

Files of the run folder tell the ranks apart: ``oom_rank_<r>.json`` and ``failed_rank_<r>.json`` say who
went first, ``interrupted_rank_<r>.json`` who was told to stop.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

import psutil
import torch

from lab.config import ConfigError
from lab.measure import Meter
from lab.record import write_json_atomic
from lab.run_state import RunState
from lab.vocab import RunStatus

POLL_S = 2.0  # how often rank 0 looks for faults on other nodes, whose torchrun cannot tell it
PEER_GRACE_S = 10.0
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_OOM_TEXT = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator, the CPU's, Python's, and libraries (NCCL) that pass CUDA's text on."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OOM_TEXT.search(str(error)) is not None


def one_line(error: BaseException, limit: int = 500) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit] if text else type(error).__name__


def requested_bytes(message: str) -> int | None:
    """What an out-of-memory message says was asked for (CUDA rounds it to two digits)."""
    if found := re.search(r"[Tt]ried to allocate ([\d.]+) ?(B|KiB|MiB|GiB|bytes)", message):
        return round(float(found.group(1)) * _UNITS.get(found.group(2), 1))
    return None


def oom_moment(meter: Meter | None, error: BaseException) -> dict[str, Any]:
    """Phase, step and bytes. The counters are read after the stack was unwound to here: what the dying
    frames held is still alive through the exception's traceback."""
    message = " ".join(str(error).split())
    moment: dict[str, Any] = {"error": one_line(error), "message": message[:2000]}
    if meter is not None:
        moment["phase"] = meter.current_phase.value if meter.current_phase else None
        moment["step"] = meter.current_step
        if (reading := meter.now()) is not None:
            moment["allocated_bytes"] = reading.end_allocated_bytes
            moment["reserved_bytes"] = reading.end_reserved_bytes
            moment["device_used_bytes"] = reading.device_used_bytes
        if (step := meter.unfinished_step) is not None and meter.current_phase in step.phases:
            moment["peak_allocated_bytes"] = step.phases[meter.current_phase].peak_allocated_bytes
    moment["requested_bytes"] = requested_bytes(message)
    return moment


def words(state: RunState, kind: str) -> list[dict[str, Any]]:
    """What ranks left in the run folder under ``kind``, first come first."""
    return state.folder.read_words(kind) if state.folder is not None else []


def verdict(state: RunState, own_error: str, interrupted: bool = False) -> tuple[RunStatus, str, dict[str, Any] | None]:
    """What the whole run died of: the first out of memory, else the first failure, else the signal."""
    # Looked at before the files are read: whoever is gone by now has left its word, if it could.
    dead = [rank for rank, pid in state.peers.items() if not _alive(pid)]
    if found := words(state, "oom"):
        return RunStatus.OOM, f"rank {found[0]['rank']}: {found[0]['error']}", found[0]
    # An error of this rank may only be the loss of a peer; the peer's own comes first then.
    failed, told = words(state, "failed"), words(state, "interrupted")
    if failed and failed[0]["rank"] != state.rank:
        return RunStatus.FAILED, f"rank {failed[0]['rank']}: {failed[0]['error']}", None
    spoken = {entry["rank"] for entry in (*failed, *told)}
    if killed := [rank for rank in dead if rank not in spoken]:
        return RunStatus.FAILED, f"rank {killed[0]} died without a word (killed?); rank {state.rank}: {own_error}", None
    if interrupted or any(entry["rank"] != state.rank for entry in told):
        return RunStatus.INTERRUPTED, own_error, None
    return RunStatus.FAILED, f"rank {state.rank}: {own_error}", None


class FaultHandler:
    """One per process, made on the main thread before anything long runs."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self._disarmed = False
        self._ending = threading.Lock()  # whoever takes it ends the process; never released
        self._signals, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the byte in the pipe is what counts
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._polls = state.rank == 0 and state.cfg.world_size > local_ranks
        threading.Thread(target=self._watch, name="faults", daemon=True).start()

    def disarm(self) -> None:
        """The run ended well: from now on signals do what they do by default, and errors are plain errors."""
        self._ending.acquire()
        self._disarmed = True
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def fail(self, error: BaseException) -> NoReturn:
        """An exception reached the main thread: leave word of it, on rank 0 the record, and end the process."""
        if self._disarmed:
            raise error
        self._ending.acquire()
        text = one_line(error)
        if is_out_of_memory(error):
            self._leave("oom", oom_moment(self.state.meter, error))
            print(f"rank {self.state.rank}: out of memory: {text}", file=sys.stderr)
        else:
            self._leave("failed", {"error": text})
            if not isinstance(error, ConfigError):
                traceback.print_exception(error)
            elif self.state.rank == 0:
                print(f"lab: {error}", file=sys.stderr)
        self._end(text, 2 if isinstance(error, ConfigError) else 1)

    def _watch(self) -> None:
        seen_since = 0.0
        while True:
            ready, _, _ = select.select([self._signals], [], [], POLL_S if self._polls else None)
            if ready:
                number = os.read(self._signals, 1)[0]
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                self._ending.acquire()
                name = signal.Signals(number).name
                self._leave("interrupted", {"error": name})
                self._end(f"interrupted by {name}", 128 + number, interrupted=True)
            elif words(self.state, "oom") or words(self.state, "failed"):
                seen_since += POLL_S
                if seen_since >= PEER_GRACE_S:
                    self._ending.acquire()
                    self._end("another node's rank failed", 1)

    def _end(self, own_error: str, code: int, interrupted: bool = False) -> NoReturn:
        try:
            if self.state.rank == 0 and self.state.folder is not None:
                status, error, oom = verdict(self.state, own_error, interrupted)
                record = self.state.record(status, self.state.known_ranks(), error, oom)
                self.state.finish(record, limited=True)
                print(f"{status.value}: {error}\nrecord: {self.state.folder.record_path}", file=sys.stderr)
        except BaseException as error:  # the process ends all the same
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # collectives may hang in every destructor

    def _leave(self, kind: str, content: dict[str, Any]) -> None:
        """Say what happened here, in a file that rank 0 finds."""
        if self.state.folder is not None:
            rank = self.state.rank
            write_json_atomic(self.state.folder.path / f"{kind}_rank_{rank}.json", {"rank": rank, **content})


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
