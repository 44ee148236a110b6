"""The ``lab`` command: picks the sub-command and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lab.config.errors import ConfigError

# Sub-command -> (module under lab.cli with run(argv) -> exit code, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("predict", "prediction only, from the configuration: no torch, no GPU"),
    "explain": ("explain", "every predicted byte at one moment: tensor, formula, source"),
    "train": ("train", "one run: starts torchrun with world_size processes on this machine"),
    "sweep": ("sweep", "every point of a study, one torchrun each"),
    "boundary": ("boundary", "largest micro-batch under a memory limit: predicted, and measured with the next one"),
    "compare": ("compare", "table of recorded runs: predicted, measured, error, step time"),
    "validate": ("validate", "error of today's formulas over recorded runs; exit 1 beyond tolerance"),
    "diff": ("diff", "predicted against measured blocks at the peak of a run with measure=snapshot"),
    "hardware": ("hardware", "memory outside PyTorch's allocator, from recorded runs: a row of configs/hardware"),
    "merge": ("merge", "a saved adapter added to its base model, to one safetensors file; says what it takes"),
    "bundle": ("bundle", "many records into one small file to commit"),
    "tables": ("tables", "every marked table of the READMEs, made anew; --check: is one stale?"),
    "benchmark": ("benchmark", "speed of training, cost of measuring, time of a prediction"),
}


def usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lab COMMAND [OVERRIDES in Hydra's grammar] [OPTIONS]",
            "",
            *lines,
            "",
            "`lab COMMAND --help` says more. Settings: configs/run.yaml and the folders beside it.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns its exit code (2: the user's mistake, in one line on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            raise ConfigError("command", name, f"no such command; one of {', '.join(COMMANDS)}")
        module = importlib.import_module(f"lab.cli.{COMMANDS[name][0]}")
        code = int(module.run(rest))
        sys.stdout.flush()  # here, where a reader that left is caught, and not at exit
        return code
    except ConfigError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe left, e.g. `lab compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
