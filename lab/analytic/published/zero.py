"""ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (Rajbhandari et al. 2020, arXiv 1910.02054)."""

from __future__ import annotations

from lab.analytic.architecture import num_parameters
from lab.analytic.published.formula import Formula, mixed_precision_adam, num_ranks, stage_of
from lab.config import RunConfig

K = 12  # bytes per parameter: fp32 weights, momentum, variance (section 3.1)


def model_state_bytes(psi: int, ranks: int, stage: int) -> float:
    """Section 5 and Table 1: (2 + 2 + K) psi; stage 1: 4 psi + K psi / N; 2: 2 psi + (2 + K) psi / N; 3: 16 psi / N.

    psi: parameters; N ``ranks``: data-parallel degree; K = 12 for Adam. Bytes per GPU of weights, gradients and
    optimizer states. Leaves out everything else ("residual states"): activations, buffers, fragmentation.
    """
    whole = 2 * (stage < 3) + 2 * (stage < 2) + K * (stage < 1)
    return psi * whole + psi * (4 + K - whole) / ranks


def zero_table1(cfg: RunConfig) -> int | None:
    """Model states by Table 1; None unless it is mixed-precision Adam, which the table is about."""
    if not mixed_precision_adam(cfg):
        return None
    return int(model_state_bytes(num_parameters(cfg.model), num_ranks(cfg), stage_of(cfg)))


def rule16(cfg: RunConfig) -> int | None:
    """16 bytes per parameter (2 + 2 + 12), over N where everything is sharded: 16 psi, or 16 psi / N.

    The rule of thumb that came of the same section 3.1. None for stages 1 and 2, of which it says nothing, and for
    anything but mixed-precision Adam. Leaves out what Table 1 does.
    """
    stage = stage_of(cfg)
    if not mixed_precision_adam(cfg) or stage in (1, 2):
        return None
    return 16 * num_parameters(cfg.model) // (num_ranks(cfg) if stage == 3 else 1)


ZERO_TABLE1 = Formula(
    name="zero_table1",
    source="Rajbhandari et al. 2020, arXiv 1910.02054, section 5 and Table 1",
    peak=zero_table1,
    part=zero_table1,
    part_name="states",
    missing=(
        "Missing: activations, logits and loss; then buckets and gathered parameters, so that stages 2 and 3 need more "
        "than it says. Whole gradients of stage 1, and of fsdp_grad_op as stage 2 weights, are there in backward only."
    ),
)
RULE16 = Formula(
    name="rule16",
    source="rule of thumb after arXiv 1910.02054, section 3.1: 2 + 2 + 12 bytes per parameter",
    peak=rule16,
    part=rule16,
    part_name="states",
    missing="Missing: activations, logits and loss, and whatever an engine holds besides its shards.",
)
