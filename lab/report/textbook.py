"""What the published formulas say of a run, to hold against what it measured. Not the lab's prediction.

State bytes: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, Table 1 with K = 12): 16 bytes per parameter, divided as
the stage says. Activations: Korthikanti et al. 2022 (arXiv 2205.05198, Table 2 and section 4.3). Nothing else: no
buckets, gathered parameters, casts, workspaces or temporaries, which is the point of the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.config import RunConfig
from lab.vocab import AttentionBackend, Checkpointing, Precision, Strategy

# Bytes per parameter of weights, gradients, and what the optimizer keeps (fp32 copy if any, two moments).
_ADAM: dict[Precision, tuple[int, int, int]] = {
    Precision.BF16_MIXED: (2, 2, 12),
    Precision.FP16_MIXED: (2, 2, 12),
    Precision.FP32: (4, 4, 8),
    Precision.BF16_PURE: (2, 2, 4),
}


@dataclass(frozen=True)
class Textbook:
    """Bytes per GPU; ``activation_bytes`` is None where no published formula covers the run."""

    state_bytes: int
    activation_bytes: int | None

    @property
    def total_bytes(self) -> int | None:
        return None if self.activation_bytes is None else self.state_bytes + self.activation_bytes


def textbook(cfg: RunConfig, num_parameters: int) -> Textbook | None:
    """The published estimate of a run; None for an optimizer that the formulas do not know."""
    if cfg.optimizer.kind != "adamw":
        return None
    return Textbook(state_bytes(cfg, num_parameters), activation_bytes(cfg))


def state_bytes(cfg: RunConfig, num_parameters: int) -> int:
    """Psi (w + g + k), each term over N where the stage shards it: k from stage 1, g from stage 2, w from stage 3.

    Psi parameters, N ranks. Mixed precision: w = g = 2, k = 12, so 16 Psi, 4 Psi + 12 Psi / N, 2 Psi + 14 Psi / N and
    16 Psi / N. FSDP counts as stage 3, its grad_op (parameters stay gathered) as stage 2, HSDP as stage 3 within a
    shard group. fp32: w = g = 4, k = 8. Pure bf16: w = g = 2, k = 4.
    """
    weights, gradients, optimizer = _ADAM[cfg.precision.kind]
    strategy, ranks = cfg.parallel.strategy, cfg.fsdp_shard_size
    stage = strategy.zero_stage or (2 if strategy is Strategy.FSDP_GRAD_OP else 3 if strategy.is_fsdp else 0)
    whole = weights * (stage < 3) + gradients * (stage < 2) + optimizer * (stage < 1)
    return num_parameters * whole + num_parameters * (weights + gradients + optimizer - whole) // ranks


def activation_bytes(cfg: RunConfig) -> int | None:
    """L sbh (34 + 5 a s / h), with 2 sbh for a fully recomputed layer, plus 4 sbh at the head and 4 sbv of fp32 logits.

    s sequence, b micro-batch, h hidden size, a heads, L layers, v vocabulary. The term in a counts stored attention
    weights; a fused backend stores none (their "selective recomputation"). The formula is for 16-bit activations and
    a GELU MLP of 4 h with dropout; it is used for every model, as people do. None in fp32, and for the lab's
    ``selective``, which keeps matrix products and recomputes the rest: something else than the paper's.
    """
    if cfg.precision.kind is Precision.FP32 or cfg.checkpointing.kind is Checkpointing.SELECTIVE:
        return None
    model, train = cfg.model, cfg.train
    tokens, hidden = train.seq_len * train.micro_batch_size, model.hidden_size
    stored = cfg.attention.backend in (AttentionBackend.EAGER, AttentionBackend.MATH)
    layer = 34 * tokens * hidden + (5 * model.num_heads * train.seq_len * tokens if stored else 0)
    recomputed = {
        Checkpointing.NONE: 0,
        Checkpointing.FULL: model.num_layers,
        Checkpointing.EVERY_K: -(-model.num_layers // cfg.checkpointing.every_k),
    }[cfg.checkpointing.kind]
    layers = (model.num_layers - recomputed) * layer + recomputed * 2 * tokens * hidden
    return layers + 4 * tokens * hidden + 4 * tokens * model.vocab_size
