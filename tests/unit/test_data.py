"""Corpus, tokenizer cache and batches, on the CPU."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.config import ConfigError, DataConfig, RunConfig, load
from lab.data import END_OF_TEXT, Batches, SequenceOrder, load_tokenizer, make_batches, open_corpus, token_stream

CPU = torch.device("cpu")


@pytest.fixture
def text_data(tmp_path: Path) -> DataConfig:
    """A small corpus of three files, one of which spells the end-of-text token."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(3):
        lines = [f"line {n} of file {index}: naïve café {n * n} {END_OF_TEXT}\n" for n in range(400)]
        (corpus / f"{index}.txt").write_text("".join(lines), encoding="utf-8")
    return DataConfig(
        kind="text", path=str(corpus / "*.txt"), tokenizer_vocab_size=400, cache_dir=str(tmp_path / "cache")
    )


def run_config(data: DataConfig, world_size: int = 1, accumulation: int = 1, micro_batch_size: int = 1) -> RunConfig:
    cfg = load(["hardware=cpu", "train.seq_len=16"])
    train = dataclasses.replace(cfg.train, micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation)
    return dataclasses.replace(cfg, data=data, train=train, world_size=world_size)


def test_stream_decodes_to_the_corpus(text_data: DataConfig) -> None:
    tokens = token_stream(text_data)
    tokenizer = load_tokenizer(text_data)
    assert tokens.dtype == np.uint16
    assert tokens.max() < text_data.tokenizer_vocab_size
    ends = np.flatnonzero(tokens == tokenizer.token_to_id(END_OF_TEXT))
    assert len(ends) == 3, "one end-of-text token per document, none from text that spells it"
    assert ends[-1] == len(tokens) - 1
    texts = [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends[:-1] + 1)]
    assert texts == open_corpus(text_data).read()


def test_long_documents_are_cut_and_joined_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.data.tokens._PIECE_CHARS", 1000)
    text = "".join(f"{n} words and more words\n" for n in range(300)) + "x" * 5000
    (tmp_path / "long.txt").write_text(text)
    data = DataConfig(kind="text", path=str(tmp_path / "long.txt"), tokenizer_vocab_size=300, cache_dir=str(tmp_path))
    tokens = token_stream(data)
    assert load_tokenizer(data).decode(tokens[:-1].tolist()) == text


def test_max_bytes_limits_what_is_read(text_data: DataConfig) -> None:
    limited = dataclasses.replace(text_data, max_bytes=1000)
    assert sum(len(t.encode()) for t in open_corpus(limited).read()) in range(990, 1001 + 2)
    assert len(token_stream(limited)) < len(token_stream(text_data)) // 10


def test_standard_library_is_real_text_without_its_tests() -> None:
    corpus = open_corpus(DataConfig())
    files = [name for name, _ in corpus.description["files"]]
    assert "dataclasses.py" in files
    assert "asyncio/tasks.py" in files
    assert files == sorted(files, key=lambda name: name.split("/"))
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(f.split("/"))]
    assert sum(size for _, size in corpus.description["files"]) > 8_000_000


def test_cache_is_used_and_follows_content_and_vocabulary(
    text_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = np.array(token_stream(text_data))
    with monkeypatch.context() as patch:
        patch.setattr("lab.data.tokens._make", lambda *_: pytest.fail("the cache was not used"))
        assert np.array_equal(token_stream(text_data), first)
    larger = token_stream(dataclasses.replace(text_data, tokenizer_vocab_size=500))
    assert len(larger) < len(first), "more merges, fewer tokens"
    with (Path(text_data.path or "").parent / "0.txt").open("a") as stream:
        stream.write("one more line\n")
    assert len(token_stream(text_data)) > len(first)


def test_a_damaged_cache_is_made_again(text_data: DataConfig) -> None:
    first = np.array(token_stream(text_data))
    (cached,) = Path(text_data.cache_dir).glob("*/tokens.npy")
    cached.write_bytes(cached.read_bytes()[:200])
    assert np.array_equal(token_stream(text_data), first)


def _length_and_sum(data: DataConfig) -> tuple[int, int]:
    tokens = token_stream(data)
    return len(tokens), int(tokens.astype(np.int64).sum())


def test_processes_that_start_together_get_one_equal_stream(text_data: DataConfig) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=context) as pool:
        results = list(pool.map(_length_and_sum, [text_data] * 3))
    assert len(set(results)) == 1
    names = {p.name for p in Path(text_data.cache_dir).glob("*/*")}
    assert names == {"tokens.npy", "tokenizer.json", "corpus.json", "lock"}, "nothing temporary is left"


def global_batch(cfg: RunConfig, tokens: np.ndarray, step: int) -> tuple[list[int], set[tuple[int, ...]]]:
    """Sequence indices (sorted) and rows of one optimizer step over all ranks and micro-steps."""
    indices: list[int] = []
    rows: set[tuple[int, ...]] = set()
    accumulation = cfg.train.gradient_accumulation_steps
    for rank in range(cfg.world_size):
        batches = Batches(cfg, tokens, CPU, rank)
        for micro_batch in range((step + 1) * accumulation):
            inputs, _ = batches.next()
            batches.prefetch()
            if micro_batch >= step * accumulation:
                indices += batches.sequences(micro_batch)
                rows |= {tuple(row.tolist()) for row in inputs}
    return sorted(indices), rows


