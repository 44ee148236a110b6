"""``lab boundary``: the largest micro-batch under a memory limit, predicted, and run for real with the next one."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

from lab.analytic.boundary import boundary
from lab.cli.arguments import Parser
from lab.cli.points import Point, resolve_point, study_points
from lab.cli.sweep import Sweep, drop_launcher_variables, interrupt, reason_parts
from lab.config import ConfigError, RunConfig
from lab.record import to_json
from lab.report.boundary import (
    BoundaryResult,
    Verdict,
    boundary_run,
    boundary_table,
    read_results,
    write_results,
)
from lab.vocab import RunStatus

HELP = """The largest train.micro_batch_size that fits, by the simulated allocator: under train.memory_limit_gib (what
PyTorch reserves on each GPU), or on the whole GPU. Points as for `lab sweep`; their own batch size does not matter.

  lab boundary model=350m hardware=h200 train.memory_limit_gib=12 checkpointing=none,full
  lab boundary experiment=oom_boundary hardware=h200 -o FILE.json                    predict first, without a GPU
  lab boundary --predicted FILE.json --measure --jobs 8 --share 4 -o FILE.json       then run it on GPUs
  lab boundary experiment=oom_boundary --measure --jobs 8 --share 4 -o FILE.json     both
  lab boundary --table FILE.json

--measure runs that size and the next larger one of each point for real. Exit code 1 if a size that was predicted to fit
runs out of memory, or if a run ends neither well nor out of memory. Runs that are recorded already, or that the file of
--predicted has, are not run again.
"""
_ENDED = (RunStatus.OK, RunStatus.OOM)


def run(argv: Sequence[str]) -> int:
    parser = Parser("boundary", HELP)
    parser.add_overrides()
    parser.add_argument("--predicted", metavar="FILE", help="points and predictions of a file written with -o")
    parser.add_argument("--measure", action="store_true", help="run the predicted size and the next one")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="--measure: runs at a time")
    parser.add_argument(
        "--share",
        type=int,
        default=1,
        metavar="N",
        help="--measure: runs on one GPU at a time, as far as their limits leave room",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the results, one line per point (JSON)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--table", metavar="FILE", help="only print the table of results written with -o")
    arguments = parser.parse(argv)
    for name in ("jobs", "share"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}", getattr(arguments, name), "1 or more")
    if arguments.table:
        results = read_results(Path(arguments.table))
    else:
        drop_launcher_variables()
        results = _predicted(arguments.predicted, arguments.overrides)
        _write(arguments.output, results)  # before anything is run
        if arguments.measure:
            interrupted = _measure(results, arguments.jobs, arguments.share)
            _write(arguments.output, results)
            if interrupted:
                return 130
    print(json.dumps([as_json(r) for r in results], indent=1) if arguments.json else boundary_table(results))
    return 1 if arguments.measure and any(r.verdict in (Verdict.TOO_HIGH, Verdict.OPEN) for r in results) else 0


def as_json(result: BoundaryResult) -> dict[str, object]:
    """One object of ``--json``: as in the file, with margin and verdict."""
    tree: dict[str, object] = to_json(result)
    return {**tree, "margin_bytes": result.boundary.margin_bytes, "verdict": result.verdict.value}


def _predicted(file: str | None, overrides: Sequence[str]) -> list[BoundaryResult]:
    """Of a file, or of the study and settings given. Raises ConfigError for both and for a point that breaks a rule."""
    if file is None:
        return [BoundaryResult(list(p.overrides), p.label, boundary(cfg)) for p, cfg in _valid(study_points(overrides))]
    if overrides:
        raise ConfigError("--predicted", file, f"the points are in the file; drop {' '.join(overrides)}")
    return read_results(Path(file))


def measured_points(result: BoundaryResult) -> dict[int, Point]:
    """Batch size -> the point to run: the predicted one, if there is one, and the next."""
    return {
        batch: resolve_point(
            (*(o for o in result.overrides if not o.startswith("train.micro_batch_size=")), _batch_override(batch)),
            f"{result.label} {_batch_override(batch)}",
        )
        for batch in (result.boundary.micro_batch_size, result.boundary.micro_batch_size + 1)
        if batch
    }


def _batch_override(batch: int) -> str:
    return f"train.micro_batch_size={batch}"


def _measure(results: Sequence[BoundaryResult], jobs: int, share: int) -> bool:
    """Run under ``lab sweep``'s driver what the results do not have yet, and take the records; True: interrupted."""
    signal.signal(signal.SIGTERM, interrupt)
    points = [measured_points(result) for result in results]
    for result, group in zip(results, points, strict=True):
        result.runs = [r for r in result.runs if r.status in _ENDED]
        for done in result.runs:
            group.pop(done.micro_batch_size, None)
    todo = [p for group in points for p in group.values()]
    if not todo:
        return False
    sweep = Sweep(todo, jobs=jobs, share=share)
    code = sweep.run()
    for result, group in zip(results, points, strict=True):
        found = {b: sweep.recorded[p.identity][1] for b, p in group.items() if p.identity in sweep.recorded}
        records = {b: r for b, r in found.items() if r.status is not RunStatus.INTERRUPTED}
        runs = [*result.runs, *(boundary_run(batch, record) for batch, record in records.items())]
        result.runs = sorted(runs, key=lambda run: run.micro_batch_size)
        devices = (rank.device for r in records.values() for rank in r.ranks)
        result.devices = list(dict.fromkeys([*result.devices, *devices]))
        for record in records.values():
            result.versions |= {k: str(v) for k, v in record.environment.get("versions", {}).items() if v}
    return code == 130


def _valid(points: Sequence[Point]) -> list[tuple[Point, RunConfig]]:
    """All of them with their configurations; the first that breaks a rule is the user's mistake."""
    out = []
    for point in points:
        if point.cfg is None:
            raise ConfigError(*reason_parts([point]))
        out.append((point, point.cfg))
    return out


def _write(path: str | None, results: Sequence[BoundaryResult]) -> None:
    if path:
        write_results(Path(path), results)
