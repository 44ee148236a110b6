"""engine=accelerate and engine=hf_trainer: every byte of their predictions has a formula that gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.analytic.explain import Live, _LayeredReplay, described
from lab.analytic.families.names import in_lab_words
from lab.analytic.sources import source_of
from lab.analytic.tape import ALLOC, FREE
from lab.analytic.timeline import spans_of
from lab.config import RunConfig, load
from lab.vocab import MemoryCategory
from tests.unit.hf_cases import hf_overrides, write_config
from tests.unit.test_hf_trainer_settings import CONFIG

TRAIN = ["hardware=h200", "train.gradient_accumulation_steps=2", "train.max_grad_norm=1.0"]


def unexplained(cfg: RunConfig) -> set[tuple[str, int]]:
    """Labels and bytes of storages, alive in the steady step, whose formula is missing or gives other bytes."""
    replay = _LayeredReplay(cfg, 0)
    replay.build()
    for _ in range(replay.rule.steady_step + 1):
        replay.step()
    events = replay.trace.events
    start = min(first for _, first, _ in spans_of(events, replay.rule.steady_step))
    freed = {e[1] for e in events[:start] if e[0] == FREE}
    storages = [
        Live(e[1], i, MemoryCategory(e[3]), in_lab_words(e[4]), e[2], e[2])
        for i, e in enumerate(events)
        if e[0] == ALLOC and e[1] not in freed
    ]
    wrong = set()
    for storage, _, item in described(cfg, replay, storages):
        rule = source_of(storage.label)
        if rule is None or (rule.formulas and item.formula is None):
            wrong.add((storage.label, storage.tensor_bytes))
    return wrong


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op"])
@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed", "bf16_pure"])
def test_accelerate(strategy: str, precision: str) -> None:
    world = f"world_size={1 if strategy == 'single' else 3}"
    options = ["model=tiny", "engine=accelerate", f"parallel={strategy}", f"precision={precision}", world]
    assert unexplained(load([*TRAIN, *options])) == set()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("options", [["ddp", "adapter=lora"], ["zero3"], ["fsdp"], ["fsdp", "checkpointing=full"]])
def test_accelerate_with_a_hugging_face_model(family: str, options: list[str], tmp_path: Path) -> None:
    more = ["engine=accelerate", "precision=bf16_mixed", "world_size=2", f"parallel={options[0]}", *options[1:]]
    assert unexplained(load([*TRAIN, *hf_overrides(write_config(tmp_path, family), *more)])) == set()


@pytest.mark.parametrize("family", ["mistral_sliding", "qwen3_sliding"])
@pytest.mark.parametrize(
    "options",
    [
        ["attention=cudnn"],
        ["attention=math"],
        ["attention=eager"],
        ["precision=fp32", "train.seq_len=35"],  # the memory-efficient kernel, its mask padded
        ["engine=hf_trainer"],
        ["engine=hf_trainer", "attention=eager", "checkpointing=full", "train.seq_len=35"],
    ],
    ids=" ".join,
)
def test_sliding_windows(family: str, options: list[str], tmp_path: Path) -> None:
    assert unexplained(load([*TRAIN, *hf_overrides(write_config(tmp_path, family), *options)])) == set()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["parallel=ddp", "world_size=2"],
        ["checkpointing=full", "adapter=lora", "engine.input_gradients=true", "precision=bf16_pure"],
        ["engine.attention_mask=false", "engine.autocast=true", "precision=bf16_pure"],
    ],
)
def test_hf_trainer(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = ["model=hf", f'model.path="{tmp_path / "config.json"}"', "model.random_weights=true", "train.seq_len=64"]
    assert unexplained(load([*TRAIN, *model, "engine=hf_trainer", *options])) == set()
