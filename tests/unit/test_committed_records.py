"""Today's formulas against every committed record of a real GPU run: CI has no GPU, the records are its test data."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lab.analytic.expandable import allocator_of
from lab.analytic.simulation import simulate
from lab.analytic.step import Replay
from lab.cli.main import main
from lab.cli.predictions import predicted, predictions_kept
from lab.cli.validate import PointError, _with_todays_hardware, validate
from lab.config import RunConfig, run_config_from_json
from lab.track.bundle import read_records
from lab.vocab import RunStatus

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BUNDLES = ("h200_matrix", "h200_blind")


@pytest.fixture(scope="module", autouse=True)
def _each_configuration_once() -> Iterator[None]:
    """The tests here ask for the same records again and again."""
    with predictions_kept():
        yield


@cache
def errors() -> tuple[int, list[PointError]]:
    return validate(read_records([EXPERIMENTS / name for name in BUNDLES]))


def of_level(level: str) -> list[float]:
    return [abs(e.percent) for e in errors()[1] if e.level == level]


def test_the_records_span_what_the_lab_predicts() -> None:
    points, found = errors()
    assert points >= 111
    assert {e.strategy for e in found} == {"single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp"}


def test_allocated_peak() -> None:
    """Nine of ten points within 0.1 %, every point within 0.2 %."""
    found = of_level("allocated")
    assert sum(e <= 0.1 for e in found) >= 0.9 * len(found)
    assert max(found) <= 0.2


def test_states_between_steps() -> None:
    """Parameters, master weights, gradients and optimizer states on the worst rank, counted in allocator blocks."""
    found = of_level("states")
    assert statistics.median(found) <= 0.001
    assert max(found) <= 0.25


@pytest.mark.parametrize(("level", "median", "worst"), [("reserved", 0.1, 13.0), ("device_used", 0.1, 11.0)])
def test_reserved_and_device_use(level: str, median: float, worst: float) -> None:
    """Its worst is loose: NCCL's watchdog decides when DDP's first bucket goes (sharding/replicated.py)."""
    found = of_level(level)
    assert statistics.median(found) <= median
    assert max(found) <= worst


@cache
def errors_of_all() -> list[PointError]:
    return validate(read_records([p.parent for p in EXPERIMENTS.glob("*/records.jsonl")]))[1]


@pytest.mark.parametrize(
    ("level", "worst", "worst_of_zero3"),
    [("allocated", 0.35, 0.03), ("reserved", 3.0, 4.3), ("device_used", 2.2, 4.0), ("states", 0.04, 0.04)],
)
def test_every_record(level: str, worst: float, worst_of_zero3: float) -> None:
    """ZeRO-3 reserves more where the GPU is behind the host (experiments/zero3_batch): by how much is timing.

    The worst of allocated is 1.5 MiB in rests of blocks, of a run of 440 MiB (experiments/sliding).
    """
    found = [(e.strategy, abs(e.percent)) for e in errors_of_all() if e.level == level]
    assert len(found) >= 460
    assert statistics.median(percent for _, percent in found) <= 0.01
    assert max(percent for strategy, percent in found if strategy != "zero3") <= worst
    assert max(percent for strategy, percent in found if strategy == "zero3") <= worst_of_zero3


def test_what_a_build_reserves_is_right_to_the_byte() -> None:
    """Nothing is timing there; what it leaves behind is where later tensors go."""
    builds = 0
    for _, record in read_records([p.parent for p in EXPERIMENTS.glob("*/records.jsonl")]):
        if record.config["hardware"]["device_type"] != "cuda" or record.config["engine"]["kind"] == "hf_trainer":
            continue
        cfg = _with_todays_hardware(run_config_from_json(record.config))
        build = record.ranks[0].build if record.status is RunStatus.OK else None
        if build is None:
            continue
        replay = Replay(cfg)
        replay.build()
        done = simulate(replay.trace.events, replay.trace.next_id, made_by=allocator_of(cfg))
        assert (done.reserved[-1], done.allocated[-1]) == (build.end_reserved_bytes, build.end_allocated_bytes)
        builds += 1
    assert builds >= 800


def test_most_are_right_to_the_byte() -> None:
    """README's table counts them."""
    allocated = [e.percent for e in errors_of_all() if e.level == "allocated"]
    reserved = [e.percent for e in errors_of_all() if e.level == "reserved"]
    assert sum(abs(e) <= 0.1 for e in allocated) >= 0.99 * len(allocated)
    assert sum(e == 0 for e in allocated) >= 0.94 * len(allocated)
    assert sum(e == 0 for e in reserved) >= 0.9 * len(reserved)
    assert max(map(abs, allocated)) <= 0.35


def ddp_records() -> list[tuple[RunConfig, int]]:
    """Configuration and measured reserved bytes of every DDP run on several GPUs."""
    found = []
    for _, record in read_records([p.parent for p in EXPERIMENTS.glob("*/records.jsonl")]):
        step = record.steady_step
        if record.status is not RunStatus.OK or record.config["parallel"]["strategy"] != "ddp" or step is None:
            continue
        worst = record.worst("peak_reserved_bytes", step)
        cfg = _with_todays_hardware(run_config_from_json(record.config))
        if cfg.world_size > 1 and worst is not None:
            found.append((cfg, worst[0]))
    return found


def reserved_bytes(cfg: RunConfig, release: bool) -> int:
    ddp = replace(cfg.parallel.ddp, release_first_bucket=release)
    return predicted(replace(cfg, parallel=replace(cfg.parallel, ddp=ddp))).steady.reserved_bytes


def test_ddps_first_bucket_goes_early_or_late() -> None:
    """Without ``release_first_bucket`` a run is one of two, NCCL's watchdog decides; with it, it is the early one.

    One of the two is always within 0.5 %, but for a run in which the driver's addresses decide (h200_blind5's README).
    """
    early = late_though_released = 0
    off = []
    for cfg, measured in ddp_records():
        released, held = (abs(reserved_bytes(cfg, flag) / measured - 1) for flag in (True, False))
        if min(released, held) > 0.005:
            off.append((cfg.model.vocab_size, cfg.world_size, cfg.precision.kind.value))
        early += released < held
        late_though_released += cfg.parallel.ddp.release_first_bucket and held < released
    assert off == [(30011, 4, "fp16_mixed")]
    assert early >= 5
    assert late_though_released == 0


def test_the_readmes_tables_are_what_their_commands_print() -> None:
    """Records and formulas are today's: `lab tables` makes the pages agree again."""
    assert main(["tables", "--check"]) == 0
