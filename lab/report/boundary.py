"""The out-of-memory boundary of configurations: predicted, measured, and whether they agree; as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import cast

from lab.analytic.boundary import TIGHT_BYTES, Boundary
from lab.config import ConfigError
from lab.record import RunRecord, from_json, to_json
from lab.report.table import gib
from lab.report.text import markdown_table
from lab.units import MIB
from lab.vocab import RunStatus


class Verdict(StrEnum):
    """Of the predicted largest batch against the two real runs."""

    EXACT = "exact"  # it runs and the next does not
    TOO_LOW = "too low"  # the next runs too
    TOO_HIGH = "too high"  # it runs out of memory
    OPEN = "not measured"  # or a run ended in another way


@dataclass
class BoundaryRun:
    """A real run of one batch size under the limit: how it ended, and the largest over ranks of what it measured."""

    micro_batch_size: int
    status: RunStatus
    run_id: str = ""
    peak_allocated_bytes: int | None = None  # over all steps measured; of an OOM what was allocated when it came
    peak_reserved_bytes: int | None = None
    num_alloc_retries: int = 0
    step: int | None = None  # of an OOM
    phase: str | None = None
    error: str | None = None


@dataclass
class BoundaryResult:
    """One configuration. Written once predicted, and again with its runs."""

    overrides: list[str]
    label: str
    boundary: Boundary
    runs: list[BoundaryRun] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def tight(self) -> bool:
        """Does the prediction itself say that it may be wrong: is its margin below one segment?"""
        margin = self.boundary.margin_bytes
        return margin is not None and margin < TIGHT_BYTES

    @property
    def verdict(self) -> Verdict:
        ended = {r.micro_batch_size: r.status for r in self.runs}
        batch = self.boundary.micro_batch_size
        good = ended.get(batch, RunStatus.OK if batch == 0 else None)
        if good is RunStatus.OOM:
            return Verdict.TOO_HIGH
        next_one = ended.get(batch + 1)
        if good is RunStatus.OK and next_one in (RunStatus.OK, RunStatus.OOM):
            return Verdict.EXACT if next_one is RunStatus.OOM else Verdict.TOO_LOW
        return Verdict.OPEN


def boundary_run(batch: int, record: RunRecord) -> BoundaryRun:
    """What a record says of one run at the boundary."""
    phases = [phase for rank in record.ranks for step in rank.steps for phase in step.phases.values()]
    oom = record.oom or {}
    return BoundaryRun(
        micro_batch_size=batch,
        status=record.status,
        run_id=record.run_id,
        peak_allocated_bytes=oom.get("peak_allocated_bytes")
        or max((p.peak_allocated_bytes for p in phases), default=None),
        peak_reserved_bytes=oom.get("reserved_bytes") or max((p.peak_reserved_bytes for p in phases), default=None),
        num_alloc_retries=max((_retries(record, rank) for rank in range(len(record.ranks))), default=0),
        step=oom.get("step"),
        phase=oom.get("phase"),
        error=record.error,
    )


def _retries(record: RunRecord, rank: int) -> int:
    return sum(phase.num_alloc_retries for step in record.ranks[rank].steps for phase in step.phases.values())


def write_results(path: Path, results: Sequence[BoundaryResult]) -> None:
    """A JSON list, one line per configuration."""
    lines = ",\n".join(json.dumps(to_json(r), separators=(",", ":")) for r in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_results(path: Path) -> list[BoundaryResult]:
    """Inverse of ``write_results``. Raises ConfigError for a file that is none of its kind."""
    try:
        return [cast(BoundaryResult, from_json(BoundaryResult, tree)) for tree in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("FILE", path, f"no readable file of `lab boundary -o`: {error}") from None


def boundary_table(results: Sequence[BoundaryResult]) -> str:
    """Markdown: one row per configuration, how many the prediction got right, and what the columns are."""
    measured = any(r.runs for r in results)
    headers = ["settings", "limit GiB", "largest batch", "it needs GiB", "margin MiB", "the next needs GiB", "fails in"]
    headers += ["measured: it", "the next", "verdict"] if measured else []
    rows = [[*_predicted_cells(r), *(_measured_cells(r) if measured else [])] for r in results]
    counts = {v: sum(r.verdict is v for r in results) for v in Verdict}
    said = sum(r.verdict is Verdict.TOO_HIGH and r.tight for r in results)
    lines = []
    if measured:
        tight = f" ({said} of these with a margin marked *)" if counts[Verdict.TOO_HIGH] else ""
        lines.append(
            f"{len(results)} configurations: {counts[Verdict.EXACT]} exact, {counts[Verdict.TOO_LOW]} too low, "
            f"{counts[Verdict.TOO_HIGH]} too high{tight}, {counts[Verdict.OPEN]} not measured; {_machines(results)}."
        )
    note = (
        "Largest train.micro_batch_size predicted to fit under the limit on PyTorch's reserved bytes, and the least "
        f"limit under which it and the next one fit; GiB = 2^30 bytes; *: less than {TIGHT_BYTES // MIB} MiB, one "
        "segment, to spare; fails in: step (from 0) and phase of the next one's refused request."
    )
    return "\n\n".join([*lines, markdown_table(headers, rows), note])


def _predicted_cells(result: BoundaryResult) -> list[str]:
    b = result.boundary
    margin = "-" if b.margin_bytes is None else f"{b.margin_bytes // MIB}{'*' if result.tight else ''}"
    needs = [gib(b.needed_bytes, 3), margin, gib(b.next_needed_bytes, 3)]
    label = " ".join(word for word in result.label.split() if not word.startswith("train.memory_limit_gib="))
    fails = _moment(b.next_fails.step, b.next_fails.phase)
    return [label, gib(b.limit_bytes, 3), str(b.micro_batch_size), *needs, fails]


def _measured_cells(result: BoundaryResult) -> list[str]:
    runs = {r.micro_batch_size: r for r in result.runs}
    batch = result.boundary.micro_batch_size
    cells = []
    for run in (runs.get(batch), runs.get(batch + 1)):
        known = run is not None and run.status is RunStatus.OOM and run.phase is not None
        where = f", {_moment(run.step, run.phase)}" if run is not None and known else ""
        cells.append("-" if run is None else run.status.value + where)
    return [*cells, result.verdict.value]


def _moment(step: int | None, phase: str | None) -> str:
    return "build" if step is None else f"{step} {phase or '-'}"


def _machines(results: Sequence[BoundaryResult]) -> str:
    devices = dict.fromkeys(d for r in results for d in r.devices)
    versions = dict.fromkeys(f"torch {r.versions['torch']}" for r in results if "torch" in r.versions)
    return ", ".join([*devices, *versions]) or "no device"
