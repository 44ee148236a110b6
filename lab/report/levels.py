"""Recorded runs at every level of memory: allocated, reserved, what the driver sees, and what lies between."""

from __future__ import annotations

from collections.abc import Sequence

from lab.compare import comparison_row
from lab.record import RunRecord
from lab.report.study import StudyColumns
from lab.report.table import gib, number, percent
from lab.report.text import markdown_table
from lab.vocab import MemoryLevel

NOTE = (
    "Peak of the steady step, maximum across all GPUs (ranks), each level for itself; GiB = 2^30 bytes. Fragmentation: "
    "reserved minus allocated, and its share of reserved. Outside: device use minus reserved (CUDA context, NCCL, idle "
    "use). Errors: predicted / measured - 1."
)
_LEVELS = (MemoryLevel.ALLOCATED, MemoryLevel.RESERVED, MemoryLevel.DEVICE_USED)


def levels_table(records: Sequence[RunRecord], as_overrides: bool = False) -> str:
    """Markdown, one row per run. ``as_overrides`` shows each run's own settings in one column."""
    columns = StudyColumns(records, as_overrides)
    headers = [*columns.headers]
    for level in _LEVELS:
        headers += [f"{level.value.replace('_', ' ')} GiB", "error %"]
    headers += ["fragmentation GiB", "of reserved %", "outside GiB"]
    cells = []
    for record, line in zip(records, columns.cells, strict=True):
        row = comparison_row(record)
        allocated, reserved, device = (row[f"measured_{level.value}_bytes"] for level in _LEVELS)
        for level in _LEVELS:
            line += [gib(row[f"measured_{level.value}_bytes"], 3), percent(row[f"{level.value}_error_percent"])]
        between = None if allocated is None or reserved is None else reserved - allocated
        share = None if between is None or not reserved else 100.0 * between / reserved
        outside = None if device is None or reserved is None else device - reserved
        line += [gib(between, 3), number(share, ".1f"), gib(outside, 3)]
        cells.append(line)
    return "\n\n".join([columns.common, markdown_table(headers, cells), NOTE])
