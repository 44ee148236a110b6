"""Worker of ``lab benchmark measure``: one rank. Not called by hand.

The same engine trains blocks of steps, by turns without a meter and with measure=counters (ledger steps
left out: they are few and their times stand apart). Seconds per step of each block go to a file.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from lab.build import build
from lab.config import RunConfig, load
from lab.data import make_batches
from lab.launch import close_process_group, find_place, open_process_group, open_store
from lab.loop import Losses, train
from lab.measure import make_meter
from lab.record import write_json_atomic

BLOCK_STEPS = 12  # the first two of a block are not timed (lab.loop.Clock)


def main(rounds: int, result: Path, overrides: list[str]) -> None:
    """Times of ``rounds`` pairs of blocks, seconds per step, written by rank 0."""
    cfg = load(overrides)
    cfg = replace(cfg, train=replace(cfg.train, steps=BLOCK_STEPS, warmup_steps=0))
    place = find_place(cfg)
    open_process_group(cfg, place, open_store(cfg))
    batches = make_batches(cfg, place.device, place.rank)
    engine = build(cfg, place.device)
    times: dict[str, list[float]] = {"off": [], "counters": []}
    for index in range(rounds + 1):
        for level, seconds in times.items():
            measured = _at_level(cfg, level)
            meter = make_meter(measured, place.device, place.rank, place.local_rank)
            meter.start()
            meter.build_done()
            losses = Losses(BLOCK_STEPS, place.device)
            clock = train(measured, engine, batches, meter, losses)
            meter.stop()
            if index > 0 and clock.step_seconds is not None:  # the first pair warms up
                seconds.append(clock.step_seconds)
    if place.rank == 0:
        write_json_atomic(result, times)
    engine.close()
    close_process_group()


def _at_level(cfg: RunConfig, level: str) -> RunConfig:
    return replace(cfg, measure=replace(cfg.measure, level=level, ledger_steps=()))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
