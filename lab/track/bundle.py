"""Many records in one file: JSON Lines (optionally gzipped), one RunRecord per line, small enough to commit.

``read_records`` takes run folders, studies, output folders, record.json files and bundles alike.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.config import ConfigError
from lab.record import RankMeasurement, RunRecord, record_from_json, to_json

BUNDLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")


def read_records(paths: Iterable[Path]) -> Iterator[tuple[str, RunRecord]]:
    """(source, record) of every record under ``paths``, in order of path; run folders sort by time.

    A run that several files hold (a study's records are a part of a larger set's) comes once. The source is the
    record's path, or ``bundle:line``. Raises ConfigError for a path that does not
    exist or a file that is no record, and for a record of another schema version.
    """
    seen: set[tuple[str, str, str]] = set()
    for source, record in _all_records(paths):
        run = (record.name, record.run_id, record.started_at)
        if run not in seen:
            seen.add(run)
            yield source, record


def _all_records(paths: Iterable[Path]) -> Iterator[tuple[str, RunRecord]]:
    for path in paths:
        if path.is_dir():
            for found in sorted(path.rglob("*")):
                if found.name == "record.json" or (found.is_file() and found.name.endswith(BUNDLE_SUFFIXES)):
                    if found.name.startswith("rank_"):  # a run's own steps
                        continue
                    yield from _read_file(found)
        elif path.is_file():
            yield from _read_file(path)
        else:
            raise ConfigError("records", path, "no such file or folder")


def _read_file(path: Path) -> Iterator[tuple[str, RunRecord]]:
    try:
        if path.name.endswith(BUNDLE_SUFFIXES):
            opener: Any = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"{path}:{number}", record_from_json(json.loads(line), f"{path}:{number}")
        else:
            yield str(path), record_from_json(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("records", path, f"not a readable record: {error}") from None


def slim(record: RunRecord) -> RunRecord:
    """The record without what only a debugger reads: the first and the steady step of each rank, no host names.

    Ranks keep their build reading and ledgers; the losses of the dropped steps go (the metrics keep first and last).
    The steady step becomes the last one, so that ``RunRecord.steady_step`` names it again.
    """
    steady = record.steady_step
    hosts = {name: f"node-{i}" for i, name in enumerate(dict.fromkeys(r.hostname for r in record.ranks))}

    def slim_rank(rank: RankMeasurement) -> RankMeasurement:
        steps = rank.steps[:1] + ([rank.steps[steady]] if steady else [])
        return replace(rank, hostname=hosts[rank.hostname], steps=steps)

    environment = {k: v for k, v in record.environment.items() if k != "host"}
    command = [Path(part).name if part.startswith("/") else part for part in record.command]
    return replace(record, ranks=[slim_rank(r) for r in record.ranks], environment=environment, command=command)


def write_bundle(path: Path, records: Iterable[RunRecord]) -> int:
    """Write slimmed records, one per line, ordered by run id; returns how many. ``.gz`` compresses."""
    ordered = sorted((slim(r) for r in records), key=lambda r: (r.name, r.run_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(to_json(r), separators=(",", ":"), sort_keys=True) + "\n" for r in ordered]
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))  # same records, same bytes
    else:
        path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
