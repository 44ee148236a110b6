"""Composition of the plain cases without Hydra, which alone takes 0.25 s to import and compose.

Same result as Hydra (a test compares them over a wide table): the defaults list of ``run.yaml``, sibling
defaults inside a group, an experiment with `override /group` entries, `group=option` and `dotted.key=scalar`.
Everything else (sweeps, lists, quotes, interpolations, '+', '~', anything misspelt) raises ``NotPlain`` and
is Hydra's to do or to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lab.config.known import CONFIG_DIR, groups

_INT = r"[+-]?(?:0|[1-9](?:_?[0-9])*)"
_FLOAT = r"[+-]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][+-]?[0-9]+)?"
_TEXT = r"[A-Za-z_/][A-Za-z0-9_./-]*"
_OVERRIDE = re.compile(r"([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*)=([A-Za-z0-9_./+-]+)", re.ASCII)
_OPTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_YAML_FLOAT = re.compile(  # omegaconf._utils.get_yaml_loader
    r"""^(?:
     [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_CONSTANTS: dict[str, bool | None] = {"null": None, "true": True, "false": False}


class NotPlain(Exception):
    """Not one of the plain cases; says nothing about whether the input is right."""


def compose_plain(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(composed tree, group choices) as Hydra would give them. Raises NotPlain."""
    known = set(groups())
    chosen: dict[str, str | None] = {}
    values: dict[str, Any] = {}
    for override in overrides:
        found = _OVERRIDE.fullmatch(override) if len(override) < 1000 else None
        if not found or found[1] in values or found[1] in chosen:
            raise NotPlain
        if found[1] in known:
            if not _OPTION.fullmatch(found[2]):
                raise NotPlain
            chosen[found[1]] = found[2] if found[2].lower() != "null" else None
        else:
            values[found[1]] = _scalar(found[2])

    root = _read("run")
    choices: dict[str, str | None] = {}
    own = None  # where run.yaml's own settings come in the order of its defaults
    for entry in _defaults(root):
        if entry == "_self_":
            own = len(choices)
        elif isinstance(entry, dict) and len(entry) == 1 and set(entry) <= known:
            choices.update(entry)
        else:
            raise NotPlain
    if own is None or (chosen.keys() - choices.keys()):
        raise NotPlain
    experiment = chosen.get("experiment", choices.get("experiment"))
    study = _study(experiment, choices) if experiment else {}
    choices |= chosen

    tree: dict[str, Any] = {}
    for position, (group, option) in enumerate(choices.items()):
        if position == own:
            _merge(tree, root)
        if group == "experiment":
            _merge(tree, study)
        elif option is None:
            raise NotPlain
        else:
            _merge(tree, {group: read_option(group, option)})
    if own == len(choices):
        _merge(tree, root)
    for key, value in values.items():
        _set(tree, key.split("."), value)
    return tree, {k: v for k, v in choices.items() if v is not None}


def _scalar(text: str) -> Any:
    """A value in Hydra's override grammar, if it is one plain token."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if re.fullmatch(_INT, text):
        return int(text)
    if re.fullmatch(_FLOAT, text):
        return float(text)
    if re.fullmatch(_TEXT, text) and text.lower() not in ("inf", "nan"):
        return text
    raise NotPlain


def read_option(group: str, option: str) -> dict[str, Any]:
    """One option of a group: its sibling defaults and itself, in order. Raises NotPlain."""
    own = _read(f"{group}/{option}")
    merged: dict[str, Any] = {}
    for entry in _defaults(own):
        if not isinstance(entry, str):
            raise NotPlain
        _merge(merged, own if entry == "_self_" else read_option(group, entry))
    return merged


def _study(option: str, choices: dict[str, str | None]) -> dict[str, Any]:
    """An experiment's own settings; its `override /group: option` entries go into ``choices``."""
    own = _read(f"experiment/{option}", package="_global_")
    for entry in own.pop("defaults", []):
        if entry == "_self_":  # among overrides alone its place does not matter
            continue
        ((key, value),) = entry.items() if isinstance(entry, dict) and len(entry) == 1 else [("", "")]
        group = key.removeprefix("override /")
        if group == key or group not in choices or group == "experiment" or not isinstance(value, str):
            raise NotPlain
        choices[group] = value
    return own


def _defaults(tree: dict[str, Any]) -> list[Any]:
    """The defaults list, taken out of ``tree``; only with `_self_` in it, or absent altogether."""
    entries = tree.pop("defaults", ["_self_"])
    if not isinstance(entries, list) or entries.count("_self_") != 1:
        raise NotPlain
    return entries


def _read(name: str, package: str | None = None) -> dict[str, Any]:
    """One YAML file as Hydra reads it. ``package``: the package header it must have (None: none)."""
    try:
        text = (CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    except OSError:
        raise NotPlain from None
    header = re.search(r"^\s*#\s*@package\s+(\S+)\s*$", text, re.MULTILINE)
    if (header[1] if header else None) != package or "${" in text or "???" in text:
        raise NotPlain
    tree = _parse(text)
    if not isinstance(tree, dict):
        raise NotPlain
    return tree


def _parse(text: str) -> Any:
    """YAML with OmegaConf's rule for floats (5e8 is one) and without timestamps, by the C parser where there is one."""
    import yaml  # type: ignore[import-untyped]

    if not _loader:
        base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        loader: Any = type("Loader", (base,), {})
        loader.yaml_implicit_resolvers = {
            first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
            for first, rules in base.yaml_implicit_resolvers.items()
        }
        loader.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_FLOAT, list("-+0123456789."))
        _loader.append(loader)
    try:
        return yaml.load(text, Loader=_loader[0])
    except yaml.YAMLError:
        raise NotPlain from None


_loader: list[Any] = []  # made at the first use, as yaml is imported there


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    """``other`` over ``into``: mappings merge, everything else replaces."""
    for key, value in other.items():
        old = into.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        elif isinstance(old, dict) or (isinstance(value, dict) and key in into):
            raise NotPlain
        else:
            into[key] = value


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Replace an existing scalar of ``tree``."""
    for part in path[:-1]:
        node = tree.get(part)
        if not isinstance(node, dict):
            raise NotPlain
        tree = node
    if path[-1] not in tree or isinstance(tree[path[-1]], (dict, list)):
        raise NotPlain
    tree[path[-1]] = value
