"""A record for a run that left none: killed, out of memory or out of time before it could write one."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lab.compare import residuals, skip_notes
from lab.config import RunConfig
from lab.config import to_json as config_to_json
from lab.record import RankMeasurement, RunRecord
from lab.track.environment import environment
from lab.track.folder import RunFolder
from lab.vocab import RunStatus

_OOM_TEXT = re.compile(r"OutOfMemoryError|CUDA out of memory|out of memory\. Tried to allocate", re.IGNORECASE)
# A line of a Python traceback that names the exception, e.g. "ValueError: no such file".
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:? ?)?(?P<text>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b.*)$")

_REFUSED = "lab: "  # how lab.train and the lab command begin the one line about a wrong configuration
# torchrun's report of the first worker that died, e.g. "exitcode  : -9 (pid: 77)".
_SIGNAL = re.compile(r"exitcode\s*:\s*-(\d+)")


def fault_of(folder: RunFolder) -> tuple[RunStatus, str | None, dict[str, Any] | None]:
    """(status, one-line error, out-of-memory moment) from what the ranks of a dead run left behind.

    Out of memory if a rank left word of it or its log says so; invalid if the ranks refused the
    configuration on this machine; otherwise failed.
    """
    if oom := folder.read_words("oom"):
        return RunStatus.OOM, f"rank {oom[0]['rank']}: {oom[0].get('error') or 'out of memory'}", oom[0]
    if failed := folder.read_words("failed"):
        return RunStatus.FAILED, f"rank {failed[0]['rank']}: {failed[0].get('error')}", None
    error = last_error_line(folder.logs_path)
    if error is not None and _OOM_TEXT.search(error):
        return RunStatus.OOM, error, None
    if error is not None and error.startswith(_REFUSED):
        return RunStatus.INVALID, error.removeprefix(_REFUSED), None
    return RunStatus.FAILED, error, None


def last_error_line(logs: Path) -> str | None:
    """The most telling line: a rank's last exception, else the signal that killed one, else a rank's last line."""
    # The rank that died first is the cause; the others only lost their peer.
    by_time = sorted(logs.rglob("stderr.log"), key=lambda p: (p.stat().st_mtime_ns, str(p)))
    texts = [[line.strip() for line in _text(path).splitlines()] for path in by_time]
    for lines in texts:
        for line in reversed(lines):
            if line.startswith(_REFUSED):
                return line[:500]
            if found := _EXCEPTION.match(line):
                return found.group("text")[:500]
    if killed := _SIGNAL.search(_text(logs / "torchrun.log")):
        return f"a rank was killed by signal {killed.group(1)}"
    return next((line[:500] for lines in texts for line in reversed(lines) if line), None)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def recover_record(
    folder: RunFolder,
    cfg: RunConfig,
    command: Sequence[str],
    started_at: str,
    status: RunStatus | None = None,
    error: str | None = None,
) -> RunRecord:
    """Build (not write) the record of a run that ended without one.

    ``status`` and ``error`` are what the starter knows (timeout, interrupted, killed by signal 9);
    an out-of-memory fault found in the folder wins over them. Finished steps are read back.
    """
    found_status, found_error, oom = fault_of(folder)
    if found_status in (RunStatus.OOM, RunStatus.INVALID) or status is None:
        status, error = found_status, found_error or error
    prediction = folder.read_prediction()
    ranks = [
        RankMeasurement(
            rank=rank,
            local_rank=rank,
            hostname=platform.node(),
            device=cfg.hardware.gpu_name or cfg.hardware.name,
            source="recovered",
            steps=folder.read_steps(rank),
            notes=["read back from the rank's JSONL after the run died"],
        )
        for rank in folder.ranks_on_disk()
    ]
    return RunRecord(
        run_id=folder.run_id,
        name=cfg.name,
        status=status,
        started_at=started_at,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=list(command),
        config=config_to_json(cfg),
        environment=environment(),
        prediction=prediction,
        error=error or "the run ended without a record",
        oom=oom,
        ranks=ranks,
        residuals=residuals(prediction, ranks) if prediction else [],
        notes=["recovered by the starter: the run wrote no record", *skip_notes(ranks)],
    )
