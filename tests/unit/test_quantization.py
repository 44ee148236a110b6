"""Quantized storage by hand and against bitsandbytes itself; what frozen parameters leave out of the graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lab.analytic.accumulator import Accumulator
from lab.analytic.architecture import ParameterSpec
from lab.analytic.gemm_4bit import runs_as_one_kernel
from lab.analytic.ops import Ops, Parameter
from lab.analytic.quantization import packed_shape, quantize, state_bytes
from lab.analytic.step import Replay
from lab.analytic.tape import FP32, Tape, Trace
from lab.config import ConfigError, QuantizationConfig, load
from lab.transforms.quantization import (
    check_compute_dtype,
    check_storage_dtype,
    quantization_state,
    quantize_linears,
    quantized_parameter,
)

SQUARE = (2048, 2048)
NUMEL = 2048 * 2048
NF4, DOUBLE = QuantizationConfig("nf4"), QuantizationConfig("nf4_double")


def stored_bytes(shape: tuple[int, ...], cfg: QuantizationConfig) -> int:
    elements, size = packed_shape(shape[0] * shape[1], cfg)
    return elements * size + sum(state_bytes(shape, cfg).values())


def test_bytes_per_parameter_by_hand() -> None:
    """NF4: 4 bits and 32 / 64; double: 8 / 64 + 32 / (64 * 256) = 0.127 bits, 0.373 less (QLoRA, section 3)."""
    tables = 4 * 16
    assert stored_bytes(SQUARE, NF4) == NUMEL // 2 + NUMEL // 16 + tables
    assert (stored_bytes(SQUARE, NF4) - tables) / NUMEL == 0.5625
    more_tables = tables + 4 * 256 + 4
    assert (stored_bytes(SQUARE, DOUBLE) - more_tables) / NUMEL == pytest.approx(0.516, abs=2e-4)
    constants = 8 * (stored_bytes(SQUARE, DOUBLE) - more_tables - NUMEL // 2) / NUMEL
    assert constants == pytest.approx(0.127, abs=5e-4)
    assert 0.5 - constants == pytest.approx(0.373, abs=5e-4)
    assert stored_bytes(SQUARE, QuantizationConfig("int8")) == NUMEL + 4 * 2048


@pytest.mark.parametrize("kind", ["int8", "fp4", "nf4", "nf4_double"])
@pytest.mark.parametrize("shape", [(48, 128), (33, 65), (96, 256)])
def test_bitsandbytes_stores_what_is_predicted(kind: str, shape: tuple[int, int]) -> None:
    for storage in ("uint8", "bf16") if kind != "int8" and shape[1] % 2 == 0 else ("uint8",):
        cfg = QuantizationConfig(kind, compute_dtype="fp32", storage_dtype=storage)
        model = nn.Sequential()
        with torch.device("meta"):
            model.add_module("proj", nn.Linear(shape[1], shape[0], bias=False))
        quantize_linears(model, cfg)
        layer = model.get_submodule("proj")
        dtype = torch.float16 if kind == "int8" else torch.float32
        layer.weight = quantized_parameter(layer, layer.weight, torch.randn(shape).to(dtype))
        elements, size = packed_shape(shape[0] * shape[1], cfg)
        assert (layer.weight.numel(), layer.weight.element_size()) == (elements, size)
        shared = 4 * 256 if kind == "nf4_double" else 0  # bitsandbytes' own table, once for all layers
        storages = {t.untyped_storage().data_ptr(): t.nbytes for t in quantization_state(model)}
        assert sum(storages.values()) - shared == sum(state_bytes(shape, cfg).values())


def test_skipped_modules_and_everything_but_linears_stay() -> None:
    head, inner = (
        ParameterSpec("head.weight", (8, 4), -1, linear=True),
        ParameterSpec("a.q.weight", (4, 4), 0, linear=True),
    )
    norm = ParameterSpec("norm.weight", (4,), -1)
    specs = quantize([head, inner, norm], NF4)
    assert [s.quantized for s in specs] == ["", "nf4", ""]
    assert [s.trainable for s in specs] == [True, False, True]
    assert quantize([inner], replace(NF4, skip_modules=("q",))) == [inner]


@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "kernel"),
    [
        (4, 4096, 4096, True),
        (2048, 4096, 4096, False),
        (1024, 2048, 512, False),
        (512, 2048, 512, True),  # a short inner dimension, fewer than 132 / 3 tiles
        (32, 11008, 4096, True),  # 172 tiles: more than a wave of 132
        (33, 11008, 4096, False),
        (16, 4000, 4000, False),  # 4000 is no multiple of 64: 62.5 blocks
    ],
)
def test_which_way_a_4_bit_product_takes(rows: int, out_features: int, in_features: int, kernel: bool) -> None:
    ops = Ops(Tape(Trace()), num_streaming_multiprocessors=132)
    assert runs_as_one_kernel(rows, out_features, in_features, 2, 64, ops) is kernel


def parameter(tape: Tape, name: str, shape: tuple[int, ...], trainable: bool) -> Parameter:
    numel = shape[0] * (shape[1] if len(shape) > 1 else 1)
    return Parameter(name, shape, tape.new(numel, FP32, name), Accumulator(name), trainable)


def test_a_frozen_linear_keeps_its_weight_and_not_its_input() -> None:
    """mm saves each operand for the other's gradient only."""
    tape = Tape(Trace())
    ops = Ops(tape)
    frozen, trained = parameter(tape, "w", (4, 8), False), parameter(tape, "v", (8, 8), True)
    source = tape.new(16, FP32, "x")
    nothing = ops.linear(source, frozen, None, 2, "first")
    assert nothing.node is None
    x = ops.linear(source, trained, None, 2, "second")
    y = ops.linear(x, frozen, None, 2, "third")
    assert x.node is not None
    assert y.node is not None
    assert [t.numel for t in x.node.saved] == [16]  # its input alone, which needs no gradient itself
    assert [t.numel for t in y.node.saved] == [32]  # the weight alone
    tape.backward(ops.scale(y, "loss"))
    assert trained.accumulator.grad is not None
    assert frozen.accumulator.grad is None


