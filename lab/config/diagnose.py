"""What is wrong with an override, in one line; and Hydra's own errors in the same form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from lab.config.errors import NO_VALUE, ConfigError
from lab.config.known import expected, groups, options, settings, suggestion

_LONGEST = 4000  # characters; Python itself refuses whole numbers of more than 4300 digits


def check_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra shall see them (repetitions dropped). Raises ConfigError for the first that is wrong."""
    known, folders = settings(), groups()
    seen: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key.startswith("~"):
            raise ConfigError(
                key, value if equals else NO_VALUE, "a setting cannot be removed; write another value, or null"
            )
        if key.startswith("+"):
            name = key.lstrip("+")
            found = name in known or name in folders
            hint = (
                f"write {name}={value or 'VALUE'}, without '+'"
                if found
                else f"no such setting{_close(name, known, folders)}"
            )
            raise ConfigError(key, value if equals else NO_VALUE, hint)
        if len(text) > _LONGEST:
            raise ConfigError(key[:80], value, f"longer than {_LONGEST} characters; no setting needs that")
        if not equals or not key.strip():
            raise ConfigError(text or "''", NO_VALUE, "expected KEY=VALUE, such as model=25m or train.steps=10")
        if key in folders:
            _check_option(key, value)
        elif key not in known:
            raise ConfigError(key, value, f"no such setting{_close(key, known, folders)}")
        elif not value.strip():
            raise ConfigError(key, value, f"no value; expected {expected(known[key])}")
        elif dataclasses.is_dataclass(known[key]) and not value.startswith("{"):
            raise ConfigError(key, value, f"{expected(known[key])}: set one of them, such as {_member(key, known)}=...")
        if seen.get(key, value) != value:
            raise ConfigError(key, value, f"given twice, also as {key}={seen[key]}; keep one")
        seen[key] = value
        _check_grammar(text, key, value)
    return [f"{key}={value}" for key, value in seen.items()]


def _close(key: str, known: Mapping[str, Any], folders: Sequence[str]) -> str:
    return suggestion(key, [*folders, *known])


def _member(key: str, known: Mapping[str, Any]) -> str:
    return next(k for k in known if k.startswith(f"{key}."))


def _check_option(group: str, option: str) -> None:
    """A group's value is the name of one of its files; ``experiment`` may also be null."""
    existing = options(group)
    if option.startswith("{") or re.match(r"[^\[]*[,(]", option):
        return  # settings of the group, or several options: judged by the grammar
    if option.strip("'\"") not in existing and (group, option) != ("experiment", "null"):
        raise ConfigError(group, option, f"no such option; one of {_listed(existing)}{suggestion(option, existing)}")


def _listed(names: Sequence[str]) -> str:
    """Names in their order with commas; four and more numbered ones of one stem as one: draw2-9."""
    out: list[str] = []
    numbered = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    for stem, group in groupby(zip(names, numbered, strict=True), key=lambda pair: pair[1] and pair[1][1]):
        members = [name for name, _ in group]
        together = stem is not None and len(members) > 3
        out += [f"{members[0]}-{members[-1][len(stem or '') :]}"] if together else members
    return ", ".join(out) or "none exists yet"


def _check_grammar(text: str, key: str, value: str) -> None:
    """One value in Hydra's override grammar; several are a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(
            key, value, f"not a value in Hydra's override grammar; quote text with special characters: '{key}=\"...\"'"
        ) from None
    if override.is_sweep_override():
        raise ConfigError(key, value, "one value expected; several are a sweep: use `lab sweep`")


def foreign_setting(key: str, value: str, choices: Mapping[str, str], owners: Sequence[str]) -> ConfigError:
    """The error for a setting that exists, but only with other options of its group."""
    group = key.partition(".")[0]
    where = f"{group}={choices.get(group, 'null')}"
    if not owners:
        return ConfigError(key, value, f"not a setting of {where}")
    return ConfigError(key, value, f"not a setting of {where}; it belongs to {group}={', '.join(owners)}")


def from_hydra(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """One line from Hydra's or OmegaConf's several, naming the setting where they do."""
    text = " ".join(str(error).split())
    by_key = {o.partition("=")[0]: o.partition("=")[2] for o in overrides}
    if found := re.search(r"Could not find '([\w/]+)/([^']*)'", text):  # named by an experiment or a defaults list
        group, option = found.groups()
        existing = options(group)
        return ConfigError(group, option, f"no such option; one of {_listed(existing)}")
    if found := re.search(r"Could not override '([\w.]+)'", text):  # inside KEY={...}
        key = getattr(error.__cause__, "full_key", None) or found[1]
        outer = next((o for o in by_key if key == o or key.startswith(f"{o}.")), key)
        known = settings()
        reason = (
            "not a setting of the chosen option" if key in known else "no such setting" + suggestion(key, list(known))
        )
        return ConfigError(outer, by_key.get(outer, NO_VALUE), f"{key} is {reason}")
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if key:
        reason = re.sub(r"full_key: .*", "", text).strip()
        return ConfigError(key, by_key.get(key, NO_VALUE), reason)
    named = [o for o in overrides if o in text]
    if named:
        key, _, value = named[0].partition("=")
        return ConfigError(key, value, text)
    return ConfigError("overrides", " ".join(overrides), text)
