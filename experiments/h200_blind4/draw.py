"""Draws the points of configs/experiment/h200_blind4.yaml: ``python experiments/h200_blind4/draw.py``.

As experiments/h200_blind3/draw.py draws them, with another seed, and with expandable segments in one of three.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

SEED, ONE_GPU, TWO_GPUS = 20261123, 30, 16


def main() -> int:
    third = runpy.run_path(str(Path(__file__).parents[1] / "h200_blind3" / "draw.py"))
    third["DRAWS"]["train.expandable_segments"] = (2 / 3, ["true"])
    for settings, _ in third["points"](SEED, ONE_GPU, TWO_GPUS):
        print(f"  - {' '.join(settings)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
