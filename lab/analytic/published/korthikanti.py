"""Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al. 2022, arXiv 2205.05198).

s sequence length, b micro-batch, h hidden size, a heads, L layers, v vocabulary, t tensor-parallel degree; bytes, for
16-bit activations, a GELU MLP of 4 h and dropout (a byte per mask element).
"""

from __future__ import annotations

from lab.analytic.attention_shape import AttentionShape, choose_backend
from lab.analytic.published.formula import Formula
from lab.analytic.published.zero import zero_table1
from lab.config import RunConfig
from lab.vocab import AttentionBackend, Checkpointing, Precision


def layer_activation_bytes(
    s: int, b: int, h: int, a: int, t: int = 1, sequence_parallel: bool = False, recompute: str = "none"
) -> float:
    """Table 2, one transformer layer.

    none: sbh (10 + 24 / t + 5 a s / (h t)), with sequence parallelism sbh (34 / t + 5 a s / (h t));
    ``recompute="selective"`` drops the last term, ``"full"`` keeps the layer's input alone, 2 sbh.
    """
    if recompute == "full":
        return 2 * s * b * h
    rest = 34 / t if sequence_parallel else 10 + 24 / t
    core = 0 if recompute == "selective" else 5 * a * s / (h * t)
    return s * b * h * (rest + core)


def ends_activation_bytes(s: int, b: int, h: int, v: int, t: int = 1) -> float:
    """Section 4.3, one pipeline stage: embedding dropout sbh / t, then 4 sbh / t (1 + v / h).

    The second: input of the last norm 2 sbh, input of the head 2 sbh, fp32 logits 4 sbv.
    """
    return s * b * h / t + 4 * s * b * h / t * (1 + v / h)


def activation_bytes(cfg: RunConfig) -> int | None:
    """All layers and the ends, t = 1. A fused attention kernel stores what selective recomputation does.

    None in fp32, and for the lab's ``selective``, which recomputes other operations than the paper's.
    """
    model, s, b = cfg.model, cfg.train.seq_len, cfg.train.micro_batch_size
    kind, h, a = cfg.checkpointing.kind, model.hidden_size, model.num_heads
    if cfg.precision.kind is Precision.FP32 or kind is Checkpointing.SELECTIVE:
        return None
    shape = AttentionShape(b, s, a, model.num_kv_heads, model.head_dim)
    backend = choose_backend(cfg.attention.backend, cfg.hardware.device_type, cfg.precision.kind, shape, model.dropout)
    stored = backend in (AttentionBackend.EAGER, AttentionBackend.MATH)
    layer = layer_activation_bytes(s, b, h, a, recompute="none" if stored else "selective")
    recomputed = 0
    if kind is not Checkpointing.NONE:
        recomputed = -(-model.num_layers // (cfg.checkpointing.every_k if kind is Checkpointing.EVERY_K else 1))
    layers = recomputed * layer_activation_bytes(s, b, h, a, recompute="full") + (model.num_layers - recomputed) * layer
    return int(layers + ends_activation_bytes(s, b, h, model.vocab_size))


def states_and_activations(cfg: RunConfig) -> int | None:
    """What is usually made of both papers: ZeRO's Table 1 plus these activations."""
    states, activations = zero_table1(cfg), activation_bytes(cfg)
    return None if states is None or activations is None else states + activations


KORTHIKANTI = Formula(
    name="korthikanti",
    source="Korthikanti et al. 2022, arXiv 2205.05198, Table 2 and section 4.3; for the peak with ZeRO's Table 1",
    peak=states_and_activations,
    part=activation_bytes,
    part_name="activations",
    missing=(
        "Missing: the widths of SwiGLU and of grouped heads (34 stands for a 4 h GELU MLP with dropout), autocast's "
        "casts and fp32 residual stream, backward's two fp32 logit gradients, buckets, gathered parameters, workspaces."
    ),
)
