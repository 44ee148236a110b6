"""Draws the points of configs/experiment/h200_blind5.yaml: ``python experiments/h200_blind5/draw.py``.

As experiments/h200_blind4/draw.py draws them, with another seed: points on four GPUs and on two, of every sharded
strategy and DDP, with models up to 7e9 parameters and larger steps; hybrid sharding with groups of any size.
"""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from lab.analytic import predict
from lab.analytic.architecture import num_parameters
from lab.config import ConfigError, load
from lab.units import GIB

SEED, POINTS = 20261124, {4: 20, 2: 10}
SHARDED = ["ddp", "ddp", "zero1", "zero2", "zero2", "zero3", "zero3", "fsdp", "fsdp", "fsdp_grad_op", "hsdp", "hsdp"]


def quick(third: SimpleNamespace, settings: list[str]) -> bool:
    """Whether the lab takes the point, host and GPU are quick with it, and it fits with room to spare."""
    given = dict(s.split("=", 1) for s in settings)
    try:
        cfg = load([f"{k}={v}" for k, v in {**third.BASE, **given}.items()])
    except ConfigError:
        return False
    blocks = cfg.model.num_layers * cfg.train.gradient_accumulation_steps
    if cfg.model.num_layers > 32 or blocks > 64 or num_parameters(cfg.model) > 7e9 or third.operations(cfg) > 6e14:
        return False
    return predict(cfg).steady.device_used_bytes <= 120 * GIB


def main() -> int:
    third = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "h200_blind3" / "draw.py")))
    third.STRATEGIES.update(dict.fromkeys(POINTS, SHARDED))
    third.DRAWS["train.expandable_segments"] = (0.8, ["true"])
    third.OF_MODEL["lab"]["model"] = (0.2, ["125m", "1b", "1b", "3b", "7b"])
    third.OF_CHOICE["parallel=hsdp"]["parallel.fsdp.shard_size"] = (0.5, ["1", "2", "4"])
    rng = random.Random(SEED)
    for world_size, wanted in POINTS.items():
        found = 0
        while found < wanted:
            settings = third.drawn(rng, world_size)
            if quick(third, settings):
                found += 1
                print(f"  - {' '.join(settings)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
