"""Hugging Face families: what the replay predicts of forward and backward is what the CPU's tracker sees, to the byte.

Single process, second step, so that gradients and optimizer states exist; the strategies are in tests/distributed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lab.analytic import predict
from lab.analytic.attention_shape import AttentionShape, choose_masked_backend
from lab.analytic.attention_workspace import workspace_bytes
from lab.analytic.families import make_decoder
from lab.analytic.step import Replay
from lab.analytic.timeline import spans_of, totals
from lab.build import build
from lab.config import RunConfig, load
from lab.measure import StorageTracker
from lab.vocab import AttentionBackend, MemoryCategory, Precision, StepPhase
from tests.unit.hf_cases import CONFIGS, hf_overrides, write_config

CPU = torch.device("cpu")
Readings = dict[StepPhase, tuple[int, int]]  # bytes above the phase's start: at its end, at its peak
MORE = {
    "mixed": ["precision=bf16_mixed"],
    "fp32": ["precision=fp32", "train.micro_batch_size=1"],
    "pure, checkpointed": ["precision=bf16_pure", "checkpointing=full"],
    "eager": ["precision=bf16_mixed", "attention=eager", "checkpointing=every_k"],
}


def measured(cfg: RunConfig, tracker: StorageTracker) -> Readings:
    """Forward and backward of the second step."""
    torch.set_num_threads(1)
    engine = build(cfg, CPU)
    shape = (cfg.train.micro_batch_size, cfg.train.seq_len)
    tokens = torch.randint(0, cfg.model.vocab_size, shape)
    readings: Readings = {}
    for _ in range(2):
        tracker.reset_peak()
        start = tracker.current_bytes
        loss = engine.forward(tokens, tokens)
        readings[StepPhase.FORWARD] = (tracker.current_bytes - start, tracker.peak_bytes - start)
        tracker.reset_peak()
        start = tracker.current_bytes
        engine.backward(loss, last_micro_step=True)
        readings[StepPhase.BACKWARD] = (tracker.current_bytes - start, tracker.peak_bytes - start)
        del loss
        engine.optimizer_step()
        engine.zero_grad()
    engine.close()
    return readings


def predicted(cfg: RunConfig) -> Readings:
    replay = Replay(cfg)
    replay.build()
    for _ in range(2):
        replay.step()
    curve = totals(replay.trace.events)
    return {
        phase: (curve[last] - curve[first], max(curve[first : last + 1]) - curve[first])
        for phase, first, last in spans_of(replay.trace.events, 1)
        if phase in (StepPhase.FORWARD, StepPhase.BACKWARD)
    }


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("family", CONFIGS)
def test_forward_and_backward_to_the_byte(family: str, more: str, tmp_path: Path, tracker: StorageTracker) -> None:
    path = write_config(tmp_path, family)
    cfg = load(hf_overrides(path, "hardware=cpu", *MORE[more]))
    assert predicted(cfg) == measured(cfg, tracker)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_quantized_with_adapters_to_the_byte(family: str, tmp_path: Path, tracker: StorageTracker) -> None:
    """QLoRA; checkpointing makes the frozen embedding's output a leaf with a gradient of its own."""
    finetuning = ["adapter=lora", "quantization=nf4", "precision=bf16_mixed", "checkpointing=full"]
    cfg = load(hf_overrides(write_config(tmp_path, family), "hardware=cpu", *finetuning))
    assert predicted(cfg) == measured(cfg, tracker)


def test_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    """Names, shapes and order."""
    from lab.analytic.architecture import parameters
    from lab.build import build_meta_model

    for family in CONFIGS:
        cfg = load(hf_overrides(write_config(tmp_path, family), "hardware=cpu"))
        real = [(name, tuple(p.shape)) for name, p in build_meta_model(cfg).named_parameters()]
        assert [(s.name, s.shape) for s in parameters(cfg.model)] == real, family


