"""The settings of recorded runs as table columns: those that differ, under short names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Shown first, where shown; every other setting only where runs differ in it.
STANDING: dict[str, str] = {
    "parallel.strategy": "strategy",
    "checkpointing.kind": "checkpointing",
    "precision.kind": "precision",
    "world_size": "ranks",
}
# Never a difference worth a column: where output goes, or a constant of the hardware row.
_HIDDEN = ("overrides", "choices", "launch.", "tracker.", "data.cache_dir", "hardware.")
_SHOWN_ANYWAY = ("hardware.name",)
# Settings that mean nothing unless another has one of these values; they show as a dash then.
_ONLY_WHERE: dict[str, tuple[str, tuple[str, ...]]] = {
    "checkpointing.every_k": ("checkpointing.kind", ("every_k",)),
    "loss.num_chunks": ("loss.kind", ("chunked",)),
    "optimizer.momentum": ("optimizer.kind", ("sgd",)),
    "optimizer.betas": (
        "optimizer.kind",
        ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"),
    ),
    "optimizer.eps": ("optimizer.kind", ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")),
    "optimizer.min_8bit_size": ("optimizer.kind", ("adamw_8bit", "paged_adamw_8bit", "lion_8bit")),
    "optimizer.implementation": ("optimizer.kind", ("adamw", "sgd", "adafactor")),
    "quantization.block_size": ("quantization.kind", ("fp4", "nf4", "nf4_double")),
    "quantization.compute_dtype": ("quantization.kind", ("int8", "fp4", "nf4", "nf4_double")),
    "quantization.storage_dtype": ("quantization.kind", ("fp4", "nf4", "nf4_double")),
    "quantization.skip_modules": ("quantization.kind", ("int8", "fp4", "nf4", "nf4_double")),
    "parallel.ddp.": ("parallel.strategy", ("ddp",)),
    "parallel.zero.stage3": ("parallel.strategy", ("zero3",)),
    "parallel.zero.": ("parallel.strategy", ("zero1", "zero2", "zero3")),
    "parallel.fsdp.shard_size": ("parallel.strategy", ("hsdp",)),
    "parallel.fsdp.": ("parallel.strategy", ("fsdp", "fsdp_grad_op", "hsdp")),
}
# Overrides that do not say what a run is: the study, where its output goes, and the row of the GPU that it ran on.
_NOT_SETTINGS = ("experiment", "tracker", "launch", "name", "hardware")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration -> dotted settings."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def differing_settings(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted settings whose values differ between configurations, in schema order, but for those always shown.

    Where models differ in name, the name stands for their shapes. A setting that some configuration
    lacks (an invalid point has none but its overrides) is compared among the others, and so is one
    that does not apply to it. Runs of a Trainer have a config.json each in their own folders, whose path says nothing.
    """
    keys = list(dict.fromkeys(k for config in flat for k in config))
    if all(config.get("engine.kind") == "hf_trainer" for config in flat):
        keys.remove("model.path")
    out = []
    for key in keys:
        if key in STANDING or key == "name" or (key.startswith(_HIDDEN) and key not in _SHOWN_ANYWAY):
            continue
        if len({repr(config[key]) for config in flat if key in config and applies(key, config)}) > 1:
            out.append(key)
    if "model.name" in out:
        out = [k for k in out if k == "model.name" or not k.startswith("model.")]
    return out


def applies(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a setting means anything in this configuration."""
    for prefix, (owner, values) in _ONLY_WHERE.items():
        if key.startswith(prefix):
            return config.get(owner) in values
    return True


def header(setting: str) -> str:
    """Column name of a dotted setting."""
    return STANDING.get(setting, setting.removesuffix(".kind").removesuffix(".backend").removesuffix(".name"))


def cell(setting: str, config: Mapping[str, Any]) -> str:
    """Value of a setting as text; a dash where there is none or it does not apply."""
    return value_text(config.get(setting)) if applies(setting, config) else "-"


def value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(str(v) for v in value)
    return "-" if value is None else str(value)


def overrides_text(config: Mapping[str, Any]) -> str:
    """What was asked of the run beyond its study's defaults."""
    given = (o for o in config.get("overrides", []) if o.partition("=")[0].partition(".")[0] not in _NOT_SETTINGS)
    return " ".join(given)
