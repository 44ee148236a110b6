"""A Hugging Face ``config.json`` -> the fields of ModelConfig, by plain JSON reading: no torch, no transformers.

Keys and defaults are those of transformers' configuration classes (5.17, 5.23 and 5.24, models/*/configuration_*.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.config.errors import ConfigError
from lab.config.hf_files import config_file

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2")
"""Families with an op list of their own. Others train, and are predicted as ``llama`` where their shapes are known."""

_TIED_BY_DEFAULT = ("gemma", "gpt2")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_PLAIN_ROPE = ("default", "linear", "llama3", "yarn")


def fill_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The composed ``model`` group with every shape that ``model.path``'s config.json gives. Raises ConfigError."""
    given = dict(model)
    path = given.get("path")
    if not isinstance(path, str) or not path:
        raise ConfigError("model.path", path, "a folder, a hub id or a config.json, needed with model=hf")
    file = config_file(path)
    reader = _Reader(path, _read_json(path, file))
    shapes = reader.fields()
    num_layers = given.pop("num_layers", None)
    if given.get("name") == "hf":
        given["name"] = file.stem if file.name != "config.json" else file.parent.name or "hf"
    if num_layers is not None:
        if not given.get("random_weights"):
            raise ConfigError("model.num_layers", num_layers, "comes from config.json unless model.random_weights=true")
        shapes["num_layers"] = num_layers
    if isinstance(shapes["num_layers"], int):  # else the typed build will refuse it
        shapes["hf"]["full_layers"] = reader.full_layers(shapes["num_layers"])
    return {**given, **shapes}


