"""Predictions against a hand derivation, published shapes and the probe figures of real H200 runs."""

from __future__ import annotations

import pytest

from lab.analytic import predict
from lab.analytic.architecture import num_parameters
from lab.analytic.reduce import column_partials
from lab.config import load
from lab.units import MIB
from lab.vocab import MemoryCategory, StepPhase

SHAPE = ["train.micro_batch_size=4", "train.seq_len=2048", "hardware=h200", "data.tokenizer_vocab_size=2048"]

BUCKET_VIEWS = ["parallel=ddp", "world_size=2", "parallel.ddp.gradient_as_bucket_view=true"]


def mib(num_bytes: int) -> float:
    return num_bytes / MIB


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("1b", 953_223_168), ("7b", 6_738_415_616), ("125m", 124_373_760)],
)
def test_parameter_counts(preset: str, parameters: int) -> None:
    """1b: the size that the records carry; 7b: Llama-2 7B (6 738 415 616); 125m: GPT-2 small without biases,
    12 (12 h^2 + 2 h) + h + (50304 + 1024) h at h = 768."""
    assert num_parameters(load([f"model={preset}"]).model) == parameters


def test_pure_bf16_after_forward_by_hand() -> None:
    """Per layer, in units of one bf16 [4 * 2048, 2048] tensor (32 MiB): block input, norm out, q, k, v, attention
    out, mid residual, norm out = 8; gate, up, silu, product = 4 x 88 MiB; log-sum-exp 0.5; two rstd; plus final
    residual and norm, the fp32 log-softmax (1000), states 2 + 4 B per parameter, two cuBLAS workspaces.
    """
    steady = predict(load([*SHAPE, "model=1b", "precision=bf16_pure"])).steady
    rows = 4 * 2048
    per_layer = 8 * 32 + 4 * 88 + 4 * 16 * 2048 * 4 / MIB + 2 * rows * 4 / MIB
    states = 953_223_168 * 6 / MIB
    by_hand = 16 * per_layer + 2 * 32 + rows * 4 / MIB + rows * 32000 * 4 / MIB + states + 64
    after_forward = steady.phases[StepPhase.FORWARD].end
    # beside those: batches 0.25 MiB, rope tables 1 MiB, scalars, and rests of up to 1 MiB handed out with a block
    assert mib(after_forward.total_bytes) == pytest.approx(by_hand, abs=4.0)
    assert mib(after_forward.categories[MemoryCategory.LIBRARY_WORKSPACES]) == 64
    # backward: two fp32 [rows, vocab] gradients at once beside the log-softmax
    assert mib(steady.allocated_bytes - after_forward.total_bytes) == pytest.approx(2000, abs=0.1)


@pytest.mark.parametrize(
    ("overrides", "after_forward", "peak", "after_step"),
    [
        (["precision=bf16_mixed"], 26_059, 28_059, 14_609),
        (["precision=bf16_pure"], 16_321, 18_321, 7_338),
        (["precision=bf16_pure", "checkpointing=full"], 7_099, 9_099, 7_341),
        ([*BUCKET_VIEWS, "precision=bf16_mixed"], 29_695, 31_695, 14_609),
        (["precision=bf16_mixed", "parallel=fsdp", "world_size=2"], 16_572, 18_670, 7_339),
        (["precision=bf16_mixed", "parallel=fsdp", "world_size=2", "checkpointing=full"], 7_347, 9_445, 7_339),
    ],
)  # fmt: skip
def test_measured_1b_on_h200(overrides: list[str], after_forward: int, peak: int, after_step: int) -> None:
    """MiB on an H200, torch 2.11, by a script outside the lab, with two batch buffers fewer and no record of losses."""
    steady = predict(load([*SHAPE, "model=1b", *overrides])).steady
    phases = steady.phases
    assert mib(phases[StepPhase.FORWARD].end.total_bytes) == pytest.approx(after_forward, rel=1e-3)
    assert mib(steady.allocated_bytes) == pytest.approx(peak, rel=1e-3)
    assert mib(phases[StepPhase.OPTIMIZER_STEP].end.total_bytes) == pytest.approx(after_step, rel=1e-3)


ATTENTION = ["experiment=attention", "train.steps=5", "hardware=h200"]
SHARDED = ["experiment=fsdp_vs_zero3", "parallel=fsdp", "hardware=h200"]


@pytest.mark.parametrize(
    ("overrides", "allocated", "reserved"),
    [
        ([*ATTENTION, "attention=math", "train.seq_len=2048"], 1_790_786_048, 1_839_202_304),
        ([*ATTENTION, "attention=math", "train.seq_len=8192"], 19_335_076_352, 20_061_356_032),
        ([*ATTENTION, "attention=eager", "train.seq_len=8192"], 25_359_669_760, 28_479_324_160),
        (SHARDED, 7_552_011_264, 9_527_361_536),  # the peak is the root unit's reduce-scatter
        ([*SHARDED, "model=3b", "model.num_kv_heads=8"], 23_566_669_824, 26_833_059_840),
    ],
)
def test_measured_to_the_block(overrides: list[str], allocated: int, reserved: int) -> None:
    """Peaks of the steady step on an H200, torch 2.11: experiments/attention, experiments/fsdp_vs_zero3."""
    steady = predict(load(overrides)).steady
    assert abs(steady.allocated_bytes - allocated) <= 512
    assert steady.reserved_bytes == reserved


@pytest.mark.parametrize(
    ("rows", "columns", "measured"),
    [(2048, 512, (8_388_608, 16)), (2048, 1408, (23_068_672, 44)), (2048, 2816, (46_137_344, 88)), (128, 512, (0, 0))],
)
def test_column_sum(rows: int, columns: int, measured: tuple[int, int]) -> None:
    """Bias gradients on an H200 (allocator trace): partial sums and semaphores, two allocations."""
    assert column_partials(rows, columns, 132) == measured


def test_every_category_is_counted_once() -> None:
    steady = predict(load(["hardware=h200", "model=tiny"])).steady
    for phase in steady.phases.values():
        for moment in (phase.end, phase.peak):
            assert moment.total_bytes == sum(moment.categories.values())


def test_first_step_has_no_optimizer_state_before_its_end() -> None:
    first = predict(load(["hardware=h200", "model=tiny"])).first_step
    forward = first.phases[StepPhase.FORWARD].peak
    assert forward.categories[MemoryCategory.OPTIMIZER_STATES] == 0
    assert first.phases[StepPhase.OPTIMIZER_STEP].end.categories[MemoryCategory.OPTIMIZER_STATES] > 0


def test_more_saved_without_checkpointing_and_chunking() -> None:
    def peak(*overrides: str) -> int:
        return predict(load([*SHAPE, "model=1b", *overrides])).steady.allocated_bytes

    plain = peak()
    assert peak("checkpointing=full") < peak("checkpointing=selective") < plain
    assert peak("loss=chunked") < peak("loss=no_upcast") < peak("loss=in_place") < plain
    assert peak("attention=math") > peak("attention=flash")
