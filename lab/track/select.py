"""Which recorded runs: conditions of the form KEY=VALUE[,VALUE] over their configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lab.config import ConfigError
from lab.config.known import settings, suggestion
from lab.record import RunRecord

# A group's name alone stands for the setting that its options differ in.
_GROUPS: dict[str, str] = {
    "model": "model.name",
    "data": "data.kind",
    "parallel": "parallel.strategy",
    "precision": "precision.kind",
    "checkpointing": "checkpointing.kind",
    "attention": "attention.backend",
    "loss": "loss.kind",
    "quantization": "quantization.kind",
    "adapter": "adapter.kind",
    "optimizer": "optimizer.kind",
    "engine": "engine.kind",
    "measure": "measure.level",
    "tracker": "tracker.kind",
    "hardware": "hardware.name",
}


@dataclass(frozen=True)
class Condition:
    """A dotted setting and the values that pass."""

    setting: str
    values: tuple[str, ...]

    def holds(self, record: RunRecord) -> bool:
        """False also where the record has no such setting (an invalid point)."""
        value: Any = record.config
        for part in self.setting.split("."):
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return any(_same(value, text) for text in self.values)


def parse_where(texts: Sequence[str]) -> list[Condition]:
    """``KEY=VALUE[,VALUE]`` each; KEY a dotted setting or a group's name. Raises ConfigError for what it is not."""
    known = settings()
    out = []
    for text in texts:
        key, sign, values = text.partition("=")
        setting = _GROUPS.get(key, key)
        if not sign or not values:
            raise ConfigError("--where", text, "KEY=VALUE or KEY=A,B, such as parallel=zero1,zero2")
        if setting not in known:
            raise ConfigError("--where", text, f"no such setting{suggestion(key, [*known, *_GROUPS])}")
        out.append(Condition(setting, tuple(values.split(","))))
    return out


def select(found: Iterable[tuple[str, RunRecord]], where: Sequence[str]) -> Iterator[tuple[str, RunRecord]]:
    """The records for which every condition holds, in order."""
    conditions = parse_where(where)
    return ((source, record) for source, record in found if all(c.holds(record) for c in conditions))


def _same(value: Any, text: str) -> bool:
    """A recorded value against the text of a condition, numbers by value."""
    if value is None or isinstance(value, bool):
        return text.lower() == {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text
