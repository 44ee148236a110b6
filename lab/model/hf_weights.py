"""A checkpoint's tensors, read one at a time, after its names and shapes have been compared with the model's."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from lab.config import ConfigError
from lab.config.hf_files import checkpoint_folder, pickle_files, tensor_shapes, weight_files

_MANY = 3  # names shown in an error


class Checkpoint:
    """Strict: a missing, extra or wrongly shaped tensor is a ConfigError when this is made, in one line.

    Names are the model's own, or without the base model's prefix (GPT-2's published files say ``h.0`` for
    ``transformer.h.0``). What transformers itself ignores or ties may be there and is not read.
    """

    def __init__(self, path: str, allow_pickle: bool, model: nn.Module) -> None:
        self.path, self.folder = path, checkpoint_folder(path)
        self._pickled: dict[str, Tensor] = {}
        self._file_of: dict[str, Any] = {}
        files = weight_files(path, self.folder)
        if files or not allow_pickle:
            shapes = tensor_shapes(path)
        else:
            self._pickled = _unpickle(path, self.folder)
            shapes = {name: tuple(t.shape) for name, t in self._pickled.items()}
        self._files = files
        self._key_of = _match(path, model, shapes)

    def has(self, name: str) -> bool:
        """Whether ``name`` is a parameter of the model that the checkpoint is for."""
        return name in self._key_of

    def read(self, name: str) -> Tensor:
        """The tensor of the model's parameter ``name`` on the host, in the file's type."""
        key = self._key_of[name]
        if self._pickled:
            return self._pickled[key]
        if not self._file_of:
            from safetensors import safe_open

            for file in self._files:
                opened: Any = safe_open(file, framework="pt")  # mapped, read when a tensor is asked for
                self._file_of |= dict.fromkeys(opened.keys(), opened)
        tensor: Tensor = self._file_of[key].get_tensor(key)
        return tensor


def _unpickle(path: str, folder: Any) -> dict[str, Tensor]:
    """All tensors of pytorch_model*.bin, by torch's restricted unpickler (``weights_only``)."""
    import torch

    found: dict[str, Tensor] = {}
    for file in pickle_files(folder):
        try:
            found |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError("model.path", path, f"{file.name} cannot be read: {reason}") from None
    if not found:
        raise ConfigError("model.path", path, "no pytorch_model*.bin there")
    return found


def _match(path: str, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Name of every parameter -> its key in the checkpoint. Raises ConfigError."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head once, as the embedding
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {name: name for name in wanted}
    if not any(name.startswith(prefix) for name in shapes):
        known = {name: name.removeprefix(prefix) for name in wanted}
    missing = [name for name, key in known.items() if key not in shapes]
    if missing:
        raise ConfigError("model.path", path, f"the checkpoint lacks {_some(missing)}")
    for name, key in known.items():
        if shapes[key] != wanted[name]:
            raise ConfigError(
                "model.path",
                path,
                f"{key} is {list(shapes[key])} in the checkpoint, {list(wanted[name])} in config.json",
            )
    ties = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(wanted)
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    read = set(known.values())
    extra = [
        key
        for key in shapes
        if key not in read
        and key not in ties
        and not key.endswith("inv_freq")
        and not any(p.search(key) for p in ignored)
    ]
    if extra:
        raise ConfigError(
            "model.path", path, f"the checkpoint has {_some(extra)}, which {type(model).__name__} has not"
        )
    return known


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more
