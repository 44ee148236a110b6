"""Where the text comes from: a description that is cheap to make (the cache key) and the documents themselves."""

from __future__ import annotations

import glob
import importlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.config import ConfigError, DataConfig

# Test suites are data more than code (and some distributions leave them out); the rest is other people's packages.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """``description``: JSON-able and cheap, it names the content; ``read``: the documents, in a fixed order."""

    description: dict[str, Any]
    read: Callable[[], list[str]]


def open_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that ``cfg`` names. Raises ConfigError where there is no text or a library is missing."""
    return {"python_stdlib": _python_stdlib, "text": _text, "hf": _hf}[cfg.kind](cfg)


def _python_stdlib(cfg: DataConfig) -> Corpus:
    """Every .py file of the running Python's standard library but its tests, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise ConfigError("data", "python_stdlib", f"no .py file in {root}: this Python has no sources; use data=text")
    sizes = [(p.relative_to(root).as_posix(), p.stat().st_size) for p in files]
    return Corpus(
        {"kind": cfg.kind, "python": platform.python_version(), "max_bytes": cfg.max_bytes, "files": sizes},
        lambda: _read_files(files, cfg.max_bytes),
    )


def _text(cfg: DataConfig) -> Corpus:
    """The files that the glob ``data.path`` matches, sorted by path."""
    files = sorted(p for p in map(Path, glob.iglob(cfg.path or "", recursive=True)) if p.is_file())
    if not files:
        raise ConfigError("data.path", cfg.path, "matches no file")
    stats = [(p, p.stat()) for p in files]
    sizes = [(p.as_posix(), s.st_size, s.st_mtime_ns) for p, s in stats]
    return Corpus(
        {"kind": cfg.kind, "max_bytes": cfg.max_bytes, "files": sizes}, lambda: _read_files(files, cfg.max_bytes)
    )


def _hf(cfg: DataConfig) -> Corpus:
    """A dataset of the Hugging Face hub (streamed, so only what is read is fetched) or a local folder.

    A hub dataset's cache key is its id, split and column: what the cache holds is used without a network.
    """
    path = cfg.path or ""
    local = Path(path)
    description: dict[str, Any] = {
        "kind": cfg.kind,
        "path": path,
        "split": cfg.split,
        "column": cfg.column,
        "max_bytes": cfg.max_bytes,
    }
    if local.is_dir():
        files = sorted(p for p in local.rglob("*") if p.is_file())
        description["files"] = [(p.relative_to(local).as_posix(), p.stat().st_size) for p in files]
    return Corpus(description, lambda: _read_hf(cfg))


def _read_hf(cfg: DataConfig) -> list[str]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError("data", "hf", 'needs the datasets library: pip install -e ".[hf]"') from None
    local = Path(cfg.path or "")
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(cfg.path)
            data = data[cfg.split] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(cfg.path, split=cfg.split, streaming=not local.exists())
        return _take(_column(data, cfg), cfg.max_bytes)
    except ConfigError:
        raise
    except Exception as error:  # the library's own zoo of errors: not found, no network, no such split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("data.path", cfg.path, f"cannot be loaded with data.split={cfg.split}: {reason}") from None


def _column(data: Iterable[dict[str, Any]], cfg: DataConfig) -> Iterable[str]:
    for row in data:
        if not isinstance(row.get(cfg.column), str):
            raise ConfigError("data.column", cfg.column, f"must be a column of text, one of {', '.join(row)}")
        yield row[cfg.column]


def _take(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Documents until ``max_bytes`` of UTF-8 are reached; the last one is cut."""
    taken, left = [], max_bytes
    for text in texts:
        size = len(text.encode("utf-8", "replace"))
        taken.append(text if size <= left else text.encode("utf-8", "replace")[:left].decode("utf-8", "ignore"))
        left -= size
        if left <= 0:
            break
    return taken


def _read_files(files: list[Path], max_bytes: int) -> list[str]:
    """Files as UTF-8 (other bytes become U+FFFD) until ``max_bytes`` are read; the last one is cut."""
    taken, left = [], max_bytes
    for path in files:
        try:
            with path.open("rb") as stream:
                raw = stream.read(left)
        except OSError as error:
            raise ConfigError("data.path", path, f"cannot be read: {error.strerror}") from None
        taken.append(raw.decode("utf-8", "replace"))
        left -= len(raw)
        if left <= 0:
            break
    return taken
