"""What a run allocates and frees on a CPU, storage by storage, is what the replay says, in its order.

Which storage is freed counts, not its size alone: of two equal ones the wrong one may be the one that lives.

A peak hides much: a tensor that dies an operation early changes no peak, and yet which block the next gets on a GPU.
Frees between two allocations are sorted, as their order changes nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lab.analytic.layers import replay_steps
from lab.analytic.segments import spelled_out
from lab.analytic.tape import ALLOC, FREE, MARK
from lab.build import build
from lab.config import load
from lab.data import make_batches
from lab.loop import Losses, live_tensors, train
from lab.measure import backend, make_meter
from lab.measure.cpu_tracker import StorageTracker
from lab.progress import Progress
from tests.unit.hf_cases import hf_overrides, write_config

SMALLEST = 2048  # bytes: scalars and rows of statistics come and go within kernels
BEFORE = 1 << 40  # freed: what was there when the first step began, told by its size
Events = list[tuple[int, int]]  # (bytes allocated or minus bytes freed, which storage)


class Recorder(StorageTracker):
    """The lab's tracker, and a list of what it sees."""

    events: ClassVar[Events] = []
    number: ClassVar[dict[int, int]] = {}  # by StorageImpl address
    count: ClassVar[int] = 0

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        before = self._live.get(key, (0,))[0]
        super()._see(storage)
        after = self._live.get(key, (0,))[0]
        if before == after:
            return
        if before:
            Recorder.events.append((-before, Recorder.number[key]))
        if after:
            Recorder.count += 1
            Recorder.number[key] = Recorder.count
            Recorder.events.append((after, Recorder.count))

    def _gone(self, key: int, reference: Any) -> None:
        if size := self._live[key][0]:
            Recorder.events.append((-size, Recorder.number[key]))
        super()._gone(key, reference)


def order(events: Events) -> list[int]:
    """Bytes of each allocation; -1 - n where the n-th is freed, with frees in between sorted."""
    out: list[int] = []
    freed: list[int] = []
    ordinal: dict[int, int] = {}
    for nbytes, which in events:
        if nbytes >= SMALLEST:
            out += sorted(freed)
            freed = []
            ordinal[which] = len(ordinal)
            out.append(nbytes)
        elif nbytes <= -SMALLEST:
            freed.append(-1 - ordinal[which] if which in ordinal else nbytes - BEFORE)
    return out + sorted(freed)