def test_an_unknown_family_is_predicted_as_a_llama_and_says_so(tmp_path: Path) -> None:
    llama = load(hf_overrides(write_config(tmp_path, "llama"), "hardware=h200"))
    other = load(hf_overrides(write_config(tmp_path, "llama", model_type="olmo"), "hardware=h200"))
    assert other.model.family == "other"
    assert predict(other).steady.allocated_bytes == predict(llama).steady.allocated_bytes
    assert any("no op list for model_type olmo" in a for a in predict(other).assumptions)
    assert not any("no op list" in a for a in predict(llama).assumptions)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    path = write_config(tmp_path, "mistral", hidden_act="relu2", rope_scaling={"rope_type": "longrope"})
    said = " ".join(predict(load(hf_overrides(path, "hardware=h200"))).assumptions)
    assert "activation relu2" in said
    assert "rotary frequencies" in said


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["precision=bf16_mixed"], "also holds their fp32 logits, 179200 bytes"),
        (["precision=bf16_pure"], "also holds their logits, 89600 bytes"),
        (["precision=bf16_mixed", "parallel=zero3", "world_size=2"], "also holds their logits, 89600 bytes"),
    ],
)
def test_what_other_loops_keep_through_accelerate_is_said(options: list[str], kept: str, tmp_path: Path) -> None:
    """2 x 32 tokens of 700 logits: in fp32 where Accelerate's own autocast runs, in half precision elsewhere."""
    path = write_config(tmp_path, "llama")
    said = " ".join(predict(load(hf_overrides(path, "hardware=h200", "engine=accelerate", *options))).assumptions)
    assert kept in said
    assert "prepares the lab's module" in said


def test_the_lab_keeps_its_own_op_list() -> None:
    from lab.analytic.decoder import Decoder

    replay = Replay(load(["model=tiny", "hardware=cpu"]))
    replay.build()
    assert type(make_decoder(replay.cfg, replay.ops, replay.rule.parameters, replay.rule)) is Decoder


def test_every_sliding_layer_keeps_a_mask_of_its_own(tmp_path: Path) -> None:
    """On a GPU: 2 x 32 x 32 numbers in bf16 per layer, beside one mask of bools that all layers share."""

    def activations(window: int, *more: str) -> int:
        cfg = load(hf_overrides(write_config(tmp_path, "mistral", sliding_window=window), "hardware=h200", *more))
        return predict(cfg).steady.phases[StepPhase.FORWARD].end.categories[MemoryCategory.ACTIVATIONS]

    repeated = 2 * 2 * (4 - 2) * 32 * 8 * 2  # keys and values of twice the heads
    for more in (["attention=cudnn"], ["precision=bf16_pure"]):
        assert activations(16, *more) - activations(33, *more) == 2 * (2 * 32 * 32 * 2 + repeated), more


@pytest.mark.parametrize(
    ("head_dim", "precision", "expected"),
    [
        (128, Precision.BF16_MIXED, AttentionBackend.CUDNN),
        (192, Precision.BF16_MIXED, AttentionBackend.CUDNN),
        (264, Precision.BF16_MIXED, AttentionBackend.MEM_EFFICIENT),
        (36, Precision.FP16_MIXED, AttentionBackend.MATH),
        (36, Precision.FP32, AttentionBackend.MEM_EFFICIENT),
        (50, Precision.FP32, AttentionBackend.MATH),
    ],
)
def test_the_kernel_that_takes_a_mask(head_dim: int, precision: Precision, expected: AttentionBackend) -> None:
    shape = AttentionShape(2, 64, 4, 2, head_dim)
    assert choose_masked_backend(AttentionBackend.AUTO, "cuda", precision, shape, 0.1) is expected


def test_scratch_of_the_memory_efficient_kernel() -> None:
    """As kernel_backward.h counts it: tiles of 64 x 64, 128 x 128, and 128 x 64 with keys' and values' sums."""
    assert workspace_bytes(AttentionShape(2, 200, 3, 3, 64), 2) == 6 * 4 * (16 + 4 * 64 * 64)
    assert workspace_bytes(AttentionShape(2, 200, 3, 3, 80), 2) == 6 * 2 * (16 + 4 * 128 * 128)
    assert workspace_bytes(AttentionShape(2, 200, 3, 3, 80), 4) == 6 * 2 * 2 * (16 + 4 * 128 * 64)
    tiles = 2 * 3 * (16 + 4 * 128 * 64)
    assert workspace_bytes(AttentionShape(2, 200, 3, 3, 192), 2) == 6 * (tiles + 2 * 4 * 4 * 64 * 256)
    assert workspace_bytes(AttentionShape(100, 200, 3, 3, 192), 2) == 300 * (tiles + 2 * 4 * 1 * 64 * 256)
