"""Small Hugging Face configurations, written as config.json, for the tests of ``model=hf``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHAPES = {
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 700}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **_SHAPES},
    "llama_biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        **_SHAPES,
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, **_SHAPES},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True, **_SHAPES},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, **_SHAPES},
    "mistral_sliding": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16, **_SHAPES},
    "qwen3_sliding": {  # the second of two layers
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        **_SHAPES,
    },
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, **_SHAPES},
    "gpt2": _GPT2,
    "gpt2_plain": {**_GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "activation_function": "gelu"},
}


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """The named configuration's file in ``folder``; a change to None removes the key."""
    tree = {k: v for k, v in {**CONFIGS[name], **changes}.items() if k not in changes or v is not None}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    return path


def hf_overrides(path: Path, *more: str) -> list[str]:
    """A run of ``path`` with random weights."""
    base = ["model=hf", f"model.path={path}", "model.random_weights=true", "data.tokenizer_vocab_size=512"]
    given = {o.partition("=")[0] for o in more}
    sizes = [o for o in ("train.seq_len=32", "train.micro_batch_size=2") if o.partition("=")[0] not in given]
    return [*base, *sizes, *more]
