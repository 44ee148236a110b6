"""engine=accelerate without torch: the config file of `accelerate launch`, what contradicts it, and the prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.analytic import predict
from lab.analytic.architecture import num_parameters
from lab.config import ConfigError, RunConfig, load
from lab.vocab import MemoryCategory, StepPhase

BASE = {"compute_environment": "LOCAL_MACHINE", "debug": False, "machine_rank": 0, "main_training_function": "main"}
FSDP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_offload_params": False}


def written(folder: Path, **keys: Any) -> str:
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**BASE, **keys}))
    return f"engine.accelerate_config={path}"


def loaded(folder: Path, overrides: list[str] | None = None, **keys: Any) -> RunConfig:
    return load(["engine=accelerate", "hardware=h200", written(folder, **keys), *(overrides or [])])


def test_fsdp(tmp_path: Path) -> None:
    section = {**FSDP, "fsdp_reshard_after_forward": False, "fsdp_activation_checkpointing": True}
    cfg = loaded(tmp_path, distributed_type="FSDP", fsdp_config=section, mixed_precision="bf16", num_processes=4)
    assert (cfg.parallel.strategy, cfg.precision.kind, cfg.world_size) == ("fsdp_grad_op", "bf16_mixed", 4)
    assert cfg.checkpointing.kind == "full"
    assert cfg.choices["parallel"] == "fsdp_grad_op"
    assert cfg.parallel.fsdp.reduce_dtype == "param"


def test_deepspeed(tmp_path: Path) -> None:
    section = {"zero_stage": 3, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5, "zero3_init_flag": True}
    cfg = loaded(
        tmp_path, distributed_type="DEEPSPEED", deepspeed_config=section, mixed_precision="no", num_processes=2
    )
    assert (cfg.parallel.strategy, cfg.precision.kind) == ("zero3", "fp32")
    assert (cfg.train.gradient_accumulation_steps, cfg.train.max_grad_norm) == (4, 0.5)


def test_deepspeed_own_file(tmp_path: Path) -> None:
    own = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto"}}
    (tmp_path / "ds.json").write_text(json.dumps(own | {"gradient_clipping": "auto"}))
    section = {"deepspeed_config_file": str(tmp_path / "ds.json")}
    cfg = loaded(tmp_path, ["train.max_grad_norm=2.0"], distributed_type="DEEPSPEED", deepspeed_config=section)
    assert (cfg.parallel.strategy, cfg.parallel.zero.reduce_bucket_size) == ("zero2", 1000)
    assert (cfg.parallel.zero.allgather_bucket_size, cfg.train.max_grad_norm) == (500_000_000, 2.0)


@pytest.mark.parametrize(("kind", "strategy"), [("NO", "single"), ("MULTI_GPU", "ddp"), (False, "single")])
def test_without_plugin(kind: object, strategy: str, tmp_path: Path) -> None:
    world = 1 if strategy == "single" else 2
    assert loaded(tmp_path, distributed_type=kind, num_processes=world).parallel.strategy == strategy


def test_the_same_said_twice_is_no_contradiction(tmp_path: Path) -> None:
    overrides = ["parallel=zero2", "train.max_grad_norm=1", "world_size=2", "precision=bf16_mixed"]
    section = {"zero_stage": 2, "gradient_clipping": 1.0}
    cfg = loaded(tmp_path, overrides, distributed_type="DEEPSPEED", deepspeed_config=section, num_processes=2)
    assert cfg.train.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("overrides", "keys", "message"),
    [
        (["parallel=ddp"], {"distributed_type": "DEEPSPEED"}, "parallel=ddp: contradicts .*parallel=zero2"),
        (["world_size=4"], {"distributed_type": "MULTI_GPU", "num_processes": 2}, "world_size=4: contradicts"),
        (["precision=fp32"], {"distributed_type": "NO", "mixed_precision": "bf16"}, "precision=fp32: contradicts"),
        ([], {"distributed_type": "MULTI_XPU"}, "distributed_type: MULTI_XPU; expected"),
        ([], {"distributed_type": "FSDP", "fsdp_config": {}}, "fsdp_version must be 2"),
        ([], {"distributed_type": "FSDP", "fsdp_config": {**FSDP, "fsdp_offload_params": True}}, "offload"),
        ([], {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "expected 1, 2 or 3"),
        ([], {"distributed_type": "NO", "mixed_precision": "fp8"}, "mixed_precision: fp8"),
        ([], {"distributed_type": "NO", "dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_config"),
        ([], {"distributed_type": "NO", "num_proceses": 2}, "num_proceses is no key"),
        ([], {}, "no distributed_type in it"),
    ],
)
def test_bad_files(overrides: list[str], keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        loaded(tmp_path, overrides, **keys)
    assert "\n" not in str(error.value)


def test_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="neither YAML nor JSON"):
        load(["engine=accelerate", f"engine.accelerate_config={tmp_path / 'x.yaml'}"])


def points(*overrides: str) -> tuple[Any, Any]:
    common = ["model=350m", "hardware=h200", "world_size=2", *overrides]
    return predict(load(common)), predict(load([*common, "engine=accelerate"]))


def test_zero_is_the_native_rule() -> None:
    native, accelerate = points("parallel=zero2", "train.gradient_accumulation_steps=2")
    assert accelerate.steady == native.steady


def test_fsdp_defers_the_reduction() -> None:
    """Between micro-steps whole bf16 gradients stay; the native engine keeps half as many in fp32: as many bytes."""
    for precision, bytes_per_parameter in (("bf16_mixed", 2), ("fp32", 4)):
        settings = ("parallel=fsdp", "train.gradient_accumulation_steps=2", f"precision={precision}")
        native, accelerate = (p.steady.phases[StepPhase.FORWARD].end.categories for p in points(*settings))
        psi = num_parameters(load(["model=350m", "hardware=h200"]).model)
        # Up to 5 % more: blocks of the caching allocator, and what they have beyond the request.
        assert accelerate[MemoryCategory.GRADIENTS] == pytest.approx(bytes_per_parameter * psi, rel=0.05)
        assert native[MemoryCategory.GRADIENTS] == pytest.approx(4 * psi / 2, rel=0.05)


def test_fsdp_gathers_the_last_block_later() -> None:
    """The final norm is a unit of its own, and it, not the root, prefetches the last block in backward."""
    native, accelerate = points("parallel=fsdp")
    gathered = MemoryCategory.COMM_BUFFERS
    assert accelerate.steady.allocated_bytes < native.steady.allocated_bytes
    assert accelerate.steady.categories[gathered] < native.steady.categories[gathered]
