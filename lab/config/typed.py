"""Plain containers -> the schema's frozen dataclasses, every key known and every value of its type."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from lab.config.errors import ConfigError
from lab.config.known import expected, suggestion


def build(cls: type, tree: Any, path: str = "") -> Any:
    """Mapping -> ``cls``. Raises ConfigError for a key or value that does not fit, named by its dotted ``path``."""
    if not isinstance(tree, Mapping):
        raise ConfigError(path, tree, f"expected {expected(cls)}")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in tree:
        if key not in fields:
            close = suggestion(prefix + str(key), [prefix + name for name in fields])
            raise ConfigError(prefix + str(key), tree[key], f"no such setting{close}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise ConfigError(prefix + name, None, f"missing; expected {expected(hints[name])}")
    return cls(**{k: _convert(v, hints[k], prefix + k) for k, v in tree.items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Field -> type of a dataclass. Resolving the names takes longer than everything else here."""
    return typing.get_type_hints(cls)


def _convert(value: Any, kind: Any, path: str) -> Any:
    """Value from YAML -> the type of a schema field, or ConfigError naming ``path``."""
    if isinstance(kind, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _convert(value, option, path)
            except ConfigError:
                continue
    elif dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            args = typing.get_args(kind)
            items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
            if len(items) == len(value):
                try:
                    return tuple(_convert(v, k, path) for v, k in zip(value, items, strict=True))
                except ConfigError:  # the whole list is the value to show
                    pass
    elif typing.get_origin(kind) is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif issubclass(kind, Enum):
        if value in [m.value for m in kind]:
            return kind(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        raise ConfigError(path, value, "expected a finite number")
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e8 is a float in YAML
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(path, value, f"expected {expected(kind)}")
