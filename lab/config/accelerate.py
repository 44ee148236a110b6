"""engine=accelerate: the settings it brings, and a config file of `accelerate launch` as settings of the lab.

The file is plain YAML or JSON; its keys are those of accelerate 1.15 (commands/config/config_args.py, ClusterConfig).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.config.errors import ConfigError
from lab.config.known import options
from lab.config.plain import read_option
from lab.config.schema import RunConfig
from lab.vocab import Strategy

SETTING = "engine.accelerate_config"
_IGNORED = (  # where and how processes start: torchrun's task here; or how weights are loaded
    *("compute_environment", "debug", "machine_rank", "gpu_ids", "main_process_ip", "main_process_port"),
    *("rdzv_backend", "same_network", "main_training_function", "enable_cpu_affinity", "mpirun_config"),
    *("tpu_use_cluster", "tpu_use_sudo", "tpu_env", "tpu_name", "tpu_zone", "num_machines"),
)
_USED = ("distributed_type", "mixed_precision", "num_processes", "use_cpu", "fsdp_config", "deepspeed_config")
_UNSUPPORTED = ("dynamo_config", "megatron_lm_config", "parallelism_config", "fp8_config", "downcast_bf16")
_PRECISIONS = {"no": "fp32", "bf16": "bf16_mixed", "fp16": "fp16_mixed"}


def apply_accelerate(tree: dict[str, Any]) -> dict[str, Any]:
    """The composed tree with what engine=accelerate implies. Raises ConfigError for a contradiction with an override.

    FSDP2's gradients are reduced in the compute dtype: utils/dataclasses.py, set_mixed_precision, sets param_dtype,
    reduce_dtype and output_dtype to the same.
    """
    engine = tree.get("engine")
    if not isinstance(engine, Mapping) or engine.get("kind") != "accelerate":
        return tree
    if engine.get("accelerate_config") is not None:
        tree = _with_settings(tree, file_settings(Path(str(engine["accelerate_config"]))))
    parallel = tree.get("parallel")
    if isinstance(parallel, Mapping) and isinstance(parallel.get("fsdp"), Mapping):
        if _given(tree).get("parallel.fsdp.reduce_dtype") == "fp32":
            raise ConfigError(
                "parallel.fsdp.reduce_dtype", "fp32", "Accelerate's FSDP plugin reduces in the compute dtype"
            )
        tree = {**tree, "parallel": {**parallel, "fsdp": {**parallel["fsdp"], "reduce_dtype": "param"}}}
    return tree


def check_engine(cfg: RunConfig) -> None:
    """What engine=accelerate can be combined with. Raises ConfigError."""
    engine, strategy = cfg.engine, cfg.parallel.strategy
    if engine.kind != "accelerate":
        if engine.accelerate_config is not None:
            raise ConfigError(SETTING, engine.accelerate_config, "only with engine=accelerate")
        return
    if strategy.is_fsdp and cfg.hardware.device_type == "cpu":
        raise ConfigError(
            "engine", "accelerate", "Accelerate ignores its FSDP plugin on a CPU; use engine=native there"
        )
    if strategy is Strategy.HSDP:
        raise ConfigError("engine", "accelerate", "parallel=hsdp is trained by engine=native only")
    if cfg.train.compile:
        raise ConfigError("engine", "accelerate", "train.compile=true is trained by engine=native only")
    if cfg.quantization.kind != "none" and strategy.is_fsdp:
        raise ConfigError(
            "engine", "accelerate", f"quantization={cfg.quantization.kind} with FSDP is trained by engine=native only"
        )


def file_settings(path: Path) -> dict[str, Any]:
    """Settings of the lab that a config file of `accelerate launch` stands for. Raises ConfigError."""
    given = _read(path)
    for key in given:
        if key not in (*_IGNORED, *_USED, *_UNSUPPORTED):
            raise ConfigError(SETTING, path, f"{key} is no key of an accelerate config file")
    for key in _UNSUPPORTED:
        if given.get(key) not in (None, {}, "no", "NO", False):
            raise ConfigError(SETTING, path, f"{key} is not something that this lab trains with; remove it")
    settings: dict[str, Any] = {}
    if given.get("mixed_precision") is not None:
        precision = str(given["mixed_precision"]).replace("False", "no")  # YAML reads a bare `no` as false
        if precision not in _PRECISIONS:
            raise ConfigError(SETTING, path, f"mixed_precision: {precision}; expected one of {', '.join(_PRECISIONS)}")
        settings["precision"] = _PRECISIONS[precision]
    kind = str(given.get("distributed_type")).replace("False", "NO")
    if kind == "FSDP":
        settings |= _fsdp(path, given.get("fsdp_config") or {})
    elif kind == "DEEPSPEED":
        settings |= _deepspeed(path, given.get("deepspeed_config") or {})
    elif kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        settings["parallel"] = "single" if kind == "NO" else "ddp"
    else:
        raise ConfigError(
            SETTING, path, f"distributed_type: {kind}; expected NO, MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED"
        )
    if given.get("num_processes") is not None:
        settings["world_size"] = given["num_processes"]
    if given.get("use_cpu"):
        settings["hardware"] = "cpu"
    return settings


def _read(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(SETTING, path, f"cannot be read: {reason}") from None
    except yaml.YAMLError:
        raise ConfigError(SETTING, path, "neither YAML nor JSON") from None
    if not isinstance(tree, dict) or "distributed_type" not in tree:
        raise ConfigError(SETTING, path, "not a config file of accelerate: no distributed_type in it")
    return tree


def _fsdp(path: Path, section: Mapping[str, Any]) -> dict[str, Any]:
    """FSDP2 with one unit per block. ``fsdp_`` in front of a key may be missing."""
    s = {str(k).removeprefix("fsdp_"): v for k, v in section.items()}
    if int(s.get("version", 1)) != 2:
        raise ConfigError(SETTING, path, "fsdp_config.fsdp_version must be 2: this lab trains with FSDP2 only")
    if s.get("offload_params"):
        raise ConfigError(SETTING, path, "fsdp_config.fsdp_offload_params: offloading is not something this lab does")
    if str(s.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")).upper() != "TRANSFORMER_BASED_WRAP":
        raise ConfigError(SETTING, path, "fsdp_config.fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP")
    settings: dict[str, Any] = {"parallel": "fsdp" if s.get("reshard_after_forward", True) else "fsdp_grad_op"}
    if s.get("activation_checkpointing"):
        settings["checkpointing"] = "full"
    return settings


def _deepspeed(path: Path, section: Mapping[str, Any]) -> dict[str, Any]:
    """ZeRO's stage, accumulation, clipping; bucket sizes from ``deepspeed_config_file`` where one is named."""
    own = dict(section)
    zero: Mapping[str, Any] = {}
    if file := own.get("deepspeed_config_file"):
        try:
            tree = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                SETTING, path, f"deepspeed_config_file: {file} is no JSON file that can be read"
            ) from None
        zero = tree.get("zero_optimization", {})
        own |= {"zero_stage": zero.get("stage", 0)}
        own |= {k: tree[k] for k in ("gradient_accumulation_steps", "gradient_clipping") if k in tree}
        own |= {f"{k}_device": (zero.get(k) or {}).get("device") for k in ("offload_optimizer", "offload_param")}
    stage = own.get("zero_stage", 2)
    if stage not in (1, 2, 3):
        raise ConfigError(SETTING, path, f"deepspeed_config.zero_stage: {stage}; expected 1, 2 or 3")
    for key in ("offload_optimizer_device", "offload_param_device"):
        if own.get(key) not in (None, "none"):
            raise ConfigError(SETTING, path, f"deepspeed_config.{key}: offloading is not something this lab does")
    settings: dict[str, Any] = {"parallel": f"zero{stage}"}
    if own.get("gradient_accumulation_steps", "auto") != "auto":
        settings["train.gradient_accumulation_steps"] = own["gradient_accumulation_steps"]
    if own.get("gradient_clipping", "auto") != "auto":
        settings["train.max_grad_norm"] = own["gradient_clipping"] or None
    known = read_option("parallel", f"zero{stage}")["zero"]
    settings |= {f"parallel.zero.{k}": v for k, v in zero.items() if k in known and v != "auto"}
    return settings