def test_a_gpu_without_bf16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(["model=tiny", "hardware=cpu", "adapter=lora", "quantization=nf4"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    check_compute_dtype(cfg, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"quantization\.compute_dtype=bf16: .*7\.5"):
        check_compute_dtype(cfg, torch.device("cuda", 0))


def test_packed_bytes_under_an_fsdp_that_cannot_cut_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["model=tiny", "parallel=fsdp", "world_size=2", "adapter=lora", "quantization=nf4"]
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    check_storage_dtype(load([*given, "quantization.storage_dtype=bf16"]))
    with pytest.raises(ConfigError, match=r"quantization\.storage_dtype=uint8: FSDP2 of torch 2\.11\.0.*bf16"):
        check_storage_dtype(load(given))
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    check_storage_dtype(load(given))


def test_an_int8_product_of_fp16_inputs_casts_nothing() -> None:
    """A.to(torch.float16) is the tensor itself there: attention's output under autocast. A bf16 one is copied."""
    base = ["model=hf", "quantization=int8", "adapter=lora", "adapter.prepare_kbit=false", "hardware=h200"]
    base += ["model.path=configs/hf/llama_1b.json", "model.random_weights=true", "model.num_layers=2"]
    for precision, casts in (("fp16_mixed", False), ("bf16_mixed", True)):
        replay = Replay(load([*base, f"precision={precision}", "train.seq_len=64"]))
        replay.build()
        replay.step()
        labels = {event[4] for event in replay.trace.events}
        assert {"attention projection, int32", "query input, fp16"} <= labels  # behind an fp32 norm
        assert ("attention projection input, fp16" in labels) is casts
