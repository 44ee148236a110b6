"""Overrides -> RunConfig: composition, the machine's own facts (hardware row, world size), types, rules."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from lab.config.accelerate import apply_accelerate
from lab.config.compose import compose_config
from lab.config.device import hardware_row
from lab.config.errors import ConfigError
from lab.config.hf_config import fill_model
from lab.config.rules import check_rules
from lab.config.schema import RunConfig
from lab.config.typed import build


def load(overrides: Sequence[str]) -> RunConfig:
    """Overrides in Hydra's grammar -> RunConfig. Raises ConfigError."""
    return resolve(compose_config(overrides))


def resolve(tree: Mapping[str, Any]) -> RunConfig:
    """Composed tree -> checked RunConfig. Raises ConfigError; touches no GPU and no process group."""
    try:
        return _resolve(dict(tree))
    except ConfigError as error:
        given = dict(text.split("=", 1) for text in tree.get("overrides", ()) if "=" in text)
        if error.setting in given:  # the value as it was written, not as it was understood
            raise ConfigError(error.setting, given[error.setting], error.expected) from None
        raise


def _resolve(tree: dict[str, Any]) -> RunConfig:
    tree.pop("sweep", None)  # a study's points, for `lab sweep`
    tree = apply_accelerate(tree)
    tree["world_size"] = _world_size(tree.get("world_size"))
    if isinstance(model := tree.get("model"), Mapping):
        tree["model"] = _derived_shapes(fill_model(model) if "path" in model else dict(model))
    hardware = tree.get("hardware")
    if isinstance(hardware, Mapping) and hardware.get("name") == "auto":
        tree["hardware"] = hardware_row()
    cfg: RunConfig = build(RunConfig, tree)
    check_rules(cfg)
    return cfg


def _derived_shapes(model: dict[str, Any]) -> dict[str, Any]:
    """head_dim and num_kv_heads where they are null. Values of a wrong type are left for the typed build to name."""
    heads, hidden = _whole(model.get("num_heads")), _whole(model.get("hidden_size"))
    if model.get("head_dim") is None and heads is not None and hidden is not None:
        if heads < 1:
            raise ConfigError("model.num_heads", heads, "must be positive")
        if hidden % heads:
            raise ConfigError(
                "model.num_heads", heads, f"must divide model.hidden_size={hidden}, or set model.head_dim"
            )
        model["head_dim"] = hidden // heads
    if model.get("num_kv_heads") is None:
        model["num_kv_heads"] = model.get("num_heads")
    return model


def _whole(value: Any) -> int | None:
    """The number that the typed build will make of ``value``; None where it will refuse."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _world_size(configured: Any) -> Any:
    """world_size from the configuration, checked against torchrun's; a wrong type is left for the typed build."""
    launched = os.environ.get("WORLD_SIZE")
    if not launched:
        return 1 if configured is None else configured
    if not launched.isdecimal() or int(launched) < 1:
        raise ConfigError("WORLD_SIZE", launched, "set by torchrun to the number of processes; unset it")
    if configured is None:
        return int(launched)
    if type(configured) is int and int(launched) != configured:
        raise ConfigError(
            "world_size", configured, f"torchrun started {launched} processes; drop the setting or match it"
        )
    return configured


def to_json(cfg: RunConfig) -> dict[str, Any]:
    """RunConfig -> JSON-able containers; ``run_config_from_json`` is the inverse."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value.value if isinstance(value, Enum) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(cfg)))


def run_config_from_json(tree: Mapping[str, Any]) -> RunConfig:
    """A recorded configuration -> RunConfig, without asking this machine anything and without rules."""
    return typing.cast(RunConfig, build(RunConfig, tree))
