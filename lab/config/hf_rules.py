"""What a run with a Hugging Face model cannot have, and whether its checkpoint is there. One ConfigError each."""

from __future__ import annotations

from importlib.util import find_spec

from lab.config.errors import ConfigError
from lab.config.hf_files import check_checkpoint
from lab.config.schema import RunConfig
from lab.vocab import AttentionBackend, Checkpointing


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
    if cfg.attention.backend is AttentionBackend.MEM_EFFICIENT and model.num_heads != model.num_kv_heads:
        raise ConfigError(
            "attention",
            "mem_efficient",
            f"transformers passes {model.num_kv_heads} key/value heads for {model.num_heads} query heads to the "
            "kernel, which refuses that; use auto, flash or cudnn",
        )
    if not model.random_weights:
        check_checkpoint(str(model.path), model.allow_pickle)
