"""The predicted memory curve of the step that stands for all later ones: allocations and frees in their order."""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.allocator import OutOfMemory
from lab.analytic.boundary import allocator_limit_bytes
from lab.analytic.expandable import allocator_of
from lab.analytic.layers import replay_steps
from lab.analytic.segments import spelled_out
from lab.analytic.simulation import Simulation, settle
from lab.analytic.step import Replay
from lab.analytic.tape import ALLOC, FREE, MARK, MOVE, Event
from lab.analytic.timeline import Timeline, totals
from lab.config import RunConfig
from lab.curve import ALLOCATE, CurvePoint
from lab.curve import FREE as FREED
from lab.curve import MARK as MARKED
from lab.curve import MOVE as MOVED


def memory_curve(cfg: RunConfig, rank: int | None = None) -> list[CurvePoint]:
    """The steady step of one rank; None: the one whose allocated peak is highest, as in ``predict``.

    Requests, blocks and reserved bytes after every event. On a CPU there is no allocator: blocks are the requests.
    """
    ranks = Replay(cfg).rule.ranks() if rank is None else [rank]
    return max((_curve(cfg, r) for r in ranks), key=_peak)


def _peak(points: Sequence[CurvePoint]) -> int:
    return max(p.allocated_bytes or 0 for p in points)


def _curve(cfg: RunConfig, rank: int) -> list[CurvePoint]:
    replay, events, simulation = _simulated(cfg, rank)
    requested = totals(events)
    allocated = simulation.allocated if simulation else requested
    points: list[CurvePoint] = []
    phase = ""
    spans = Timeline(events, curve=requested).spans[replay.done - 1]
    for i in range(spans[0][1], spans[-1][2] + 1):
        kind, _, nbytes, category, label, _ = events[i]
        name, change, source = MARKED, 0, ""
        if kind == ALLOC:
            name, change = ALLOCATE, nbytes
        elif kind == FREE:
            name, change = FREED, -nbytes
        elif kind == MOVE:
            name, change, source, label = MOVED, nbytes, str(label), ""
        elif kind == MARK:
            _, phase, label = category.split("/")
            category = ""
        else:
            continue
        reserved = simulation.reserved[i] if simulation else None
        points.append(
            CurvePoint(name, phase, change, str(category), source, label, requested[i], allocated[i], reserved)
        )
    return points


def _simulated(cfg: RunConfig, rank: int) -> tuple[Replay, list[Event], Simulation | None]:
    """Under the run's limit, if it comes through; else without one, as the prediction's figures are. None: on a CPU."""
    replay = replay_steps(cfg, rank)
    if not replay.gpu:
        return replay, spelled_out(replay.trace.events, replay.trace.segments), None
    if cfg.memory_limit_bytes or cfg.hardware.capacity_bytes:
        try:
            simulation = Simulation(allocator_of(cfg)(allocator_limit_bytes(cfg)))
            return replay, settle(replay, simulation), simulation
        except OutOfMemory:
            replay = replay_steps(cfg, rank)
    simulation = Simulation(allocator_of(cfg)())
    return replay, settle(replay, simulation), simulation
