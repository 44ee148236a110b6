"""Steps that the loss scaler skips: told by the engine, kept in the record, not taken for the steady state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lab.build import build
from lab.compare import comparison_row, residuals, skip_notes
from lab.config import RunConfig, load
from lab.data import Batches
from lab.integrations.phases import PhaseSwitch
from lab.integrations.reporting import memory_logs
from lab.integrations.run import TrainerRun
from lab.loop import Losses, live_tensors, train
from lab.measure import Meter, make_meter
from lab.metrics import run_metrics
from lab.optim import scaled_step
from lab.parallel.accelerate_engine import _Accelerated
from lab.record import RankMeasurement, RunRecord, StepMeasurement, from_json, to_json
from lab.run_state import RunState
from lab.track import RunFolder
from lab.track.bundle import slim
from lab.vocab import Precision, RunStatus, StepPhase
from tests.unit.test_compare import prediction, rank

CPU = torch.device("cpu")
STEP = StepPhase.OPTIMIZER_STEP


def ranks(peaks: list[int], *skipped: int) -> list[RankMeasurement]:
    """Two ranks; the second tells of the skipped steps."""
    out = [rank(0, peaks), rank(1, [p - 1 for p in peaks])]
    for i in skipped:
        out[1].steps[i].skipped = True
    return out


def record(measured: list[RankMeasurement]) -> RunRecord:
    return RunRecord("id", "name", RunStatus.OK, "", [], {}, {}, prediction=prediction(), ranks=measured)


@pytest.mark.parametrize(
    ("skipped", "steady", "note"),
    [
        ([], 3, None),
        ([1], 3, "step 1 was skipped: the loss scaler found an overflow"),
        ([3], 2, "step 3 was skipped: the loss scaler found an overflow; step 2 stands for the steady state"),
        ([2, 3], 1, "steps 2, 3 were skipped: the loss scaler found an overflow; step 1 stands for the steady state"),
        (
            [0, 1, 3],
            2,
            "steps 0, 1, 3 were skipped: the loss scaler found an overflow; the first step is not compared; "
            "step 2 stands for the steady state; step 2 is the first that was taken",
        ),
        (
            [1, 2, 3],
            3,
            "steps 1, 2, 3 were skipped: the loss scaler found an overflow; "
            "step 3 is compared all the same, no step after the first was taken",
        ),
        (
            [0, 1, 2, 3],
            3,
            "steps 0, 1, 2, 3 were skipped: the loss scaler found an overflow; the first step is not compared; "
            "step 3 is compared all the same, no step after the first was taken",
        ),
    ],
)
def test_the_steady_step_is_the_last_that_every_rank_took(skipped: list[int], steady: int, note: str | None) -> None:
    peaks = [500, 901, 902, 903]
    measured = ranks(peaks, *skipped)
    whole = record(measured)
    assert whole.steady_step == steady
    assert skip_notes(measured) == ([] if note is None else [note])
    found = {r.where: r.measured_bytes for r in residuals(prediction(), measured)}
    assert found["peak"] == peaks[steady]
    assert comparison_row(whole)["measured_allocated_bytes"] == peaks[steady]
    assert ("first_step.peak" in found) is (0 not in skipped)
    slimmed = slim(whole)
    assert [[s.step for s in r.steps] for r in slimmed.ranks] == [[0, steady]] * 2
    assert slimmed.steady_step == 1
    assert residuals(prediction(), slimmed.ranks) == residuals(prediction(), measured)


def test_one_step_and_none_have_no_steady_state() -> None:
    assert record([]).steady_step is None
    assert record(ranks([900], 0)).steady_step is None
    assert skip_notes([]) == []


def test_the_field_is_written_where_it_says_something() -> None:
    step = StepMeasurement(4, 0.5)
    assert "skipped" not in to_json(step)
    assert from_json(StepMeasurement, to_json(step)) == step  # as in a record of before
    step.skipped = True
    assert to_json(step)["skipped"] is True
    assert from_json(StepMeasurement, to_json(step)) == step
    refused = replace(prediction(), fits=False)
    assert to_json(refused)["fits"] is False  # None by default: False is news


def test_the_step_time_is_that_of_steps_that_were_taken() -> None:
    cfg = load(["hardware=cpu"])
    measured = ranks([5] * 6)
    for step, seconds in zip(measured[0].steps, [9.0, 8.0, 1.0, 0.1, 0.1, 2.0], strict=True):
        step.seconds, step.skipped = seconds, seconds == 0.1
    assert run_metrics(cfg, 1, measured, None).step_seconds == 1.5
    for step in measured[0].steps:
        step.skipped = True
    assert run_metrics(cfg, 1, measured, None).step_seconds == 0.55


def test_a_trainers_log_compares_no_skipped_step() -> None:
    step = rank(0, [5, 900]).steps[1]
    assert "memory/error_percent" in memory_logs(step, prediction())
    step.skipped = True
    assert "memory/error_percent" not in memory_logs(step, prediction())


def fp16(*overrides: str) -> RunConfig:
    """Past the rule that keeps fp16 off CPUs, where it is slow but works."""
    cfg = load(["hardware=cpu", "model=tiny", "train.seq_len=32", "train.steps=3", "precision=fp32", *overrides])
    return replace(cfg, precision=replace(cfg.precision, kind=Precision.FP16_MIXED))


def overflowing_run(cfg: RunConfig, meter: Meter, at: int = 2) -> list[float]:
    """A run whose step ``at`` overflows: the loop's own, with a loss scale beyond fp16's range before that step."""
    meter.start()
    tokens = torch.randint(0, cfg.model.vocab_size, (4000,), generator=torch.Generator().manual_seed(0))
    engine: Any = build(cfg, CPU)
    batches, losses = Batches(cfg, tokens.to(torch.uint16).numpy(), CPU, rank=0), Losses(cfg.train.steps, CPU)
    meter.set_live_tensors(lambda: live_tensors(engine, batches, losses), engine.unseen_allocations)
    meter.build_done()
    train(cfg, engine, batches, meter, losses, lambda step: engine.scaler.update(1e30) if step == at - 1 else None)
    meter.stop()
    engine.close()
    return losses.read(cfg.train.steps)


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_an_overflow_of_a_real_run_is_in_its_measurement(clip: str) -> None:
    cfg = fp16("optimizer.implementation=foreach", f"train.max_grad_norm={clip}")
    meter = make_meter(cfg, CPU, 0, 0)
    overflowing_run(cfg, meter)
    measured = meter.measurement()
    assert [s.skipped for s in measured.steps] == [False, False, True]
    assert meter.skipped_steps == [2]
    _, taken, skipped = (s.phases for s in measured.steps)
    assert skipped[STEP].peak_allocated_bytes < taken[STEP].peak_allocated_bytes  # no temporaries of the optimizer's
    assert skipped[STEP].end_allocated_bytes == taken[STEP].end_allocated_bytes
    assert record([measured]).steady_step == 1
    # The ledgers are of the first and the last step: the steady one has none here, and nothing needs it.
    assert taken[STEP].ledger is None
    assert {r.where for r in residuals(prediction(), [measured])} >= {"peak", "forward.end", "first_step.peak"}
    assert comparison_row(record([measured]))["unattributed_bytes"] is None


def test_a_fused_step_always_runs_and_needs_the_same() -> None:
    cfg = fp16("optimizer.implementation=fused")
    meter = make_meter(cfg, CPU, 0, 0)
    overflowing_run(cfg, meter)
    steps = meter.measurement().steps
    assert not any(s.skipped for s in steps)
    usual, overflown = ({p: r.peak_allocated_bytes for p, r in s.phases.items()} for s in steps[1:])
    assert usual == overflown


def test_without_measuring_the_step_is_known_all_the_same() -> None:
    meter = Meter(0, 0, "cpu")
    overflowing_run(fp16("optimizer.implementation=for_loop"), meter, at=1)
    assert meter.skipped_steps == [1, 2]  # halved once, the scale is still too high


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_either_way_an_overflow_changes_no_weight(implementation: str) -> None:
    cfg = fp16(f"optimizer.implementation={implementation}")
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], **{implementation: True})
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
    assert scaled_step(cfg, optimizer, scaler, [weight]) is (implementation == "fused")
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert not optimizer._optimizer_step_post_hooks
    assert scaler.get_scale() == 2.0**15


def test_accelerates_own_flag() -> None:
    """Its optimizer around a real one and a real scaler; Accelerate itself refuses fp16 on a CPU."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState, GradientState

    Accelerator(cpu=True)
    weight = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu")
    engine: Any = _Accelerated()
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight], foreach=True), False, scaler)
    engine.cfg, engine._step, engine.accelerator = fp16(), 0, SimpleNamespace()
    engine.prepared = (nn.Module(), optimizer)
    told = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale((weight * factor).sum()).backward()
        engine.optimizer_step()
        engine.zero_grad()
        told.append(engine.step_was_skipped)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert told == [False, True, False]


