"""optimizer.kind -> its replay."""

from __future__ import annotations

from lab.analytic.adafactor import Adafactor
from lab.analytic.optimizers import Optimizer, TorchOptimizer
from lab.analytic.optimizers_8bit import BitsAndBytes
from lab.analytic.tape import Tape
from lab.config import RunConfig


def make_optimizer(tape: Tape, cfg: RunConfig) -> Optimizer:
    """The optimizer of one rank, without states yet."""
    kind = cfg.optimizer.kind
    if kind in ("adamw", "sgd"):
        return TorchOptimizer(tape, cfg.optimizer)
    if kind == "adafactor":
        return Adafactor(tape, cfg.optimizer, cfg.hardware.num_streaming_multiprocessors)
    return BitsAndBytes(tape, cfg.optimizer)
