"""Draws the points of configs/experiment/h200_blind9.yaml: ``python experiments/h200_blind9/draw.py``.

As experiments/h200_blind7/draw.py draws them, with another seed; half of the runs under a strategy, paged optimizers as
often as others, sliding windows among the models.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SEED, POINTS, HF_MODELS = 20261203, 64, 20
STRATEGIES = ["single"] * 6 + ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op"]


def main() -> int:
    seventh = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "h200_blind7" / "draw.py")))
    names: dict[str, Any] = seventh.main.__globals__  # what its functions see
    models = Path("experiments/h200_blind9/models")
    names.update(SEED=SEED, POINTS=POINTS, HF_MODELS=HF_MODELS, MODELS=models, STRATEGIES=STRATEGIES)
    return int(seventh.main())


if __name__ == "__main__":
    sys.exit(main())
