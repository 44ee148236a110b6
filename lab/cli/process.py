"""One torchrun of the sweep driver: started with a clean environment, watched, and killed with all its children."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

GRACE_S = 20.0  # seconds between SIGTERM and SIGKILL: time for rank 0 to write its record
LINGER_S = 120.0  # seconds a process may live on after its record is complete (a hang at interpreter shutdown)
_LAUNCHER_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|MASTER_\w+|TORCHELASTIC_\w+"
    r"|TORCH_NCCL_ASYNC_ERROR_HANDLING|LAB_RUN_ID|LAB_TURN_FILE|LAB_SHARED_GPU)$"
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def clean_environment() -> dict[str, str]:
    """This environment without what an outer launcher put there: a point is a launch of its own."""
    return {k: v for k, v in os.environ.items() if not _LAUNCHER_VARIABLES.match(k)}


def torchrun_command(
    overrides: Sequence[str], processes: int, logs: Path | None = None, module: str = "lab.train"
) -> list[str]:
    """``torchrun --standalone`` for one run on this machine; with ``logs`` each rank's output goes there."""
    redirect = ["--log-dir", str(logs), "--redirects", "3"] if logs else []
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), *redirect, "-m", module, *overrides),
    ]


def threads() -> str:
    """OMP_NUM_THREADS of each rank: one, as torchrun has it for several processes, unless the user says otherwise.

    One for a single process too: step times then compare between strategies, and two threads waiting for
    each other on a busy machine made a step twenty times slower.
    """
    return os.environ.get("OMP_NUM_THREADS", "1")


class Launch:
    """A running torchrun in its own session, so that a Ctrl-C reaches the driver first and only."""

    def __init__(self, command: Sequence[str], run_id: str, logs: Path, extra: dict[str, str]) -> None:
        self.run_id = run_id
        self.started = time.monotonic()
        self._linger_since: float | None = None
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "torchrun.log").open("ab") as log:
            self._process = subprocess.Popen(
                list(command),
                env={**clean_environment(), **extra, "LAB_RUN_ID": run_id},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=functools.partial(_die_with_driver, os.getpid()),
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def restart_clock(self) -> None:
        """What went before was waiting."""
        self.started = time.monotonic()

    def poll(self, record_path: Path) -> bool:
        """True once everything of this run is gone. Kills what hangs on after its record is complete."""
        if self._process.poll() is not None:
            self._kill_strays()
            return True
        if record_path.is_file():
            self._linger_since = self._linger_since or time.monotonic()
            if time.monotonic() - self._linger_since > LINGER_S:
                self.stop(grace_s=0.0)
                return True
        return False

    def stop(self, grace_s: float = GRACE_S) -> None:
        """SIGTERM to torchrun (it passes it on to its workers), then SIGKILL to everything that is left."""
        tree = self._tree()
        if grace_s > 0:
            _signal(tree[:1], signal.SIGTERM)
            psutil.wait_procs(tree, timeout=grace_s)
        tree += [p for p in self._tree() if p not in tree]
        _signal(tree, signal.SIGKILL)
        self._process.wait()
        self._kill_strays()

    def _tree(self) -> list[psutil.Process]:
        """torchrun and its descendants. Workers have sessions of their own, so a process group is not enough."""
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _kill_strays(self) -> None:
        """Processes that lost their parent still carry this run's LAB_RUN_ID."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAB_RUN_ID") == self.run_id:
                    process.kill()
                    process.wait(timeout=5)
            except (psutil.Error, OSError):  # gone already, or somebody else's
                continue


def _die_with_driver(driver: int) -> None:
    """In the child: get SIGTERM when the driver (its process id) dies, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != driver:  # it died before the call: no signal will come
            os._exit(1)


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue
