"""Draws the points of configs/experiment/h200_blind6.yaml: ``python experiments/h200_blind6/draw.py``.

As experiments/h200_blind5/draw.py draws them, on two GPUs and on one, with settings that no draw had before: ZeRO's
all-gather and prefetch buckets and its reuse distance, DDP without broadcasts of buffers, 32 sequences, 32768 tokens,
weight decay off. No paged optimizers: their room on the device was being looked at.
"""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

SEED, POINTS = 20261125, {2: 22, 1: 20}
ONE_GPU = ["single"] * 8 + ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op"]


def main() -> int:
    here = Path(__file__).parents[1]
    third = SimpleNamespace(**runpy.run_path(str(here / "h200_blind3" / "draw.py")))
    fifth = SimpleNamespace(**runpy.run_path(str(here / "h200_blind5" / "draw.py")))
    third.STRATEGIES.update({1: ONE_GPU, 2: fifth.SHARDED})
    third.DRAWS["train.micro_batch_size"] = (0.3, ["1", "2", "6", "12", "32"])
    third.DRAWS["train.seq_len"] = (0.3, ["64", "200", "640", "1500", "3000", "6000", "32768"])
    third.DRAWS["optimizer"] = (0.5, ["sgd", "adafactor", "adamw_8bit", "lion_8bit"])
    third.DRAWS["train.expandable_segments"] = (0.85, ["true"])
    third.DRAWS["optimizer.weight_decay"] = (0.8, ["0"])
    third.OF_MODEL["lab"]["model"] = (0.2, ["25m", "125m", "1b", "3b"])
    third.OF_CHOICE["parallel=ddp"]["parallel.ddp.broadcast_buffers"] = (0.6, ["false"])
    third.OF_CHOICE["parallel=zero"]["parallel.zero.allgather_bucket_size"] = (0.5, ["5000000", "50000000"])
    third.OF_CHOICE["parallel=zero3"]["parallel.zero.stage3_prefetch_bucket_size"] = (0.4, ["0", "1000000", "20000000"])
    third.OF_CHOICE["parallel=zero3"]["parallel.zero.stage3_max_reuse_distance"] = (0.5, ["0", "10000000", "100000000"])
    rng = random.Random(SEED)
    for world_size, wanted in POINTS.items():
        found = 0
        while found < wanted:
            settings = third.drawn(rng, world_size)
            if fifth.quick(third, settings):
                found += 1
                print(f"  - {' '.join(settings)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
