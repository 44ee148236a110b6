"""Hugging Face's two calculators: the documentation's bytes per parameter, and a blog post's with activations."""

from __future__ import annotations

from lab.analytic.architecture import num_parameters
from lab.analytic.published.formula import Formula
from lab.config import RunConfig
from lab.vocab import Precision

SLOPE, INTERCEPT = 4.6894e-4, 1.8494e6  # activations per token of a model of psi parameters: a fit over models


def anatomy_bytes(cfg: RunConfig) -> int:
    """Weights + optimizer states + gradients, bytes per parameter.

    Weights 6 in mixed precision (fp32 and a 16-bit copy), 4 in fp32, 2 in pure 16-bit; AdamW 8, in bf16 4, SGD with
    momentum 4; gradients 4, in pure 16-bit 2. So 18 psi for mixed-precision AdamW. Knows no sharding; activations and
    temporaries are named there and not estimated.
    """
    pure = cfg.precision.kind is Precision.BF16_PURE
    weights = 2 if pure else 4 if cfg.precision.kind is Precision.FP32 else 6
    optimizer = (4 if pure else 8) if cfg.optimizer.kind == "adamw" else 4
    return num_parameters(cfg.model) * (weights + optimizer + (2 if pure else 4))


def blog_bytes(cfg: RunConfig) -> int | None:
    """3 psi P + max(psi P, A B L P) with A = 4.6894e-4 psi + 1.8494e6 activations per token.

    P bytes per value (4; 2 in pure bf16), B sequences of L tokens. Weights, two moments, then the larger of gradients,
    optimizer intermediates (as large) and activations. Knows no sharding, no checkpointing; None for SGD.
    """
    if cfg.optimizer.kind != "adamw":
        return None
    psi = num_parameters(cfg.model)
    width = 2 if cfg.precision.kind is Precision.BF16_PURE else 4
    activations = (SLOPE * psi + INTERCEPT) * cfg.train.micro_batch_size * cfg.train.seq_len * width
    return 3 * psi * width + max(psi * width, int(activations))


HF_ANATOMY = Formula(
    name="hf_anatomy",
    source="Hugging Face transformers documentation, model_memory_anatomy (18 bytes per parameter)",
    peak=anatomy_bytes,
    part=anatomy_bytes,
    part_name="states",
    missing="Missing: activations, logits and loss, and every kind of sharding; autocast's 16-bit copy is no state.",
)
HF_BLOG = Formula(
    name="hf_blog",
    source="Hugging Face blog, train_memory (Gallouedec 2024)",
    peak=blog_bytes,
    part=None,
    part_name="",
    missing=(
        "Missing: sharding, checkpointing, mixed precision; its activations are a line fitted to outputs of modules, "
        "which counts outputs that nothing keeps for backward."
    ),
)
