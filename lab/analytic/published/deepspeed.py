"""DeepSpeed's two estimators, re-derived from 0.19.8: their GPU figure without offload.

runtime/zero/stage_1_and_2.py, estimate_zero2_model_states_mem_needs; runtime/zero/stage3.py,
estimate_zero3_model_states_mem_needs (psi parameters, N GPUs, l the largest layer's parameters).
"""

from __future__ import annotations

from collections import defaultdict

from lab.analytic.architecture import num_parameters, parameters
from lab.analytic.published.formula import Formula
from lab.config import ModelConfig, RunConfig


def zero2_bytes(psi: int, ranks: int) -> int:
    """2 psi + 18 psi / N: 16-bit weights; 16- and 32-bit gradients, 32-bit weights, two 32-bit moments (no offload)."""
    return 2 * psi + int(18 * psi / ranks)


def zero3_bytes(psi: int, largest: int, ranks: int) -> int:
    """4 l + 18 psi / N: the largest layer's weights and gradients gathered, all else sharded (no offload)."""
    return 4 * largest + int(18 * psi / ranks)


def largest_layer_parameters(model: ModelConfig) -> int:
    """stage3.py, model_to_params: most parameters that one module holds directly."""
    by_module: dict[str, int] = defaultdict(int)
    for spec in parameters(model):
        by_module[spec.name.rpartition(".")[0]] += spec.numel
    return max(by_module.values())


def deepspeed_estimate(cfg: RunConfig) -> int | None:
    """Model states of ``zero2`` and ``zero3``; None elsewhere. The estimators take no precision and no optimizer."""
    stage, psi = cfg.parallel.strategy.zero_stage, num_parameters(cfg.model)
    if stage == 2:
        return zero2_bytes(psi, cfg.world_size)
    return zero3_bytes(psi, largest_layer_parameters(cfg.model), cfg.world_size) if stage == 3 else None


DEEPSPEED = Formula(
    name="deepspeed",
    source="DeepSpeed 0.19.8, estimate_zero2_/estimate_zero3_model_states_mem_needs",
    peak=deepspeed_estimate,
    part=deepspeed_estimate,
    part_name="states",
    missing=(
        "Missing: activations, logits and loss; in stage 3 the reduce bucket of 5e8 elements and up to "
        "stage3_max_live_parameters gathered ones, in place of a single layer; 32-bit gradients exist in the step only."
    ),
)
