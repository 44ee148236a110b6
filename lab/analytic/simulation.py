"""A run's events through the caching allocator, as many steps of them as its cached segments take to repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.analytic.allocator import Allocator, Block, Layout, OutOfMemory
from lab.analytic.segments import spelled_out
from lab.analytic.step import Replay
from lab.analytic.tape import ALLOC, EMPTY_CACHE, FREE, IN_USE, MARK, Event
from lab.analytic.timeline import phase_mark
from lab.vocab import MemoryCategory, StepPhase

WORKSPACE = MemoryCategory.LIBRARY_WORKSPACES
MOST_STEPS = 16
"""Steps after which no repetition is waited for any more; of the recorded runs, the slowest takes five."""


@dataclass
class Simulation:
    """What the allocator did with the events served so far: block bytes by storage id, both levels after each event.

    ``layouts``: what was free at the end of each step.
    """

    allocator: Allocator
    block_bytes: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    _live: dict[int, Block] = field(default_factory=dict)
    _in_use: list[Block] = field(default_factory=list)  # freed, but another stream is not done with them
    _loaded: bool = False  # has a matrix product run?

    def serve(self, events: Sequence[Event], num_storages: int) -> None:
        """Further events, in order; their storages' ids are below ``num_storages``. Raises OutOfMemory."""
        allocator, live, in_use = self.allocator, self._live, self._in_use
        malloc, release = allocator.malloc, allocator.release
        allocated, reserved, block_bytes = self.allocated, self.reserved, self.block_bytes
        block_bytes += [0] * (num_storages - len(block_bytes))
        for i, (kind, ident, nbytes, name, _, stream) in enumerate(events, len(allocated)):
            if kind == ALLOC:
                if name is WORKSPACE and not self._loaded:
                    self._loaded = True
                    allocator.load_products()
                try:
                    block = malloc(nbytes, stream, i)
                except OutOfMemory:  # before that PyTorch waits for the other streams (synchronize_and_free_events)
                    if not in_use:
                        raise
                    _join(allocator, in_use)
                    block = malloc(nbytes, stream, i)
                live[ident] = block
                block_bytes[ident] = block.size
                if in_use and stream == in_use[0].pool.stream:
                    _join(allocator, in_use)
            elif kind == FREE:
                if stream == IN_USE:
                    in_use.append(live.pop(ident))
                    allocator.allocated_bytes -= in_use[-1].size
                else:
                    release(live.pop(ident))
            elif kind == EMPTY_CACHE:
                allocator.empty_cache()
            elif kind == MARK and name == end_of_step(len(self.layouts))[3]:
                self.layouts.append(allocator.layout())
            allocated.append(allocator.allocated_bytes)
            reserved.append(allocator.reserved_bytes)


def end_of_step(step: int) -> Event:
    """Its last event."""
    return MARK, -1, 0, phase_mark(step, StepPhase.ZERO_GRAD, True), "", 0


def simulate(
    events: Sequence[Event], num_storages: int, limit_bytes: int | None = None, made_by: type[Allocator] = Allocator
) -> Simulation:
    """Serve the events in order. Raises OutOfMemory beyond ``limit_bytes``."""
    simulation = Simulation(made_by(limit_bytes))
    simulation.serve(events, num_storages)
    return simulation


def _join(allocator: Allocator, blocks: list[Block]) -> None:
    while blocks:
        allocator.join(blocks.pop())


def settle(replay: Replay, simulation: Simulation, rank: int | None = None) -> list[Event]:
    """Serve a rank's events, and take further steps until one ends as an earlier one did; all events, spelled out.

    The events of a step repeat early (``Rule.repeats_from``). What they find free does not: a block that one step cut
    up is missing in the next, which asks the driver for another. Where two steps end with the same blocks free, so do
    all later ones. ``replay``: stepped to its rule's steady step, to the run's last, or further for another of the
    ranks that it serves; ``rank``: None where it serves one. Raises OutOfMemory.
    """
    rule, trace, events, layouts = replay.rule, replay.trace, list[Event](), simulation.layouts
    rank = rule.rank if rank is None else rank
    first = max(rule.repeats_from - 1, 0)  # the first end from which equal ends make equal steps
    last = min(replay.cfg.train.steps, MOST_STEPS)
    done, steps = 0, min(replay.cfg.train.steps, rule.steady_step + 1)
    while True:
        own = rule.events_of(rank)
        end = len(own) if replay.done == steps else own.index(end_of_step(steps - 1), done) + 1
        further = spelled_out(own[done:end], trace.segments)
        done = end
        simulation.serve(further, trace.next_id)
        events += further
        if steps >= last or layouts[-1] in layouts[first:-1]:
            return events
        steps += 1
        if replay.done < steps:
            replay.step()
