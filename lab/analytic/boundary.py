"""Where memory runs out: does a run fit under a limit on what PyTorch's allocator reserves, and up to which batch?

The limit is that of ``torch.cuda.set_per_process_memory_fraction``: a segment is refused when the segments held and it
are more than the limit; then every segment that is one free block goes back, and it is asked for once more
(``lab.analytic.allocator``). Every step is replayed, up to two beyond the one from which the free blocks repeat, since
what was returned to the driver changes how later steps are served.

Left out: what other processes hold on the GPU, and NCCL, which takes its memory from the driver without the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lab.analytic.allocator import LARGE_SEGMENT, ROUND_LARGE, Allocator, OutOfMemory
from lab.analytic.expandable import allocator_of
from lab.analytic.hardware import outside_allocator_bytes
from lab.analytic.layers import replay_steps
from lab.analytic.segments import spelled_out
from lab.analytic.simulation import Simulation, settle, simulate
from lab.analytic.step import Replay
from lab.analytic.tape import MARK, Event
from lab.config import ConfigError, RunConfig
from lab.vocab import StepPhase

TIGHT_BYTES = LARGE_SEGMENT
"""A margin below one segment of the large pool is none: a kernel's scratch block that is not replayed costs one."""


@dataclass(frozen=True)
class Replayed:
    """What one rank asks of the allocator over the steps."""

    rank: int
    events: Sequence[Event]
    num_storages: int
    allocator: type[Allocator] = Allocator


@dataclass(frozen=True)
class Exhaustion:
    """The request that the allocator cannot serve: where, and how many bytes. ``step`` is None in the build."""

    rank: int
    step: int | None
    phase: StepPhase
    request_bytes: int


@dataclass(frozen=True)
class Boundary:
    """The largest micro-batch that fits under the limit (0: not even one sequence), and what it and the next need.

    ``needed_bytes``: the least limit under which the batch runs; what is left of the limit is the margin.
    """

    limit_bytes: int
    micro_batch_size: int
    needed_bytes: int | None
    next_needed_bytes: int
    next_fails: Exhaustion

    @property
    def margin_bytes(self) -> int | None:
        return None if self.needed_bytes is None else self.limit_bytes - self.needed_bytes


def allocator_limit_bytes(cfg: RunConfig) -> int:
    """``train.memory_limit_gib``, else the GPU less CUDA's context and NCCL. ConfigError if neither is known."""
    hardware = cfg.hardware
    if hardware.device_type != "cuda":
        raise ConfigError("hardware", hardware.name, "has no memory limit; name a GPU, such as hardware=h200")
    if cfg.memory_limit_bytes is not None:
        return cfg.memory_limit_bytes
    if not hardware.capacity_bytes:
        raise ConfigError("hardware", hardware.name, "capacity not known: set train.memory_limit_gib")
    return hardware.capacity_bytes - outside_allocator_bytes(cfg)


def replayed(cfg: RunConfig) -> list[Replayed]:
    """Every rank that may be the first to run out."""
    out = []
    for rank in Replay(cfg).rule.ranks():
        replay = replay_steps(cfg, rank)
        settle(replay, Simulation(allocator_of(cfg)()))
        for _ in range(min(2, cfg.train.steps - replay.done)):
            replay.step()
        trace = replay.trace
        out.append(Replayed(rank, spelled_out(trace.events, trace.segments), trace.next_id, allocator_of(cfg)))
    return out


def exhaustion(runs: Sequence[Replayed], limit_bytes: int) -> Exhaustion | None:
    """The first rank's request that is refused under the limit; None if all ranks come through."""
    for run in runs:
        try:
            simulate(run.events, run.num_storages, limit_bytes, run.allocator)
        except OutOfMemory as error:
            step, phase = _moment(run.events, error.event)
            return Exhaustion(run.rank, step, phase, error.request_bytes)
    return None


def least_limit_bytes(runs: Sequence[Replayed], limit_bytes: int) -> int:
    """The least limit, in whole 2 MiB, under which every rank comes through, looked for beside ``limit_bytes``.

    Below it where the run comes through under it, above it where not: steps that double, then bisection. Beside it,
    since more room can be worse: other segments are kept then, and with them other gaps.
    """

    def comes_through(units: int) -> bool:
        return exhaustion(runs, units * ROUND_LARGE) is None

    start, step = limit_bytes // ROUND_LARGE, 1  # segments are whole 2 MiB
    through = comes_through(start)
    near, far = start, max(start - step, 0) if through else start + step
    while far and comes_through(far) is through:
        step *= 2
        near, far = far, max(far - step, 0) if through else far + step
    enough, refused = (near, far) if through else (far, near)
    while enough - refused > 1:
        middle = (enough + refused) // 2
        if comes_through(middle):
            enough = middle
        else:
            refused = middle
    return enough * ROUND_LARGE


def boundary(cfg: RunConfig) -> Boundary:
    """The largest ``train.micro_batch_size`` that fits, whatever ``cfg`` has there. Raises ConfigError.

    Doubling, then bisection: the size found fits and the next does not.
    """
    limit = allocator_limit_bytes(cfg)
    runs: dict[int, list[Replayed]] = {}

    def fits(batch: int) -> bool:
        runs[batch] = replayed(with_micro_batch(cfg, batch))
        return exhaustion(runs[batch], limit) is None

    batch = _largest(fits)
    failed = exhaustion(runs[batch + 1], limit)
    assert failed is not None
    needed = least_limit_bytes(runs[batch], limit) if batch else None
    return Boundary(limit, batch, needed, least_limit_bytes(runs[batch + 1], limit), failed)


def with_micro_batch(cfg: RunConfig, batch: int) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, micro_batch_size=batch))


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n >= 0 with ``fits(n)``, if it holds up to there and no further; 0 is not asked."""
    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def _moment(events: Sequence[Event], index: int) -> tuple[int | None, StepPhase]:
    """Step and phase of an event: the last mark before it."""
    for event in reversed(events[:index]):
        if event[0] == MARK:
            step, phase, _ = event[3].split("/")
            return int(step), StepPhase(phase)
    return None, StepPhase.BUILD
