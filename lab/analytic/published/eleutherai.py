"""EleutherAI's calculator: github.com/EleutherAI/cookbook, calc/calc_transformer_mem.py, function calc_mem.

The code of "Transformer Math 101" (blog.eleuther.ai/transformer-math). Re-derived for training without tensor or
pipeline parallelism and experts, with its defaults (4-byte gradients, no miscellaneous memory).
"""

from __future__ import annotations

from lab.analytic.published.formula import Formula, num_ranks, stage_of
from lab.config import ModelConfig, RunConfig
from lab.vocab import Checkpointing, Precision

ALLGATHER_BUCKET = 500_000_000  # elements, --zero-allgather-bucket-size
MAX_LIVE = 1_000_000_000  # elements, --zero3-max-live-params


def parameters_of(model: ModelConfig, s: int) -> int:
    """2 v h + s h + 8 h L + 2 h + 2 (1 + k / a) L h^2 + m L h f: m linears per MLP, always a position table."""
    h, layers = model.hidden_size, model.num_layers
    attention = 2 * (model.num_heads + model.num_kv_heads) * layers * h * h // model.num_heads
    linears = 3 if model.mlp == "swiglu" else 2
    norms = 8 * h * layers + 2 * h
    return 2 * model.vocab_size * h + s * h + norms + attention + linears * layers * h * model.intermediate_size


def activation_bytes(cfg: RunConfig) -> int:
    """s b h L (34 + 5 a s / h); "checkpointed" drops the second term, which is selective recomputation, not full."""
    model, s = cfg.model, cfg.train.seq_len
    rows = s * cfg.train.micro_batch_size * model.num_layers
    scores = 5 * model.num_heads * s if cfg.checkpointing.kind is Checkpointing.NONE else 0
    return rows * (34 * model.hidden_size + scores)


def eleutherai(cfg: RunConfig) -> int | None:
    """Weights e psi, gradients 4 psi, optimizer 12 psi, each over N from its stage on, buffers, activations.

    e = 2, in fp32 4. Buffers from stage 1 on, N > 1: e * 5e8; in stage 3 also e * 1e9 live parameters. None for SGD.
    """
    if cfg.optimizer.kind != "adamw":
        return None
    psi, ranks, stage = parameters_of(cfg.model, cfg.train.seq_len), num_ranks(cfg), stage_of(cfg)
    width = 4 if cfg.precision.kind is Precision.FP32 else 2
    total = 0.0
    for size, first in ((width, 3), (4, 2), (12, 1)):
        total += size * psi / (ranks if stage >= first else 1)
    if stage >= 1 and ranks > 1:
        total += width * (ALLGATHER_BUCKET + (MAX_LIVE if stage == 3 else 0))
    return int(total) + activation_bytes(cfg)


ELEUTHERAI = Formula(
    name="eleutherai",
    source="EleutherAI cookbook, calc/calc_transformer_mem.py (Transformer Math 101)",
    peak=eleutherai,
    part=activation_bytes,
    part_name="activations",
    missing=(
        "Missing: logits and loss, full recomputation (its checkpointing still stores 34 sbh); it counts attention "
        "scores that fused kernels never store, and 1e9 live parameters also for models that have fewer."
    ),
)
