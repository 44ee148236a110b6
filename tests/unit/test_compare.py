"""Residuals: the worst rank, the right step, only what was measured."""

from __future__ import annotations

import pytest

from lab.compare import comparison_row, residuals
from lab.record import (
    Moment,
    PhasePrediction,
    PhaseReading,
    Prediction,
    RankMeasurement,
    Residual,
    RunMetrics,
    RunRecord,
    StepMeasurement,
    StepPrediction,
)
from lab.vocab import MemoryBreakdown, MemoryCategory, RunStatus, StepPhase

P, G = MemoryCategory.PARAMETERS, MemoryCategory.GRADIENTS


def step_prediction(scale: int = 1) -> StepPrediction:
    end = Moment(600 * scale, MemoryBreakdown({P: 400 * scale, G: 200 * scale}))
    return StepPrediction(
        allocated_bytes=1000 * scale,
        reserved_bytes=2000 * scale,
        device_used_bytes=3000 * scale,
        categories=MemoryBreakdown({P: 1000 * scale}),
        phases={StepPhase.FORWARD: PhasePrediction(end=end, peak=Moment(1000 * scale))},
    )


def prediction() -> Prediction:
    return Prediction(step_prediction(), step_prediction(10), MemoryBreakdown({P: 400}), 100, [])


def rank(number: int, peaks: list[int], ledger: MemoryBreakdown | None = None) -> RankMeasurement:
    steps = [
        StepMeasurement(
            step=i,
            seconds=0.5,
            loss=2.0 - i,
            phases={
                StepPhase.FORWARD: PhaseReading(
                    end_allocated_bytes=peak - 100,
                    peak_allocated_bytes=peak,
                    ledger=ledger,
                    unattributed_bytes=None if ledger is None else peak - 100 - ledger.total_bytes,
                )
            },
        )
        for i, peak in enumerate(peaks)
    ]
    return RankMeasurement(number, number, "host", "cpu", "cpu_storage_tracker", steps=steps)


def by_where(found: list[Residual]) -> dict[tuple[str, str], Residual]:
    return {(r.level, r.where): r for r in found}


def test_the_worst_rank_counts_and_the_spread_is_kept() -> None:
    found = by_where(residuals(prediction(), [rank(0, [5, 900]), rank(1, [7, 950]), rank(2, [6, 800])]))
    peak = found["allocated", "peak"]
    assert (peak.measured_bytes, peak.rank, peak.spread_bytes, peak.predicted_bytes) == (950, 1, 150, 1000)
    first = found["allocated", "first_step.peak"]
    assert (first.measured_bytes, first.rank, first.predicted_bytes) == (7, 1, 10_000)


def test_the_steady_step_is_the_last_one_that_every_rank_measured() -> None:
    found = by_where(residuals(prediction(), [rank(0, [5, 900, 901]), rank(1, [7, 700])]))
    assert found["allocated", "peak"].measured_bytes == 900
    assert found["allocated", "forward.end"].measured_bytes == 800


def test_one_step_has_no_steady_state() -> None:
    assert {r.where.split(".")[0] for r in residuals(prediction(), [rank(0, [5])])} == {"first_step"}


def test_levels_that_were_not_read_give_no_residual() -> None:
    assert {r.level for r in residuals(prediction(), [rank(0, [5, 900])])} == {"allocated"}
    read = rank(0, [5, 900])
    read.steps[1].phases[StepPhase.FORWARD].device_used_bytes = 4000
    assert by_where(residuals(prediction(), [read]))["device_used", "peak"].measured_bytes == 4000


def test_nothing_measured_gives_nothing() -> None:
    assert residuals(prediction(), []) == []
    off = rank(0, [1, 1])
    for step in off.steps:
        step.phases.clear()
    assert residuals(prediction(), [off]) == []


def test_categories_come_from_the_ledger_on_either_side() -> None:
    ledger = MemoryBreakdown({P: 390, MemoryCategory.COMM_BUFFERS: 8})
    found = by_where(residuals(prediction(), [rank(0, [700, 700], ledger)]))
    assert found["allocated", "forward.end.parameters"].measured_bytes == 390
    assert found["allocated", "forward.end.gradients"].measured_bytes == 0  # predicted, not there
    assert found["allocated", "forward.end.comm_buffers"].predicted_bytes == 0  # there, not predicted
    assert ("allocated", "forward.end.activations") not in found


def test_build_is_compared_where_both_sides_have_it() -> None:
    expected = prediction()
    built = Moment(50, MemoryBreakdown({P: 50}))
    expected.first_step.phases[StepPhase.BUILD] = PhasePrediction(end=built, peak=Moment(60))
    measured = rank(0, [5, 900])
    measured.build = PhaseReading(end_allocated_bytes=51, peak_allocated_bytes=61)
    found = by_where(residuals(expected, [measured]))
    assert found["allocated", "build.peak"].measured_bytes == 61
    assert found["allocated", "build.end"].predicted_bytes == 50


def test_row_of_a_finished_run() -> None:
    record = RunRecord(
        run_id="x",
        name="study",
        status=RunStatus.OK,
        started_at="2025-01-01T00:00:00+00:00",
        command=[],
        config={"world_size": 2, "overrides": ["parallel=ddp"]},
        environment={},
        prediction=prediction(),
        ranks=[rank(0, [5, 800], MemoryBreakdown({P: 500})), rank(1, [5, 1250])],
        metrics=RunMetrics(2.0, 1.0, 0.5, 512.0),
    )
    row = comparison_row(record, "here/record.json")
    assert row["predicted_allocated_bytes"] == 1000
    assert row["measured_allocated_bytes"] == 1250
    assert row["allocated_error_percent"] == pytest.approx(-20.0)
    assert row["measured_reserved_bytes"] is None
    assert row["reserved_error_percent"] is None
    assert row["unattributed_bytes"] == 200
    assert (row["name"], row["status"], row["world_size"], row["overrides"]) == ("study", "ok", 2, ["parallel=ddp"])
    assert (row["step_seconds"], row["tokens_per_second"], row["record"]) == (0.5, 512.0, "here/record.json")


def test_row_of_a_run_that_measured_nothing() -> None:
    record = RunRecord("x", "study", RunStatus.INVALID, "", [], {"overrides": ["a=b"]}, {}, error="a=b: no")
    row = comparison_row(record)
    assert row["status"] == "invalid"
    assert row["measured_allocated_bytes"] is row["predicted_allocated_bytes"] is row["unattributed_bytes"] is None