@pytest.mark.parametrize("step", [0, 3])
def test_global_batch_does_not_depend_on_the_split(text_data: DataConfig, step: int) -> None:
    tokens = token_stream(text_data)
    splits = [(1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)]
    seen = [
        global_batch(run_config(text_data, world, accumulation, size), tokens, step)
        for world, accumulation, size in splits
    ]
    assert all(batch == seen[0] for batch in seen)
    assert len(seen[0][1]) == 4
    assert seen[0] != global_batch(run_config(text_data, 1, 1, 4), tokens, step + 1)


def test_targets_are_the_inputs_shifted_by_one(text_data: DataConfig) -> None:
    cfg = run_config(text_data, micro_batch_size=3)
    tokens = token_stream(text_data)
    batches = make_batches(cfg, CPU, 0)
    inputs, targets = batches.next()
    assert inputs.shape == targets.shape == (3, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, sequence in enumerate(batches.sequences(0)):
        window = torch.from_numpy(tokens[sequence * 16 : sequence * 16 + 17].astype(np.int64))
        assert torch.equal(inputs[row], window[:-1])
        assert torch.equal(targets[row], window[1:])
    assert 0 <= int(inputs.min()) <= int(torch.maximum(inputs, targets).max()) < cfg.model.vocab_size


def test_prefetching_changes_nothing_and_never_allocates(text_data: DataConfig) -> None:
    cfg = run_config(text_data, micro_batch_size=2)
    plain, ahead = make_batches(cfg, CPU, 0), make_batches(cfg, CPU, 0)
    buffers = {t.data_ptr() for t in ahead.buffers()}
    assert len(buffers) == 4
    for step in range(6):
        expected = [t.clone() for t in plain.next()]
        given = ahead.next()
        if step % 3:  # with and without, and twice
            ahead.prefetch()
            ahead.prefetch()
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        assert {t.data_ptr() for t in given} < buffers


def test_the_current_pair_survives_the_prefetch(text_data: DataConfig) -> None:
    batches = make_batches(run_config(text_data), CPU, 0)
    inputs, targets = batches.next()
    copies = inputs.clone(), targets.clone()
    batches.prefetch()
    assert torch.equal(inputs, copies[0])
    assert torch.equal(targets, copies[1])


def test_every_epoch_sees_every_sequence_once_in_a_new_order() -> None:
    order = SequenceOrder(50, seed=7)
    epochs = [[order.sequence_at(e * 50 + i) for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = SequenceOrder(50, seed=7)
    assert [again.sequence_at(i) for i in range(100, 150)] == epochs[2], "any position without those before it"
    assert [SequenceOrder(50, seed=8).sequence_at(i) for i in range(50)] != epochs[0]


def test_a_corpus_below_one_global_batch_is_an_error(text_data: DataConfig) -> None:
    small = dataclasses.replace(text_data, max_bytes=2000)
    with pytest.raises(ConfigError, match=r"^data=text: the corpus makes \d+ sequences of train.seq_len=16") as error:
        make_batches(run_config(small, world_size=8, accumulation=8, micro_batch_size=8), CPU, 0)
    assert "needs 512" in str(error.value)


def test_unusable_corpora_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    empty = DataConfig(kind="text", path=str(tmp_path / "*.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="no text"):
        token_stream(empty)
    with pytest.raises(ConfigError, match="matches no file"):
        token_stream(dataclasses.replace(empty, path=str(tmp_path / "*.nothing")))
    (tmp_path / "a file").write_text("text")
    blocked = dataclasses.replace(empty, path=str(tmp_path / "a file"), cache_dir=str(tmp_path / "a file" / "cache"))
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be written"):
        token_stream(blocked)


class _Rows:
    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_hf_reads_the_column_until_max_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **options: object) -> _Rows:
        asked.append((path, options))
        return _Rows([{"body": f"document {n}\n" * 50, "id": n} for n in range(100)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = DataConfig(
        kind="hf", path="some/corpus", split="validation", column="body", tokenizer_vocab_size=300,
        cache_dir=str(tmp_path), max_bytes=3000,
    )  # fmt: skip
    tokens = token_stream(data)
    assert asked == [("some/corpus", {"split": "validation", "streaming": True})]
    assert len(load_tokenizer(data).decode(tokens.tolist(), skip_special_tokens=True)) == 3000
    with pytest.raises(ConfigError, match=r"data\.column=text: .*body, id"):
        token_stream(dataclasses.replace(data, column="text"))


def test_hf_without_the_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[hf\]"'):
        token_stream(DataConfig(kind="hf", path="some/corpus", cache_dir=str(tmp_path)))


def test_hf_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: object) -> None:
        raise FileNotFoundError(f"no dataset {path}\nand a long explanation")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError, match="no dataset some/corpus") as error:
        token_stream(DataConfig(kind="hf", path="some/corpus", cache_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_batches_equal_cpu_batches_and_stay_in_four_tensors(text_data: DataConfig) -> None:
    cfg = run_config(text_data, micro_batch_size=2)
    device = torch.device("cuda", 0)
    reference, batches = make_batches(cfg, CPU, 0), make_batches(cfg, device, 0)
    allocated = torch.cuda.memory_allocated(device)
    kept: list[torch.Tensor] = []
    for step in range(12):
        expected = reference.next()[0].clone()
        inputs, targets = batches.next()
        assert inputs.device.type == targets.device.type == "cuda"
        assert torch.cuda.memory_allocated(device) == allocated
        if step % 4:
            batches.prefetch()
        kept.append((inputs.cpu() == expected).all())
    assert all(kept)
