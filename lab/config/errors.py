"""The one error a user's configuration can cause."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: the setting, its value, what would be right."""

    def __init__(self, setting: str, value: object, expected: str) -> None:
        self.setting = setting
        self.value = value
        self.expected = expected
        super().__init__(f"{setting}={value}: {expected}")
