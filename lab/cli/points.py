"""The points of a study: sweep lines x command line -> override lists -> resolved configurations with an identity."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.config import ConfigError, RunConfig, compose_config, resolve, to_json

# Says where output goes or how it was asked for; two runs that differ only here are one point.
_NOT_IDENTITY = ("name", "overrides", "choices", "launch", "tracker")


@dataclass(frozen=True)
class Point:
    """One run of a sweep. ``cfg`` is None for a point that breaks a rule; ``reason`` then says which."""

    overrides: tuple[str, ...]
    identity: str
    cfg: RunConfig | None = None
    reason: str | None = None
    label: str = ""  # the overrides that tell this point from the others


# One setting of a sweep line: value -> override as Hydra takes it, in order.
_Dimension = dict[str, str]


def study_points(arguments: Sequence[str]) -> list[Point]:
    """Every distinct point of ``experiment=NAME [a=x,y] [b=1]`` in order.

    The study's sweep is the key ``sweep`` of ``configs/experiment/NAME.yaml``: a list of lines, each a
    cartesian product in Hydra's sweep grammar; without a study there is one empty line. A setting of
    the command line that the study also sweeps selects those of its points (a line without any of the
    values is left out); if no line has one, it replaces the study's values. Any other setting applies
    to every point, several values multiply them.
    """
    given = _dimensions(arguments)
    experiment = given.pop("experiment", None)
    if experiment and len(experiment) > 1:
        raise ConfigError("experiment", ",".join(experiment), "one study at a time")
    base = list(experiment.values()) if experiment else []
    lines = [_dimensions(_words(line)) for line in _sweep_lines(base)] if base else []
    combinations: list[tuple[str, ...]] = []
    for line in _merge(lines or [{}], given):
        combinations += itertools.product(*(d.values() for d in line.values()))
    swept = {k for line in lines for k in line} | {k for k, d in given.items() if len(d) > 1}
    points: dict[str, Point] = {}
    for combination in combinations:
        label = " ".join(o for o in combination if o.lstrip("+~").partition("=")[0] in swept)
        point = resolve_point((*base, *combination), label)
        points.setdefault(point.identity, point)
    return list(points.values())


def identity(cfg: RunConfig) -> str:
    """Hash of everything that makes two runs the same experiment: all settings but names, tracking and output.

    Of the hardware row only the name counts: a better constant there does not make a run unfinished.
    """
    tree: dict[str, Any] = {k: v for k, v in to_json(cfg).items() if k not in _NOT_IDENTITY}
    tree["hardware"] = [cfg.hardware.name, cfg.hardware.gpu_name]
    tree["data"] = {k: v for k, v in tree["data"].items() if k != "cache_dir"}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def invalid_identity(overrides: Sequence[str]) -> str:
    """Identity of a point without a configuration: its overrides."""
    return "invalid-" + hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:16]


def resolve_point(overrides: tuple[str, ...], label: str) -> Point:
    """The point of these overrides, valid or with the reason why it is not."""
    try:
        cfg = resolve(compose_config(overrides))
    except ConfigError as error:
        return Point(overrides, invalid_identity(overrides), reason=str(error), label=label)
    return Point(overrides, identity(cfg), cfg, label=label)


def _sweep_lines(base: Sequence[str]) -> list[str | list[str]]:
    lines = compose_config(base).get("sweep", [])
    if not isinstance(lines, list) or not all(isinstance(x, (str, list)) for x in lines):
        raise ConfigError("sweep", lines, "a list of lines such as 'parallel=ddp,zero3 checkpointing=none,full'")
    return lines


def _words(line: str | list[str]) -> list[str]:
    """A sweep line's overrides; a value with blanks needs the line as a YAML list."""
    return line.split() if isinstance(line, str) else [str(word) for word in line]


def _dimensions(overrides: Sequence[str]) -> dict[str, _Dimension]:
    """Parse with Hydra's own grammar. Raises ConfigError for what it does not take and for a setting given twice."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    out: dict[str, _Dimension] = {}
    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_override(text)
            written, _, value = text.partition("=")
            sweep = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else None
        except (HydraException, NotImplementedError) as error:
            raise ConfigError("override", text, f"KEY=VALUE or KEY=A,B in Hydra's grammar: {error}") from None
        if parsed.key_or_group in out:
            raise ConfigError(parsed.key_or_group, value, "given twice; keep one, or write both as KEY=A,B")
        out[parsed.key_or_group] = {value: text} if sweep is None else {v: f"{written}={v}" for v in sweep}
    return out


def _merge(lines: Sequence[dict[str, _Dimension]], given: dict[str, _Dimension]) -> list[dict[str, _Dimension]]:
    merged = [dict(line) for line in lines]
    for key, dimension in given.items():
        kept: list[dict[str, _Dimension]] = []
        for line in merged:
            if key not in line:
                kept.append({**line, key: dimension})
            elif common := {v: text for v, text in line[key].items() if v in dimension}:
                kept.append({**line, key: common})
        merged = kept or [{**line, key: dimension} for line in merged]
    return merged
