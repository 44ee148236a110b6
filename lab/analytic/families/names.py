"""Transformers' module names in the lab's words, so that one table (lab.analytic.sources) serves both."""

from __future__ import annotations

import re
from functools import cache

_BLOCK = re.compile(r"\bhf\.(?:model\.layers|transformer\.h)\.(\d+)\.")
_MODULES = (
    (r"(\bblocks\.\d+\.)(?:self_attn|attn)\b", r"\1attention"),
    (r"(\bblocks\.\d+\.)(?:input_layernorm|ln_1)\b", r"\1attention_norm"),
    (r"(\bblocks\.\d+\.)(?:post_attention_layernorm|ln_2)\b", r"\1mlp_norm"),
    (r"\bhf\.(?:model\.embed_tokens|transformer\.wte)\b", "embedding"),
    (r"\bhf\.transformer\.wpe\b", "position"),
    (r"\bhf\.(?:model\.norm|transformer\.ln_f)\b", "norm"),
    (r"\bhf\.lm_head\b", "head"),
)


@cache
def in_lab_words(text: str) -> str:
    """'gradient of hf.model.layers.0.self_attn.q_proj.weight' -> 'gradient of blocks.0.attention.q_proj.weight'."""
    if "hf." not in text:
        return text
    text = _BLOCK.sub(r"blocks.\1.", text)
    for pattern, words in _MODULES:
        text = re.sub(pattern, words, text)
    return text
