"""Memory over one step, event by event: the form that a predicted and a measured curve share, as JSON or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lab.config import ConfigError

ALLOCATE, FREE, MOVE, MARK = "allocate", "free", "move", "mark"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One event and the totals after it. Bytes; None where the source does not say.

    ``change_bytes``: of the request, rounded up as the allocator does; positive for ``allocate``, negative for
    ``free``, 0 for ``mark`` (a phase's start or end, named by ``label``). ``move``: that many bytes count as
    ``category`` from here on, and as ``from_category`` no longer; no total changes.
    """

    kind: str
    phase: str
    change_bytes: int
    category: str
    from_category: str
    label: str
    requested_bytes: int  # all live requests
    allocated_bytes: int | None  # the blocks that serve them: PyTorch's memory_allocated
    reserved_bytes: int | None


def write_curve(path: Path, points: Sequence[CurvePoint]) -> None:
    """``.json``: a list of objects; ``.csv``: a header and a row per point, None an empty cell. Raises ConfigError."""
    suffix = path.suffix.lower()
    if suffix not in (".json", ".csv"):
        raise ConfigError("--curve", path, "a file that ends in .json or .csv")
    rows = [asdict(p) for p in points]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as stream:
            if suffix == ".json":
                json.dump(rows, stream, separators=(",", ":"))
                stream.write("\n")
            else:
                writer = csv.DictWriter(stream, [f.name for f in fields(CurvePoint)], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    except OSError as error:
        raise ConfigError("--curve", path, f"a file that can be written: {error.strerror}") from error
