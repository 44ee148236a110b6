"""A byte-level BPE tokenizer trained once per corpus, and the corpus as one cached stream of token ids.

Cost of the first use at the default settings (12 MB of the standard library, 2048 entries, 2 cores): about
1 s to train and 4 s to encode; afterwards the stream is memory-mapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lab.config import ConfigError, DataConfig
from lab.data.corpus import Corpus, open_corpus

END_OF_TEXT = "<|endoftext|>"  # one token between documents; its id is 0
TRAIN_BYTES = 4_000_000  # about this much of the corpus, evenly spread, trains the tokenizer
_PIECE_CHARS = 65_536  # a longer document is encoded in pieces cut at line ends, so that both cores have work
_CACHE_VERSION = 1  # raise it when the same corpus would give other tokens

TokenIds = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def token_stream(cfg: DataConfig) -> TokenIds:
    """The corpus as token ids [num_tokens], uint16 (uint32 above 65536 entries), memory-mapped read-only.

    Made once per corpus and vocabulary size under ``data.cache_dir``. Processes that start together wait for the
    one that makes it; where files cannot be locked each makes its own and the last rename wins, with equal content.
    Raises ConfigError for an unusable corpus or cache folder.
    """
    corpus = open_corpus(cfg)
    folder = _cache_folder(cfg, corpus)
    path = folder / "tokens.npy"
    if (cached := _read_tokens(path)) is not None:
        return cached
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if (cached := _read_tokens(path)) is None:
                _make(cfg, corpus, folder)
                cached = _read_tokens(path)
    except OSError as error:
        raise ConfigError("data.cache_dir", cfg.cache_dir, f"cannot be written: {error.strerror}") from None
    if cached is None:
        raise ConfigError("data.cache_dir", cfg.cache_dir, f"{path} cannot be read back")
    return cached


def load_tokenizer(cfg: DataConfig) -> Any:
    """The trained ``tokenizers.Tokenizer`` of ``cfg``'s corpus (made first where it is not cached)."""
    from tokenizers import Tokenizer

    token_stream(cfg)
    return Tokenizer.from_file(str(_cache_folder(cfg, open_corpus(cfg)) / "tokenizer.json"))


def _cache_folder(cfg: DataConfig, corpus: Corpus) -> Path:
    key = {**corpus.description, "vocab_size": cfg.tokenizer_vocab_size, "version": _CACHE_VERSION}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()
    return Path(cfg.cache_dir) / f"tokens-{digest[:20]}"


def _read_tokens(path: Path) -> TokenIds | None:
    """The cached stream, or None where there is none (or one that a full disk cut short)."""
    try:
        tokens: TokenIds = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return tokens


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold ``path`` exclusively; the lock goes with the process, also when it is killed."""
    with path.open("a") as stream:
        with contextlib.suppress(OSError):  # a file system without locks: the renames below are safe without
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(cfg: DataConfig, corpus: Corpus, folder: Path) -> None:
    """Train, encode, and put both files in place; the stream last, since its presence says all is there."""
    documents = [_pieces(text) for text in corpus.read() if text]
    if not documents:
        raise ConfigError("data", cfg.kind, "the corpus holds no text")
    tokenizer = _train([piece for document in documents for piece in document], cfg.tokenizer_vocab_size)
    tokens = _encode(tokenizer, documents)
    with _replacing(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    with _replacing(folder / "corpus.json") as temporary:
        temporary.write_text(json.dumps({**corpus.description, "num_tokens": len(tokens)}), encoding="utf-8")
    with _replacing(folder / "tokens.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, tokens)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name at the end: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(text: str) -> list[str]:
    """``text`` cut at line ends into pieces of about ``_PIECE_CHARS``; joined they give ``text`` again."""
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start, start + _PIECE_CHARS) + 1
        if end <= start:  # one very long line
            end = start + _PIECE_CHARS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _train(pieces: list[str], vocab_size: int) -> Any:
    """Byte-level BPE (GPT-2's pre-tokenizer, no added prefix space): 256 bytes, the end-of-text token, merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    every = -(-sum(map(len, pieces)) // TRAIN_BYTES)
    tokenizer.train_from_iterator(pieces[:: max(every, 1)], trainer)
    return tokenizer


def _encode(tokenizer: Any, documents: list[list[str]]) -> TokenIds:
    """Documents (as pieces) -> ids [num_tokens], each document followed by the end-of-text token."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    end = np.zeros(1, dtype=dtype)  # the special token is trained first: id 0
    tokenizer.encode_special_tokens = True  # text that spells the end-of-text token stays text
    chunks: list[Any] = []
    for first in range(0, len(documents), 64):  # in groups: the library's result objects are large
        group = documents[first : first + 64]
        encoded = iter(tokenizer.encode_batch_fast([p for pieces in group for p in pieces], add_special_tokens=False))
        for pieces in group:
            chunks.extend(np.array(next(encoded).ids, dtype=dtype) for _ in pieces)
            chunks.append(end)
    return np.concatenate(chunks)
