"""Hugging Face models behind the lab's signature ``model(tokens, targets) -> loss``. The one place that imports
transformers for training.

Built on the meta device by ``AutoModelForCausalLM.from_config``; the engines materialise it (lab/parallel), parameter
by parameter, from a generator or from the checkpoint. Buffers that are computed and not stored (rotary frequencies,
Gemma's embedding scale) are given their values by the model's own ``_init_weights``, as ``from_pretrained`` does.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.config import ConfigError, ModelConfig, RunConfig
from lab.config.hf_files import config_file
from lab.model.hf_weights import Checkpoint
from lab.vocab import AttentionBackend, Checkpointing

_SDPA: dict[AttentionBackend, SDPBackend] = {
    AttentionBackend.MATH: SDPBackend.MATH,
    AttentionBackend.MEM_EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    AttentionBackend.FLASH: SDPBackend.FLASH_ATTENTION,
    AttentionBackend.CUDNN: SDPBackend.CUDNN_ATTENTION,
}
_BLOCKS = ("model.layers", "transformer.h", "model.decoder.layers", "gpt_neox.layers", "transformer.blocks")


def import_transformers() -> Any:
    """transformers, quiet, and without a look at the network."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


class HFCausalLM(nn.Module):
    """``hf``: the transformers model. The loss is its own: ``labels`` are the tokens, shifted inside by one.

    ForCausalLMLoss (transformers loss/loss_utils.py) upcasts the logits and masks each sequence's last position, so
    the lab's ``targets`` are not looked at, and the loss is over ``seq_len - 1`` tokens.
    """

    def __init__(self, hf: nn.Module, path: str, checkpoint: Checkpoint | None) -> None:
        super().__init__()
        self.hf = hf
        self._blocks = _blocks_path(hf, path)
        self.checkpoint = checkpoint
        self._embedded: weakref.ref[Tensor] | None = None
        hf.get_input_embeddings().register_forward_hook(self._note_embedded)

    def _note_embedded(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._embedded = weakref.ref(output)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks: what is checkpointed, and FSDP's and ZeRO's units."""
        blocks: nn.ModuleList = self.hf.get_submodule(self._blocks)
        return blocks

    @property
    def token_embedding(self) -> str:
        """Name of the token embedding."""
        wanted = self.hf.get_input_embeddings()
        found: str = next(name for name, module in self.named_modules() if module is wanted)
        return found

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens int64 [b, s] -> fp32 scalar. ``outputs`` (with the logits) go when this returns."""
        loss: Tensor = self.hf(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def cached_tensors(self) -> list[Tensor]:
        """The buffers: rotary frequencies. A frozen embedding's output and its gradient, where checkpointing wants one.

        transformers makes that output a leaf then, which nothing saves and no parameter owns.
        """
        embedded = self._embedded() if self._embedded is not None else None
        leaf = [embedded] if embedded is not None and embedded.is_leaf else []
        return [*self.buffers(), *leaf, *(t.grad for t in leaf if t.grad is not None)]

    def stored_value(self, name: str) -> Callable[[], Tensor] | None:
        """How to read the parameter ``name`` from the checkpoint; None: draw it, as an adapter's."""
        checkpoint, key = self.checkpoint, name.removeprefix("hf.").replace(".base_layer.", ".")
        if checkpoint is None or not checkpoint.has(key):
            return None
        return lambda: checkpoint.read(key)

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def materialise_buffers(self, device: torch.device) -> None:
        """Every buffer on ``device`` with its value; existing ones are written anew (FSDP's to_empty empties them)."""
        for module in self.hf.modules():
            names = [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
            if not names:
                continue
            for name in names:
                buffer = module._buffers[name]
                if buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
            own = [p for p in module.parameters(recurse=False) if not hasattr(p, "_is_hf_initialized")]
            for parameter in own:  # transformers' initialisers leave these alone
                parameter._is_hf_initialized = True
            self.hf._init_weights(module)
            for parameter in own:
                del parameter._is_hf_initialized


def _blocks_path(hf: nn.Module, path: str) -> str:
    """Where the list of blocks is. Raises ConfigError for a model in which it is not found."""
    for name in _BLOCKS:
        try:
            if isinstance(hf.get_submodule(name), nn.ModuleList):
                return name
        except AttributeError:
            continue
    raise ConfigError("model.path", path, f"{type(hf).__name__}: no list of transformer blocks under a known name")


def hf_config(model: ModelConfig, attention: AttentionBackend) -> Any:
    """transformers' configuration object, with the lab's attention backend. Raises ConfigError."""
    transformers = import_transformers()
    path = str(model.path)
    tree = json.loads(config_file(path).read_text(encoding="utf-8"))
    kind = tree.pop("model_type")
    for key in ("num_hidden_layers", "n_layer"):
        if key in tree:
            tree[key] = model.num_layers
    if isinstance(tree.get("layer_types"), list):
        tree["layer_types"] = tree["layer_types"][: model.num_layers]
    try:
        config = transformers.AutoConfig.for_model(kind, **tree)
    except Exception as error:  # an unknown model_type, or values that its class refuses
        raise ConfigError("model.path", path, f"transformers refuses its config.json: {_line(error)}") from None
    config._attn_implementation = _attention_name(attention)
    config.use_cache = False
    return config


def build_hf_model(cfg: RunConfig, dtype: torch.dtype) -> HFCausalLM:
    """The model on the meta device, its parameters in ``dtype``; a checkpoint's names and shapes are compared here."""
    transformers = import_transformers()
    path = str(cfg.model.path)
    config = hf_config(cfg.model, cfg.attention.backend)
    try:
        with torch.device("meta"):
            hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise ConfigError("model.path", path, f"transformers cannot build it: {_line(error)}") from None
    hf.train()
    _enable_checkpointing(cfg, hf)
    checkpoint = None
    if not cfg.model.random_weights:
        checkpoint = Checkpoint(path, cfg.model.allow_pickle, hf)
    return HFCausalLM(hf, path, checkpoint)


def check_hf_model(cfg: RunConfig) -> None:
    """Before any process group or GPU is touched: does transformers know the model, does the checkpoint fit it?"""
    if cfg.model.family != "lab":
        build_hf_model(cfg, torch.float32)


def _enable_checkpointing(cfg: RunConfig, hf: Any) -> None:
    """gradient_checkpointing_enable, non-reentrant: all blocks, or blocks 0, k, 2k, ... The rules refuse others."""
    if cfg.checkpointing.kind is Checkpointing.NONE:
        return
    if not getattr(hf, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "checkpointing", cfg.checkpointing.kind.value, f"{type(hf).__name__} of transformers offers none"
        )
    enable = getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable  # 5.23 renamed it
    every = cfg.checkpointing.every_k if cfg.checkpointing.kind is Checkpointing.EVERY_K else 1
    enable({"use_reentrant": False, "preserve_rng_state": _draws_masks(cfg.model)}, every_n_layers=every)


def _draws_masks(model: ModelConfig) -> bool:
    return bool(model.dropout or model.hf.embedding_dropout or model.hf.residual_dropout)


def _attention_name(backend: AttentionBackend) -> str:
    """attn_implementation: eager, sdpa, or sdpa with one kernel forced, registered under a name of its own."""
    if backend in (AttentionBackend.EAGER, AttentionBackend.AUTO):
        return "eager" if backend is AttentionBackend.EAGER else "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forced(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(_SDPA[backend]):
            return sdpa_attention_forward(*args, **kwargs)

    name = f"lab_sdpa_{list(_SDPA).index(backend)}"  # transformers takes a name with "flash" in it for a hub kernel
    AttentionInterface.register(name, forced)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
