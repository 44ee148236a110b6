"""``lab train``: one run on this machine; becomes torchrun with world_size processes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lab.cli.arguments import Parser
from lab.cli.process import clean_environment, threads, torchrun_command
from lab.config import load

HELP = """One run, as `torchrun --standalone --nproc-per-node WORLD_SIZE -m lab.train OVERRIDES` would start it.

  lab train parallel=zero3 world_size=2 model=25m precision=bf16_mixed
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("train", HELP)
    parser.add_overrides()
    overrides = parser.parse(argv).overrides
    for name in set(os.environ) - set(clean_environment()):
        del os.environ[name]
    cfg = load(overrides)  # a bad configuration ends here, before a process starts
    command = torchrun_command(overrides, cfg.world_size)
    environment = {**clean_environment(), "OMP_NUM_THREADS": threads()}
    os.execve(command[0], command, environment)
