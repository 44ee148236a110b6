"""Arguments of a sub-command: Hydra overrides and paths anywhere, options with dashes; errors in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lab.config.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a ConfigError (one line, exit code 2)."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"lab {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError("arguments", self.prog, f"{message}; `{self.prog} --help` lists what it takes")

    def add_overrides(self) -> None:
        self.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings in Hydra's override grammar")

    def add_records(self, nargs: str = "*") -> None:
        """Paths of records and ``--where``, which chooses among them."""
        self.add_argument("paths", nargs=nargs, metavar="DIR", help="run folders, studies, record files or bundles")
        self.add_argument(
            "--where",
            action="append",
            default=[],
            metavar="KEY=VALUE[,VALUE]",
            help="only runs with this setting (dotted, or a group such as parallel); again: all must hold",
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Options and positionals in any order."""
        return self.parse_intermixed_args(argv)
