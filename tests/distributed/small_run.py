"""A run of seconds on a text of its own, for the tests that start real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def small_run(folder: Path, steps: int = 3) -> list[str]:
    """Overrides; the text is written into ``folder``."""
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(4000)))
    return [
        "hardware=cpu",
        "tracker=none",
        "data=text",
        f"data.path={text}",
        "data.tokenizer_vocab_size=400",
        "model.num_layers=2",
        "train.seq_len=32",
        f"train.steps={steps}",
    ]


def lab(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The ``lab`` command in a process of its own, its outputs under ``cwd``."""
    command = [sys.executable, "-m", "lab.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