def measured(overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(backend, "StorageTracker", Recorder)
    cfg, device = load(overrides), torch.device("cpu")
    meter = make_meter(cfg, device, 0, 0)
    meter.start()
    batches, losses = make_batches(cfg, device, 0), Losses(cfg.train.steps, device)
    engine = build(cfg, device)
    meter.set_live_tensors(lambda: live_tensors(engine, batches, losses), engine.unseen_allocations)
    meter.build_done()
    gc.collect()  # what earlier tests left
    Recorder.events = []
    train(cfg, engine, batches, meter, losses, Progress(cfg, engine.num_parameters, losses, enabled=False))
    events = list(Recorder.events)
    meter.stop()
    return order(events)


def predicted(overrides: Sequence[str]) -> list[int]:
    replay = replay_steps(load(overrides), 0)
    events = spelled_out(replay.trace.events, replay.trace.segments)
    first = next(i for i, e in enumerate(events) if e[0] == MARK)
    return order([(e[2] if e[0] == ALLOC else -e[2], e[1]) for e in events[first:] if e[0] in (ALLOC, FREE)])


COMMON = ["hardware=cpu", "tracker=none", "measure=counters", "train.steps=3"]
OWN = [
    ["attention=math", "checkpointing=full", "model.num_kv_heads=2"],
    ["attention=eager", "precision=bf16_pure", "checkpointing=full", "model.norm=rmsnorm"],
    ["attention=math", "precision=fp32", "model.dropout=0.1", "checkpointing=selective"],
    ["loss=chunked", "model.fused_qkv=true", "train.max_grad_norm=1.0", "optimizer=adafactor"],
    ["adapter=lora", "quantization=nf4", "attention=eager"],
    ["adapter=lora", "quantization=int8", "attention=math", "checkpointing=full"],
    ["adapter=dora", "attention=eager", "model.position=learned"],
    ["attention=eager", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=36", "precision=bf16_pure"],
    ["model.bias=true", "precision=fp32", "train.gradient_accumulation_steps=2"],
    ["engine=accelerate", "train.gradient_accumulation_steps=2", "loss=in_place", "model.tied_head=true"],
]
FAMILIES = [
    ("llama", ["attention=math", "checkpointing=full"]),
    ("llama_biased", ["attention=eager", "precision=bf16_pure"]),
    ("mistral", ["attention=math", "adapter=lora"]),
    ("qwen2", ["attention=eager"]),
    ("qwen3", ["attention=math", "precision=fp32", "train.micro_batch_size=1"]),
    ("gemma", ["attention=eager", "checkpointing=full"]),
    ("gpt2", ["attention=math", "adapter=dora", "precision=fp32"]),
    ("gpt2", ["attention=eager", "train.micro_batch_size=1"]),
    ("gpt2_plain", ["adapter=lora", "checkpointing=full"]),
]
_QWEN = {"use_sliding_window": True, "sliding_window": 16}
SLIDING: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mistral", {"sliding_window": 16}, ["attention=eager", "checkpointing=full"]),
    ("mistral", {"sliding_window": 16, "num_key_value_heads": 4}, ["attention=math", "precision=bf16_pure"]),
    ("mistral", {"sliding_window": 16, "attention_dropout": 0.1}, ["checkpointing=full", "adapter=lora"]),
    ("mistral", {"sliding_window": 48, "num_key_value_heads": 1}, ["attention=flash", "precision=bf16_pure"]),
    ("mistral", {"sliding_window": 48, "num_key_value_heads": 1}, ["attention=math", "precision=fp32"]),
    ("mistral", {"sliding_window": 49}, ["attention=eager", "precision=fp32"]),
    ("mistral", {"sliding_window": 49}, ["attention=math"]),
    ("qwen2", {**_QWEN, "max_window_layers": 0}, ["attention=eager", "train.micro_batch_size=1"]),
    ("qwen2", {**_QWEN, "max_window_layers": 1}, ["checkpointing=every_k", "checkpointing.every_k=2"]),
    ("qwen2", {**_QWEN, "max_window_layers": 1}, ["attention=eager", "adapter=lora", "quantization=nf4"]),
    ("qwen3", {**_QWEN, "max_window_layers": 1, "attention_dropout": 0.1}, ["precision=bf16_pure"]),
    ("qwen3", {**_QWEN, "layer_types": ["sliding_attention", "full_attention"]}, ["precision=fp32"]),
    ("qwen3", {**_QWEN, "sliding_window": 64, "max_window_layers": 1}, ["attention=eager"]),
]


@pytest.mark.parametrize("overrides", OWN, ids=" ".join)
def test_order_of_the_labs_model(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*COMMON, "model=tiny", "model.num_layers=2", "train.seq_len=64", "train.micro_batch_size=2", *overrides]
    seen = measured(given, monkeypatch)
    assert len(seen) > 700
    assert seen == predicted(given)


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_order_of_a_family(family: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*COMMON, *hf_overrides(write_config(tmp_path, family), *overrides)]
    seen = measured(given, monkeypatch)
    assert len(seen) > 300
    assert seen == predicted(given)


@pytest.mark.parametrize(("family", "changes", "overrides"), SLIDING, ids=str)
def test_order_with_a_sliding_window(
    family: str, changes: dict[str, Any], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of 48 tokens over windows shorter, as long and longer: a bool mask is 2304 bytes, so it is seen."""
    path = write_config(tmp_path, family, **changes)
    given = [*COMMON, *hf_overrides(path, "train.seq_len=48", *overrides)]
    seen = measured(given, monkeypatch)
    assert len(seen) > 300
    assert seen == predicted(given)