def _given(tree: Mapping[str, Any]) -> dict[str, str]:
    """Overrides as they were written, by name."""
    return dict(o.split("=", 1) for o in tree.get("overrides", ()) if "=" in o)


def _with_settings(tree: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings in the tree; an override that says otherwise is a contradiction."""
    tree = {**tree, "choices": dict(tree.get("choices", {}))}
    given, path = _given(tree), tree["engine"]["accelerate_config"]
    for key, value in settings.items():
        if key in given and _plain(given[key]) != _plain(value):
            raise ConfigError(key, given[key], f"contradicts {path}, which says {key}={_plain(value)}")
        if key in ("parallel", "precision", "checkpointing", "hardware"):
            if tree["choices"].get(key) != value:
                assert value in options(key)
                tree[key], tree["choices"][key] = read_option(key, value), value
            continue
        group, _, name = key.rpartition(".")
        if not group:
            tree[key] = value
            continue
        outer, _, inner = group.partition(".")
        section = {**tree[outer][inner], name: value} if inner else {**tree[outer], name: value}
        tree[outer] = {**tree[outer], inner: section} if inner else section
    return tree


def _plain(value: Any) -> str:
    """As one would write it in an override; 1.0 and 1 are one number."""
    if isinstance(value, str):
        try:
            return f"{float(value):g}"
        except ValueError:
            return value
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{float(value):g}"