def _read_json(path: str, file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model.path", path, f"{file.name} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError("model.path", path, f"{file.name} is not a JSON object")
    return tree


class _Reader:
    """One config.json, its keys checked as they are read."""

    def __init__(self, path: str, tree: dict[str, Any]) -> None:
        self.path, self.tree = path, tree
        kind = tree.get("model_type")
        if not isinstance(kind, str) or not kind:
            raise ConfigError("model.path", path, "its config.json names no model_type")
        self.model_type = kind
        self.family = kind if kind in FAMILIES else "other"

    def _fail(self, key: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError("model.path", self.path, f"its config.json has {key}={value!r}; {wanted}")

    def whole(self, *keys: str, default: int | None = None) -> int:
        """The first of ``keys`` that is there and not null, else ``default``."""
        for key in keys:
            value = self.tree.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
                raise self._fail(key, value, "expected a positive whole number")
            return value
        if default is None:
            known = f"model_type {self.model_type}, which the lab does not know" if self.family == "other" else ""
            raise ConfigError("model.path", self.path, f"its config.json has no {keys[0]}{known and f' ({known})'}")
        return default

    def number(self, key: str, default: float) -> float:
        value = self.tree.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._fail(key, value, "expected a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.tree.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fail(key, value, "expected true or false")
        return value

    def fields(self) -> dict[str, Any]:
        """ModelConfig's fields, ``hf`` (HFConfig's) among them."""
        shapes = self._gpt2() if self.family == "gpt2" else self._llama_like()
        heads, kv_heads = shapes["num_heads"], shapes["num_kv_heads"]
        if heads % kv_heads:
            raise self._fail("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
        shapes |= {"family": self.family, "vocab_size": self.whole("vocab_size")}
        shapes["tied_head"] = self.flag("tie_word_embeddings", self.family in _TIED_BY_DEFAULT)
        return shapes

    def _activation(self, key: str, default: str) -> str:
        value = self.tree.get(key) or default
        if self.family == "gemma" and value == "gelu":  # configuration_gemma.py: a legacy value for the tanh kind
            value = "gelu_pytorch_tanh"
        return _ACTIVATIONS.get(value, str(value))

    def _sliding_window(self) -> int | None:
        """Tokens that a sliding layer sees: Mistral's, and Qwen's with ``use_sliding_window``; None: none slides."""
        qwen = self.family in ("qwen2", "qwen3") and self.flag("use_sliding_window", False)
        if not (qwen or self.family == "mistral") or self.tree.get("sliding_window", 4096) is None:
            return None
        return self.whole("sliding_window", default=4096)

    def full_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that attend fully although the model has a sliding window.

        Mistral has none. Qwen's ``layer_types`` say, or else the first ``max_window_layers`` do
        (configuration_qwen2.py and configuration_qwen3.py, __post_init__).
        """
        given, window = self.tree.get("layer_types"), self._sliding_window()
        if self.family not in ("qwen2", "qwen3"):
            return ()
        if given is None:
            first = 0 if self.tree.get("max_window_layers") == 0 else self.whole("max_window_layers", default=28)
            given = [_FULL] * first + [_SLIDING] * (num_layers - first) if window is not None else [_FULL] * num_layers
        elif not isinstance(given, list) or len(given) < num_layers or any(t not in (_FULL, _SLIDING) for t in given):
            raise self._fail("layer_types", given, f"expected {_FULL} or {_SLIDING} for each of {num_layers} layers")
        full = tuple(i for i in range(num_layers) if given[i] == _FULL)
        if window is None and len(full) < num_layers:
            raise self._fail("layer_types", given, f"{_SLIDING} needs use_sliding_window=true and a sliding_window")
        return full if window is not None else ()

    def _gpt2(self) -> dict[str, Any]:
        hidden, heads = self.whole("n_embd", "hidden_size"), self.whole("n_head", "num_attention_heads")
        if hidden % heads:
            raise self._fail("n_head", heads, f"must divide n_embd={hidden}")
        return {
            "num_layers": self.whole("n_layer", "num_hidden_layers"),
            "hidden_size": hidden,
            "intermediate_size": self.whole("n_inner", default=4 * hidden),
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": hidden // heads,
            "max_seq_len": self.whole("n_positions", "max_position_embeddings", default=1024),
            "norm": "layernorm",
            "mlp": "gelu",
            "position": "learned",
            "bias": True,
            "fused_qkv": True,
            "dropout": self.number("attn_pdrop", 0.1),
            "norm_eps": self.number("layer_norm_epsilon", 1e-5),
            "hf": {
                "model_type": self.model_type,
                "activation": self._activation("activation_function", "gelu_new"),
                "embedding_dropout": self.number("embd_pdrop", 0.1),
                "residual_dropout": self.number("resid_pdrop", 0.1),
            },
        }

    def _llama_like(self) -> dict[str, Any]:
        hidden, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        default_head_dim = {"gemma": 256, "qwen3": 128}.get(self.family)
        head_dim = self.whole("head_dim", default=default_head_dim or hidden // heads)
        bias = self.family == "qwen2" or (self.family != "mistral" and self.flag("attention_bias", False))
        rope = self.tree.get("rope_parameters") or self.tree.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
        return {
            "num_layers": self.whole("num_hidden_layers"),
            "hidden_size": hidden,
            "intermediate_size": self.whole("intermediate_size"),
            "num_heads": heads,
            "num_kv_heads": self.whole("num_key_value_heads", default=heads),
            "head_dim": head_dim,
            "max_seq_len": self.whole("max_position_embeddings", default=2048),
            "dropout": self.number("attention_dropout", 0.0),
            "norm_eps": self.number("rms_norm_eps", 1e-6),
            "bias": bias,
            "hf": {
                "model_type": self.model_type,
                "activation": self._activation("hidden_act", "gelu_pytorch_tanh" if self.family == "gemma" else "silu"),
                "output_bias": bias and self.family != "qwen2",
                "mlp_bias": self.family == "llama" and self.flag("mlp_bias", False),
                "qk_norm": self.family == "qwen3",
                "sliding_window": self._sliding_window(),
                "rope_type": kind if kind in _PLAIN_ROPE else "dynamic",
            },
        }
