"""Compose Hydra's YAML groups, build the typed schema, apply the rules: overrides -> RunConfig."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from lab.config.device import visible_gpu_names
from lab.config.errors import ConfigError
from lab.config.rules import check_rules
from lab.config.schema import RunConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Hydra's composition of ``configs/run.yaml`` with overrides, as plain containers.

    The key ``choices`` holds the group choices, ``overrides`` the overrides. Raises ConfigError.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
            cfg = compose("run", overrides=list(overrides), return_hydra_config=True)
        choices = {
            k: v for k, v in OmegaConf.to_container(cfg.hydra.runtime.choices).items() if not k.startswith("hydra/")
        }
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _hydra_error(error, overrides) from None
    tree["choices"] = {k: v for k, v in choices.items() if v is not None}
    tree["overrides"] = list(overrides)
    return tree


def _hydra_error(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """One line from Hydra's several: which setting, which value, what would be right."""
    text = str(error)
    by_key = {o.lstrip("+~").partition("=")[0]: o.partition("=")[2] for o in overrides}
    if found := re.search(r"Could not find '([\w/]+)/([^']*)'", text):
        group, value = found.groups()
        folder = CONFIG_DIR / group
        if folder.is_dir():
            options = sorted(p.stem for p in folder.glob("*.yaml"))
            return ConfigError(group, value, f"no such option; one of {', '.join(options)}")
    if found := re.search(r"Could not override '([\w.@/]+)'", text):
        key = found.group(1)
        return ConfigError(key, by_key.get(key, "?"), f"no such setting{_suggest(key, _known_keys())}")
    if found := re.search(r"Could not delete '([\w.@/]+)|In '.*': (.*)", text):
        return ConfigError("override", " ".join(overrides), text.splitlines()[0])
    if (
        "mismatched input" in text
        or "no viable alternative" in text
        or "parsing override" in text
        or "LexerNoViable" in text
    ):
        return ConfigError(
            "override",
            text.splitlines()[0].removeprefix("Error parsing override "),
            "KEY=VALUE in Hydra's override grammar",
        )
    return ConfigError("override", " ".join(overrides), " ".join(text.split()))


def _known_keys() -> list[str]:
    keys: list[str] = []

    def walk(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            keys.append(prefix + f.name)
            if dataclasses.is_dataclass(hints[f.name]):
                walk(hints[f.name], f"{prefix}{f.name}.")

    walk(RunConfig, "")
    return keys


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _expected(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(m.value for m in kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(_expected(k) for k in typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}.get(
        kind, str(kind)
    )


def _convert(value: Any, kind: Any, path: str) -> Any:
    """value from YAML -> the type of a schema field, or ConfigError naming ``path``."""
    if isinstance(kind, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _convert(value, option, path)
            except ConfigError:
                continue
    elif dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, path)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        if value in [m.value for m in kind]:
            return kind(value)
    elif typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        args = typing.get_args(kind)
        items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(items) == len(value):
            return tuple(_convert(v, k, path) for v, k in zip(value, items, strict=True))
        raise ConfigError(path, value, f"a list of {len(items)} values")
    elif typing.get_origin(kind) is dict and isinstance(value, Mapping):
        return dict(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e8 is a float in YAML
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(path, value, f"expected {_expected(kind)}")


def _build(cls: type, tree: Any, path: str) -> Any:
    """Mapping -> frozen dataclass, every key known and every value of its type."""
    if not isinstance(tree, Mapping):
        raise ConfigError(path, tree, "expected a group of settings")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in tree:
        if key not in fields:
            raise ConfigError(prefix + str(key), tree[key], f"no such setting{_suggest(str(key), list(fields))}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise ConfigError(prefix + name, None, f"missing; expected {_expected(hints[name])}")
    return cls(**{k: _convert(v, hints[k], prefix + k) for k, v in tree.items()})


def _hardware_row(name: str) -> dict[str, Any]:
    """The hardware row that ``auto`` stands for on this machine, or the named one."""
    from omegaconf import OmegaConf

    rows = {p.stem: OmegaConf.to_container(OmegaConf.load(p)) for p in (CONFIG_DIR / "hardware").glob("*.yaml")}
    gpus = visible_gpu_names()
    if not gpus:
        return typing.cast(dict[str, Any], rows["cpu"])
    for row in rows.values():
        if isinstance(row, dict) and row.get("gpu_name") == gpus[0]:
            return typing.cast(dict[str, Any], row)
    return {**typing.cast(dict[str, Any], rows["unknown_gpu"]), "gpu_name": gpus[0]}


def _world_size(configured: Any) -> int:
    """world_size from the configuration, checked against torchrun's."""
    launched = os.environ.get("WORLD_SIZE")
    if configured is None:
        return int(launched) if launched else 1
    if not isinstance(configured, int) or isinstance(configured, bool) or configured < 1:
        raise ConfigError("world_size", configured, "a whole number of ranks, 1 or more")
    if launched and int(launched) != configured:
        raise ConfigError(
            "world_size", configured, f"torchrun started {launched} processes; drop the setting or match it"
        )
    return configured


def resolve(tree: Mapping[str, Any]) -> RunConfig:
    """Composed tree -> checked RunConfig. Raises ConfigError; touches no GPU and no process group."""
    tree = dict(tree)
    tree.pop("sweep", None)
    tree["world_size"] = _world_size(tree.get("world_size"))
    model = dict(tree["model"])
    if model.get("head_dim") is None:
        heads, hidden = model.get("num_heads"), model.get("hidden_size")
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            if hidden % heads:
                raise ConfigError(
                    "model.num_heads", heads, f"must divide model.hidden_size={hidden}, or set model.head_dim"
                )
            model["head_dim"] = hidden // heads
    if model.get("num_kv_heads") is None:
        model["num_kv_heads"] = model.get("num_heads")
    tree["model"] = model
    if dict(tree["hardware"]).get("name") == "auto":
        tree["hardware"] = _hardware_row("auto")
    cfg: RunConfig = _build(RunConfig, tree, "")
    check_rules(cfg)
    return cfg


def load(overrides: Sequence[str]) -> RunConfig:
    """Overrides in Hydra's grammar -> RunConfig."""
    return resolve(compose_config(overrides))


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
    return typing.cast(RunConfig, _build(RunConfig, tree, ""))
