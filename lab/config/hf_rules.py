"""What a run with a Hugging Face model cannot have, and whether its checkpoint is there. One ConfigError each."""

from __future__ import annotations

from importlib.util import find_spec

from lab.config.errors import ConfigError
from lab.config.hf_files import check_checkpoint
from lab.config.schema import RunConfig
from lab.vocab import AttentionBackend, Checkpointing, Precision


def check_hf(cfg: RunConfig) -> None:
    """Raise ConfigError for the first rule that a ``model=hf`` run breaks."""
    model = cfg.model
    if model.family == "lab":
        return
    if find_spec("transformers") is None:
        raise ConfigError("model", "hf", "needs the transformers library: pip install transformers")
    if cfg.loss.kind != "cross_entropy":
        raise ConfigError("loss.kind", cfg.loss.kind, "with model=hf the model's own loss is used: loss=cross_entropy")
    if cfg.checkpointing.kind is Checkpointing.SELECTIVE:
        raise ConfigError(
            "checkpointing",
            "selective",
            "transformers checkpoints whole blocks: use full, every_k or none with model=hf",
        )
    for name, value in [
        ("embedding dropout", model.hf.embedding_dropout),
        ("residual dropout", model.hf.residual_dropout),
    ]:
        if not 0.0 <= value < 1.0:
            raise ConfigError("model.path", model.path, f"its config.json has a {name} of {value}, not a probability")
    _check_attention(cfg)
    if not model.random_weights:
        check_checkpoint(str(model.path), model.allow_pickle)


def _check_attention(cfg: RunConfig) -> None:
    """A kernel that is asked for by name has to take the layers that slide, and those that do not.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (torch 2.11); transformers
    integrations/sdpa_attention.py, use_gqa_in_sdpa: heads are repeated where there is a mask.
    """
    model, backend = cfg.model, cfg.attention.backend
    window = model.hf.sliding_window
    full = window is not None and cfg.train.seq_len >= window  # is the window?
    masked = [full and model.hf.slides(i) for i in range(model.num_layers)]
    if backend is AttentionBackend.FLASH and any(masked) and cfg.hardware.device_type == "cuda":
        raise ConfigError(
            "attention",
            "flash",
            f"takes no mask, which layers with a sliding window of {window} tokens need at "
            f"train.seq_len={cfg.train.seq_len}; use auto, math or eager, or shorter sequences",
        )
    if backend is AttentionBackend.MEM_EFFICIENT and model.num_heads != model.num_kv_heads and not all(masked):
        raise ConfigError(
            "attention",
            "mem_efficient",
            f"transformers passes {model.num_kv_heads} key/value heads for {model.num_heads} query heads to the "
            "kernel, which refuses that; use auto, flash or cudnn",
        )
    multiple = 4 if cfg.precision.kind is Precision.FP32 else 8
    if backend is AttentionBackend.MEM_EFFICIENT and any(masked) and model.head_dim % multiple:
        raise ConfigError(
            "attention", "mem_efficient", f"needs a head_dim that is a multiple of {multiple}, not {model.head_dim}"
        )
