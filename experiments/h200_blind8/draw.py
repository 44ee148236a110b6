"""Draws the points of configs/experiment/h200_blind8.yaml: ``python experiments/h200_blind8/draw.py``.

As experiments/h200_blind7/draw.py draws them, with another seed and without sliding windows, which were being modelled.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SEED, POINTS, HF_MODELS = 20261202, 84, 20
HERE = Path("experiments/h200_blind8")


def main() -> int:
    seventh = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "h200_blind7" / "draw.py")))
    names: dict[str, Any] = seventh.main.__globals__  # what its functions see
    model = names["hf_model"]

    def without_window(rng: Any) -> dict[str, Any]:
        drawn: dict[str, Any] = model(rng)
        return {**drawn, **{k: v for k, v in (("sliding_window", None), ("use_sliding_window", False)) if k in drawn}}

    names.update(SEED=SEED, POINTS=POINTS, HF_MODELS=HF_MODELS, MODELS=HERE / "models", hf_model=without_window)
    return int(seventh.main())


if __name__ == "__main__":
    sys.exit(main())
