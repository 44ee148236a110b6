"""The files of a Hugging Face model: where config.json and the weights are, and whether the weights can be read.

Plain file reading, so that a bad checkpoint ends in one line before torch is imported.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from lab.config.errors import ConfigError
from lab.config.known import CONFIG_DIR

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "pytorch_model.bin.index.json")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def local_path(path: str) -> Path | None:
    """``model.path`` as a file or folder on this machine (also relative to the project's folder); None: neither."""
    for base in (Path(), CONFIG_DIR.parent):
        found = base / Path(path).expanduser()
        if found.exists():
            return found
    return None


def config_file(path: str) -> Path:
    """The config.json of ``model.path``: itself, in the folder, or from the hub (its cache first)."""
    found = local_path(path)
    if found is None:
        return _from_hub(path, ["config.json"]) / "config.json"
    if found.is_dir():
        found /= "config.json"
        if not found.is_file():
            raise ConfigError("model.path", path, "the folder has no config.json")
    elif found.suffix != ".json":
        raise ConfigError("model.path", path, "expected a folder, a hub id or a config.json")
    return found


def checkpoint_folder(path: str) -> Path:
    """The folder with the weights of ``model.path``, downloaded where it is a hub id. Raises ConfigError."""
    found = local_path(path)
    if found is None:
        return _from_hub(path, ["config.json", *_WEIGHTS])
    return found if found.is_dir() else found.parent


def _from_hub(path: str, patterns: list[str]) -> Path:
    if not _HUB_ID.fullmatch(path):
        raise ConfigError("model.path", path, "no such file or folder, and not a hub id (ORGANISATION/NAME)")
    try:
        from huggingface_hub import snapshot_download  # type: ignore[import-not-found, unused-ignore]

        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # its own kinds, the network's, the disk's
        reason = " ".join(str(error).split())[:200]
        raise ConfigError("model.path", path, f"no such folder, and not to be had from the hub: {reason}") from None


def check_checkpoint(path: str, allow_pickle: bool) -> None:
    """Raise ConfigError unless the folder holds readable weights (safetensors; pickles only where allowed)."""
    folder = checkpoint_folder(path)
    if weight_files(path, folder):
        tensor_shapes(path)
        return
    pickles = [f.name for pattern in _PICKLES for f in sorted(folder.glob(pattern))]
    if not pickles:
        raise ConfigError(
            "model.path", path, "no *.safetensors there; model.random_weights=true trains from config.json alone"
        )
    if not allow_pickle:
        raise ConfigError(
            "model.path",
            path,
            f"only a pickle ({pickles[0]}), which can run any code when loaded: convert it to safetensors, or set "
            "model.allow_pickle=true",
        )


def pickle_files(folder: Path) -> list[Path]:
    """pytorch_model.bin, or its shards."""
    return sorted(folder.glob("pytorch_model*.bin"))


def weight_files(path: str, folder: Path) -> list[Path]:
    """The safetensors of a checkpoint: one file, or the shards that the index names. Raises ConfigError."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        whole = folder / "model.safetensors"
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError("model.path", path, f"{indices[0].name} is corrupt: {error!r}") from None
    for name in sorted(names):
        if not (folder / name).is_file():
            raise ConfigError("model.path", path, f"{indices[0].name} names {name}, which is missing")
    return [folder / name for name in sorted(names)]


def tensor_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors checkpoint, from the files' headers. Raises ConfigError."""
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path, checkpoint_folder(path)):
        for name, entry in _header(path, file).items():
            if name != "__metadata__":
                found[name] = tuple(entry["shape"])
    return found


def _header(path: str, file: Path) -> dict[str, Any]:
    """A safetensors header: 8 bytes of length, JSON, then as many bytes as its offsets say."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected, there = 8 + length + max(ends, default=0), file.stat().st_size
        if expected != there:
            raise ValueError(f"{there} bytes, not the {expected} that its header names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError("model.path", path, f"{file.name} is corrupt or cut off: {error}") from None
    return header
