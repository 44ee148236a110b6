"""Bytes to text. The one module that divides by 2^30 or 2^20. Standard library only."""

from __future__ import annotations

GIB = 1 << 30
MIB = 1 << 20


def to_gib(num_bytes: float) -> float:
    """Bytes -> GiB (2^30 bytes)."""
    return num_bytes / GIB


def to_mib(num_bytes: float) -> float:
    """Bytes -> MiB (2^20 bytes)."""
    return num_bytes / MIB


def gib_text(num_bytes: float, digits: int = 3) -> str:
    """Bytes -> '1.234' in GiB, without the unit (the column header carries it)."""
    return f"{to_gib(num_bytes):.{digits}f}"


def readable(num_bytes: float) -> str:
    """Bytes -> '1.234 GiB', '5.6 MiB', '7.8 KiB' or '9 B' for prose and error lines."""
    if abs(num_bytes) >= GIB:
        return f"{to_gib(num_bytes):.3f} GiB"
    if abs(num_bytes) >= MIB:
        return f"{to_mib(num_bytes):.1f} MiB"
    if abs(num_bytes) >= 1024:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{int(num_bytes)} B"


def error_percent(predicted: float, measured: float) -> float | None:
    """Signed percent error, predicted over measured minus one; None where nothing was measured."""
    return 100.0 * (predicted / measured - 1.0) if measured else None
