"""Blocks that were live at the peak of a recorded allocator history (``measure=snapshot``). No torch.

A snapshot (``torch.cuda.memory._dump_snapshot``) holds the allocator's segments when it was taken and the events
of the recorded time in order. Going back from the end undoes them one by one; the richest moment on the way
is the peak.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.curve import ALLOCATE, FREE, MARK, CurvePoint

ALIGNMENT = 512  # the allocator's kMinBlockSize: requests are rounded up to it


@dataclass(frozen=True)
class HistoryBlock:
    """One request that was live: its size, rounded up as the allocator does, and where Python made it."""

    request_bytes: int
    where: str  # "file:line function", innermost first; empty for what the backward pass made in C++


def read_snapshot(path: Path) -> Mapping[str, Any]:
    """A snapshot pickle of a run of this lab. Raises ValueError for anything else.

    Unpickling runs code: read only files that your own runs wrote.
    """
    with path.open("rb") as stream:
        snapshot = pickle.load(stream)
    if not isinstance(snapshot, dict) or not {"segments", "device_traces"} <= set(snapshot):
        raise ValueError(f"{path}: not a snapshot of PyTorch's CUDA allocator")
    return snapshot


def blocks_at_peak(snapshot: Mapping[str, Any]) -> list[HistoryBlock]:
    """Every block that was live when the recorded requests were largest together."""
    events: Sequence[Mapping[str, Any]] = next((t for t in snapshot["device_traces"] if t), [])
    live = {
        block["address"]: _block(block.get("requested_size", block["size"]), block.get("frames", ()))
        for segment in snapshot["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
    total = sum(b.request_bytes for b in live.values())
    best, richest = total, len(events)
    for i, event in reversed(list(enumerate(events))):
        if event["action"] == "alloc":
            total -= live.pop(event["addr"]).request_bytes
        elif event["action"] == "free_completed":
            live[event["addr"]] = _block(event["size"], event.get("frames", ()))
            total += live[event["addr"]].request_bytes
        if total > best:
            best, richest = total, i
    return _forward(events[:richest], live)


def curve_of(snapshot: Mapping[str, Any]) -> list[CurvePoint]:
    """The recorded time's allocations and frees, with the totals that end at what the snapshot holds.

    A history says no phase and no category; ``label`` is the Python line. It has requests, not the blocks that served
    them, so ``allocated_bytes`` is not known in between.
    """
    events: Sequence[Mapping[str, Any]] = next((t for t in snapshot["device_traces"] if t), [])
    requested = sum(
        _rounded(block.get("requested_size", block["size"]))
        for segment in snapshot["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    )
    reserved = sum(segment.get("total_size", 0) for segment in snapshot["segments"])
    points: list[CurvePoint] = []
    for event in reversed(events):
        action, size = event["action"], event["size"]
        change = _rounded(size) if action == "alloc" else -_rounded(size) if action == "free_completed" else 0
        if change:
            kind = ALLOCATE if change > 0 else FREE
            label = _block(size, event.get("frames", ())).where
            points.append(CurvePoint(kind, "", change, "", "", label, requested, None, reserved))
            requested -= change
        elif action == "segment_alloc":
            reserved -= size
        elif action == "segment_free":
            reserved += size
    points.append(CurvePoint(MARK, "", 0, "", "", "start", requested, None, reserved))
    return points[::-1]


def _forward(events: Sequence[Mapping[str, Any]], live: dict[int, HistoryBlock]) -> list[HistoryBlock]:
    """The blocks after ``events``, from what was live before them."""
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = _block(event["size"], event.get("frames", ()))
        elif event["action"] == "free_completed":
            del live[event["addr"]]
    return list(live.values())


def _block(size: int, frames: Sequence[Mapping[str, Any]]) -> HistoryBlock:
    place = [f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in frames[:2]]
    return HistoryBlock(_rounded(size), " < ".join(place))


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
