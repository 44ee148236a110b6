"""Which settings, groups and options exist, and which one was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from lab.config.schema import RunConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
_NOT_SETTINGS = ("choices", "overrides", "model.family", "model.hf")  # filled in, never given


def groups() -> list[str]:
    """Folders of ``configs`` with options in them: what `GROUP=OPTION` may name."""
    return sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir() and p.name != "hf")  # hf: config.json files


def options(group: str) -> list[str]:
    """Files of ``configs/GROUP`` without their ending."""
    return sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))


def settings() -> dict[str, Any]:
    """Every dotted name of the schema -> its type; groups of settings (``train``, ``parallel.zero``) included."""
    found: dict[str, Any] = {}

    def walk(cls: type, prefix: str) -> None:
        for name, kind in typing.get_type_hints(cls).items():
            if prefix + name not in _NOT_SETTINGS:
                found[prefix + name] = kind
                if dataclasses.is_dataclass(kind):
                    walk(typing.cast(type, kind), f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def suggestion(key: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' for the known names closest to ``key``, or nothing."""
    last = key.rpartition(".")[2]
    close = [k for k in known if k.rpartition(".")[2] == last and k != key]  # seq_len -> train.seq_len
    if len(close) != 1:  # none, or a name that several groups share: the spelling decides
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        lasts = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.75)
        close = [k for k in known if k.rpartition(".")[2] in lasts][:1]
    return f"; did you mean {close[0]}?" if close else ""


def expected(kind: Any) -> str:
    """What a value of a schema type looks like, in words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(m.value for m in kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(expected(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item, *others = typing.get_args(kind)
        count = "" if Ellipsis in others else f"{len(others) + 1} "
        return f"a list of {count}{expected(item).removeprefix('a ')}s, such as {_SAMPLE_LISTS[item]}"
    if dataclasses.is_dataclass(kind):
        names = [f.name for f in dataclasses.fields(kind)]
        return f"a group of settings ({', '.join(names)})"
    return _WORDS.get(kind, str(kind))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_SAMPLE_LISTS: dict[Any, str] = {int: "[0,-1]", float: "[0.9,0.95]"}