def test_a_snapshot_of_a_skipped_step_says_so() -> None:
    cfg = fp16("optimizer.implementation=foreach")
    for at, told in ((2, True), (99, False)):
        meter = make_meter(replace(cfg, measure=replace(cfg.measure, level="snapshot")), CPU, 0, 0)
        overflowing_run(cfg, meter, at)
        assert any("its step was skipped" in note for note in meter.measurement().notes) is told


def test_the_runs_record_names_them(tmp_path: Path) -> None:
    cfg = load(["hardware=cpu", f"launch.output_dir={tmp_path}"])
    state = RunState(cfg, [], folder=RunFolder.create(cfg, "run"), prediction=prediction())
    assert state.record(RunStatus.OK, ranks([5, 900])).notes == []
    state.notes.append("before")
    made = state.record(RunStatus.OK, ranks([5, 900, 700], 2))
    assert made.notes == ["before", *skip_notes(made.ranks)]
    assert next(r for r in made.residuals if r.where == "peak").measured_bytes == 900
    state.meter, state.losses = Meter(0, 0, "cpu"), Losses(3, CPU)  # measure=off
    state.meter.current_step = 1
    state.meter.mark_skipped()
    state.losses.read(3)
    assert [s.skipped for s in state.measurement(0.5).steps] == [False, True, False]


def test_a_trainers_run_asks_accelerates_wrapper() -> None:
    run = object.__new__(TrainerRun)
    run.cfg, run.device, run.meter, run.steps_begun = fp16(), CPU, Meter(0, 0, "cpu"), 0
    run.phases = PhaseSwitch(run.meter)
    for wrapper in (SimpleNamespace(step_was_skipped=False), SimpleNamespace(step_was_skipped=True), object()):
        run._accelerated = wrapper
        run.begin_step()
        run.end_step()
    assert run.meter.skipped_steps == [1]
