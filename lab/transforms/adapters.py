"""Adapters with peft: LoRA and DoRA layers around frozen Linears; saved and read with safetensors.

The one place that imports peft. Our checkpointing is non-reentrant, which needs no input that requires a gradient,
so ``enable_input_require_grads`` has no place here. peft keeps the adapters in fp32 (``autocast_adapter_dtype``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.config import AdapterConfig, ConfigError
from lab.config.finetuning import ADAPTER_PICKLE, ADAPTER_WEIGHTS
from lab.transforms.quantization import is_quantized

ALL_LINEAR = "all-linear"
NAME = "default"  # peft's name of an only adapter
EMBEDDING = "embedding.safetensors"


def import_peft() -> Any:
    """The library: some seconds, so only where an adapter is made, read or written."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():  # tables that it makes as it loads are not the run's, for the CPU's memory tracker
        import peft
        import peft.tuners.lora.dora

    return peft


def apply_adapter(model: nn.Module, cfg: AdapterConfig, embedding: str = "embedding") -> nn.Module:
    """A meta model -> the same model, frozen, its targets wrapped by peft's layers (on the meta device too).

    ``embedding`` names the token embedding, trained with ``train_embeddings``. Raises ConfigError where peft refuses.
    """
    if cfg.kind == "none":
        return model
    if cfg.prepare_kbit and any(is_quantized(p) for p in model.parameters()):
        _upcast(model)
    peft = import_peft()
    settings = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=_target_names(model, cfg),
        use_dora=cfg.kind == "dora",
        bias="none",
    )
    try:
        with torch.device("meta"), _dora_without_values(peft):
            wrapper = peft.get_peft_model(model, settings, adapter_name=NAME)
    except ValueError as error:
        raise ConfigError("adapter.target_modules", list(cfg.target_modules), str(error).splitlines()[0]) from None
    model.__dict__["peft_wrapper"] = wrapper  # not a submodule: names stay as they are
    if cfg.train_embeddings:
        model.get_submodule(embedding).requires_grad_(True)
    if cfg.load is not None:
        use_saved_adapter(model, cfg, embedding)
    return model


def _upcast(model: nn.Module) -> None:
    """prepare_model_for_kbit_training (peft/utils/other.py): what is in half precision and not quantized to fp32."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not is_quantized(parameter):
            parameter.data = parameter.data.float()


def _target_names(model: nn.Module, cfg: AdapterConfig) -> list[str]:
    """Names for peft. ``all-linear``: every Linear inside a block, so not the head."""
    names = [t for t in cfg.target_modules if t != ALL_LINEAR]
    if ALL_LINEAR in cfg.target_modules:
        kinds = ("Linear", "Linear4bit", "Linear8bitLt", "Conv1D")
        inside = (n for n, m in model.named_modules() if type(m).__name__ in kinds and "." in n)
        names += sorted({n.rpartition(".")[2] for n in inside if any(part.isdigit() for part in n.split("."))})
    return names


@contextmanager
def _dora_without_values(peft: Any) -> Iterator[None]:
    """DoRA starts from the norms of the base's rows; on the meta device there are none to dequantize."""
    dora = peft.tuners.lora.dora
    original = dora.dequantize_module_weight

    def shaped(module: Any) -> Tensor:
        return torch.empty(module.weight.shape, dtype=torch.float32, device="meta")

    dora.dequantize_module_weight = shaped
    try:
        yield
    finally:
        dora.dequantize_module_weight = original


def merge_adapter(model: nn.Module) -> nn.Module:
    """Add every adapter to its weight and take peft's layers out: the model has its own names again.

    One Linear after the other; ``lab.analytic.adapters.merge_bytes`` says what that takes for a moment. The base must
    not be quantized: merged 4-bit weights would be rounded a second time.
    """
    merged: nn.Module = model.__dict__.pop("peft_wrapper").merge_and_unload()
    return merged


def adapter_state(model: nn.Module, whole: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors on the host, named as in peft's state dict; ``whole`` gathers one (every rank calls it)."""
    return {
        f"base_model.model.{name}": whole(parameter).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if f".{NAME}." in name
    }


def save_adapter(model: nn.Module, folder: Path, state: dict[str, Tensor], embedding: Tensor | None = None) -> None:
    """peft's save_pretrained of the given tensors: adapter_model.safetensors and adapter_config.json.

    A trained token embedding goes beside them, to embedding.safetensors.
    """
    from safetensors.torch import save_file

    model.__dict__["peft_wrapper"].save_pretrained(
        str(folder), safe_serialization=True, state_dict=state, save_embedding_layers=False
    )
    if embedding is not None:
        save_file({"weight": embedding.detach().cpu().contiguous()}, folder / EMBEDDING)


def use_saved_adapter(model: nn.Module, cfg: AdapterConfig, embedding: str) -> None:
    """Let a meta model's adapter start from ``adapter.load``: materialising takes its values from ``saved_adapter``.

    ConfigError where its tensors are not those of this adapter.
    """
    assert cfg.load is not None
    wanted = {n: p for n, p in model.named_parameters() if f".{NAME}." in n}
    found = read_adapter(cfg.load)
    saved: dict[str, Tensor] = {}
    for name, parameter in wanted.items():
        tensor = next((found[key] for key in _saved_names(name) if key in found), None)
        if tensor is None or tensor.shape != parameter.shape:
            what = "has no" if tensor is None else f"has {list(tensor.shape)}, not {list(parameter.shape)}, for"
            raise ConfigError("adapter.load", cfg.load, f"{what} {name}: adapter.rank and target_modules must match it")
        saved[name] = tensor
    if len(found) != len(wanted):
        raise ConfigError("adapter.load", cfg.load, f"has {len(found)} tensors, this adapter {len(wanted)}")
    trained = Path(cfg.load) / EMBEDDING
    if cfg.train_embeddings and trained.is_file():
        saved[f"{embedding}.weight"] = _load_safetensors(cfg.load, trained)["weight"]
    model.__dict__["saved_adapter"] = saved


def _saved_names(name: str) -> tuple[str, str]:
    """peft leaves its adapter's name out, and ``.weight`` of DoRA's magnitudes."""
    plain = "base_model.model." + name.replace(f".{NAME}.", ".")
    return plain, plain.removesuffix(".weight")


def read_adapter(load: str) -> dict[str, Tensor]:
    """Tensors of a saved adapter under peft's names. What may be read was checked with the configuration."""
    safe = Path(load) / ADAPTER_WEIGHTS
    if safe.is_file():
        return _load_safetensors(load, safe)
    try:
        return dict(torch.load(Path(load) / ADAPTER_PICKLE, map_location="cpu", weights_only=True))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError("adapter.load", load, f"{ADAPTER_PICKLE} is corrupt ({first})") from None


def _load_safetensors(load: str, path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError("adapter.load", load, f"{path.name} is corrupt ({first})") from None
