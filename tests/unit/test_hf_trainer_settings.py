"""TrainingArguments and a model's facts -> the run that is predicted; what cannot be predicted is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lab.analytic import predict
from lab.config import ConfigError, RunConfig, load
from lab.integrations.settings import Facts, Settings, resolved, trainer_settings

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FACTS = Facts(device_type="cpu", world_size=1, max_steps=10, seq_len=96)
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "bf16": True,
    "fp16": False,
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": None,
    "label_smoothing_factor": 0.0,
    "torch_compile": False,
    "n_gpu": 0,
}


DDP = {"world_size": 2, "distributed_type": "MULTI_CPU"}
BF16 = {"parameter_dtype": "bfloat16"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": {"v_proj", "q_proj"}}


def mapped(folder: Path, facts: Facts = FACTS, **arguments: Any) -> Settings:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return trainer_settings(SimpleNamespace(**{**ARGUMENTS, **arguments}), facts, str(path), "mine", str(folder))


def configured(folder: Path, facts: Facts = FACTS, **arguments: Any) -> RunConfig:
    settings = mapped(folder, facts, **arguments)
    assert settings.missing == []
    return load(settings.overrides)


def test_the_usual(tmp_path: Path) -> None:
    cfg = configured(tmp_path)
    t = cfg.train
    assert (t.micro_batch_size, t.seq_len, t.gradient_accumulation_steps, t.steps) == (4, 96, 2, 10)
    assert (cfg.model.family, cfg.model.num_layers, cfg.model.num_kv_heads) == ("llama", 2, 2)
    assert (cfg.engine.kind, cfg.engine.batch_tensors, cfg.engine.attention_mask) == ("hf_trainer", 3, True)
    assert (cfg.precision.kind, cfg.optimizer.implementation, t.max_grad_norm) == ("bf16_mixed", "fused", 1.0)
    assert (cfg.parallel.strategy, cfg.checkpointing.kind, cfg.attention.backend) == ("single", "none", "auto")


@pytest.mark.parametrize(
    ("arguments", "changes", "setting", "value"),
    [
        ({"bf16": False}, {}, "precision.kind", "fp32"),
        ({"bf16": False}, {"parameter_dtype": "bfloat16"}, "precision.kind", "bf16_pure"),
        ({}, {"parameter_dtype": "bfloat16"}, "precision.kind", "bf16_pure"),
        ({"max_grad_norm": 0.0}, {}, "train.max_grad_norm", None),
        ({"optim": "adamw_torch"}, {}, "optimizer.implementation", "for_loop"),
        ({"optim": SimpleNamespace(value="adamw_bnb_8bit")}, {}, "optimizer.kind", "adamw_8bit"),
        ({"optim": "sgd"}, {}, "optimizer.momentum", 0.0),
        ({"optim": "sgd", "optim_args": "nesterov=True, momentum=0.5"}, {}, "optimizer.momentum", 0.5),
        ({"gradient_checkpointing": True}, {}, "checkpointing.kind", "full"),
        ({"activation_checkpointing": True}, {}, "checkpointing.kind", "full"),
        ({}, {"attention": "eager"}, "attention.backend", "eager"),
        ({}, {"batch_keys": ("input_ids", "labels")}, "engine.attention_mask", False),
        ({}, {"adapter": LORA}, "adapter.target_modules", ("q_proj", "v_proj")),
        ({}, {"adapter": LORA}, "adapter.rank", 4),
        ({}, {"adapter": {**LORA, "use_dora": True}}, "adapter.kind", "dora"),
        ({}, {"adapter": LORA, "quantization": NF4}, "quantization.kind", "nf4_double"),
        ({}, {"adapter": LORA, "quantization": NF4}, "quantization.skip_modules", ("lm_head",)),
        ({}, {"adapter": LORA, "quantization": NF4}, "adapter.prepare_kbit", True),
        ({}, {"adapter": LORA, "quantization": NF4, **BF16}, "adapter.prepare_kbit", False),
        ({}, {"adapter": LORA, "quantization": {"load_in_8bit": True}}, "quantization.kind", "int8"),
        ({}, BF16, "engine.autocast", True),
        ({}, {"world_size": 2, "distributed_type": "MULTI_CPU"}, "parallel.strategy", "ddp"),
        ({}, {**DDP, "ddp": {"bucket_cap_mb": 1.5}}, "parallel.ddp.bucket_cap_mb", 1.5),
        ({}, {**DDP, "ddp": {"find_unused_parameters": False}}, "ddp_finds_unused", False),
        ({}, DDP, "ddp_finds_unused", True),
        ({"gradient_checkpointing": True}, DDP, "ddp_finds_unused", False),
        ({"gradient_checkpointing": True}, {**DDP, "adapter": LORA}, "ddp_finds_unused", True),
    ],
)
def test_one_argument(
    arguments: dict[str, Any], changes: dict[str, Any], setting: str, value: object, tmp_path: Path
) -> None:
    found: Any = configured(tmp_path, dataclasses.replace(FACTS, **changes), **arguments)
    for part in setting.split("."):
        found = getattr(found, part)
    assert found == value


def test_deepspeed_as_applied(tmp_path: Path) -> None:
    zero = {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": True, "allgather_bucket_size": "auto"}
    applied = {"zero_optimization": zero, "bf16": {"enabled": True}}
    facts = dataclasses.replace(FACTS, world_size=2, distributed_type="DEEPSPEED", deepspeed=applied)
    cfg = configured(tmp_path, facts)
    assert (cfg.parallel.strategy, cfg.precision.kind) == ("zero2", "bf16_mixed")
    assert (cfg.parallel.zero.reduce_bucket_size, cfg.parallel.zero.overlap_comm) == (5_000_000, True)
    assert any("two" in text for text in mapped(tmp_path, facts).assumed)


@pytest.mark.parametrize(
    ("arguments", "changes", "reason"),
    [
        ({"optim": "adafactor"}, {}, "optim=adafactor"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}, "reentrant"),
        ({"n_gpu": 2}, {}, "DataParallel"),
        ({}, {"adapter": {"peft_type": "IA3"}}, "peft_type=IA3"),
        ({}, {"adapter": {**LORA, "modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ({}, {"quantization": {"quant_method": "gptq"}}, "quant_method=gptq"),
        ({}, {"attention": "flash_attention_2"}, "flash_attention_2"),
        ({}, {"distributed_type": "FSDP", "world_size": 2}, "FSDP through a Trainer"),
    ],
)
def test_no_prediction_and_why(arguments: dict[str, Any], changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert any(reason in text for text in mapped(tmp_path, dataclasses.replace(FACTS, **changes), **arguments).missing)


def test_what_the_lab_refuses_is_measured_all_the_same(tmp_path: Path) -> None:
    fp32 = {**NF4, "bnb_4bit_compute_dtype": "float32"}
    settings = mapped(tmp_path, dataclasses.replace(FACTS, adapter=LORA, quantization=fp32))
    with pytest.raises(ConfigError):
        load(settings.overrides)
    cfg = resolved(settings)
    assert (cfg.quantization.kind, cfg.train.seq_len, cfg.engine.kind) == ("none", 96, "hf_trainer")
    assert settings.missing == ["quantization.compute_dtype=fp32: precision=bf16_mixed multiplies in bf16: set bf16"]


def test_lab_train_refuses_it(tmp_path: Path) -> None:
    from lab.train import run

    with pytest.raises(ConfigError, match="engine=hf_trainer: measured in your own Trainer"):
        run(configured(tmp_path), [])


@pytest.mark.parametrize("waits", [True, False])
def test_the_callbacks_pause_and_the_environments_allocator(waits: bool, tmp_path: Path) -> None:
    facts = dataclasses.replace(
        FACTS, world_size=2, distributed_type="MULTI_GPU", release_first_bucket=waits, expandable_segments=waits
    )
    found = mapped(tmp_path, facts).overrides
    assert f"parallel.ddp.release_first_bucket={str(waits).lower()}" in found
    assert ("train.expandable_segments=true" in found) is waits


def test_the_pause_comes_once_when_the_first_step_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.integrations import run as module

    pauses: list[torch.device] = []
    monkeypatch.setattr(module, "await_watchdog", pauses.append)
    run = module.TrainerRun.__new__(module.TrainerRun)
    run.cfg, run.device = load(["parallel=ddp", "world_size=2", "hardware=h200"]), torch.device("cuda")
    run.phases = SimpleNamespace(begin_step=lambda step: None, end_step=lambda: None)  # type: ignore[assignment]
    run.steps_begun, run._accelerated = 0, None
    for _ in range(3):
        run.begin_step()
        run.end_step()
    assert pauses == [run.device]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model=125m", "parallel=zero1"], "model=125m: a Trainer's model is one of transformers'"),
        (
            ["model=hf", "model.path=configs/hf/gpt2.json", "model.random_weights=true", "parallel=fsdp"],
            "parallel=fsdp: not modelled with engine=hf_trainer, which has single, ddp, zero1, zero2, zero3",
        ),
    ],
)
def test_what_a_trainer_cannot_be_predicted_with(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        predict(load(["engine=hf_trainer", "hardware=h200", "world_size=2", *overrides]))
