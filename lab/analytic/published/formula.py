"""What a published formula is: a function of the configuration, what it covers, where it is from, what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.config import RunConfig
from lab.vocab import Precision, Strategy

Bytes = Callable[[RunConfig], int | None]
"""Bytes per GPU; None for a run that the source does not cover."""


@dataclass(frozen=True)
class Formula:
    """One published estimate.

    ``peak``: what its users take for the GPU's need, held against the measured peak. ``part``: the quantity that the
    source itself claims, held against the same quantity measured: ``states`` (parameters, masters, gradients, optimizer
    states at the end of backward) or ``activations`` (with logits and loss, at the end of forward).
    """

    name: str
    source: str
    peak: Bytes
    part: Bytes | None
    part_name: str  # states | activations | ""
    missing: str  # one sentence: the terms that explain its errors


def mixed_precision_adam(cfg: RunConfig) -> bool:
    """What most sources mean: 16-bit weights and gradients, fp32 master copy and two fp32 moments."""
    return cfg.optimizer.kind == "adamw" and cfg.precision.kind in (Precision.BF16_MIXED, Precision.FP16_MIXED)


def stage_of(cfg: RunConfig) -> int:
    """The ZeRO stage with the same sharding: fsdp and hsdp 3, fsdp_grad_op 2, single and ddp 0."""
    strategy = cfg.parallel.strategy
    if strategy.is_fsdp:
        return 2 if strategy is Strategy.FSDP_GRAD_OP else 3
    return strategy.zero_stage


def num_ranks(cfg: RunConfig) -> int:
    """N of the formulas: the ranks that share one copy of what is sharded (hsdp: one shard group)."""
    return cfg.fsdp_shard_size
