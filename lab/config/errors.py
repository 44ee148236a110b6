"""The one error a user's configuration can cause."""

from __future__ import annotations

from enum import Enum

NO_VALUE = object()  # the setting was written without a value
_LONGEST_VALUE = 200  # characters; the rest of a line is for what would be right


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: the setting, its value, what would be right."""

    def __init__(self, setting: str, value: object, expected: str) -> None:
        self.setting = setting
        self.value = value
        self.expected = expected
        written = setting if value is NO_VALUE else f"{setting}={_shown(value)}"
        super().__init__(" ".join(f"{written}: {expected}".split()))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.setting, self.value, self.expected)


def _shown(value: object) -> str:
    """``value`` as one would write it on the command line."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
