"""Fixed-length training batches in two fixed pairs of device buffers, the next one copied while the GPU works."""

from __future__ import annotations

import numpy as np
import torch

from lab.config import ConfigError, RunConfig
from lab.data.order import SequenceOrder
from lab.data.tokens import TokenIds, token_stream

Pair = tuple[torch.Tensor, torch.Tensor]  # tokens, targets: int64 [micro_batch_size, seq_len]

# Pinned host pairs in turn. A pair is filled again only after its copy is done; four of them let the host run
# well ahead of the GPU before that wait is a real one.
_STAGING_PAIRS = 4


def make_batches(cfg: RunConfig, device: torch.device, rank: int) -> Batches:
    """The batches of ``rank``. Needs no process group: every rank finds the corpus and its own share by itself.

    Raises ConfigError for a corpus that cannot be had or holds less than one global batch.
    """
    return Batches(cfg, token_stream(cfg.data), device, rank)


class Batches:
    """Micro-batches of one rank, endless.

    ``tokens`` [num_tokens] is cut into sequences that overlap by one token: sequence i is
    tokens[i*seq_len : (i+1)*seq_len + 1]; its first seq_len ids are the input, its last seq_len the targets.
    """

    def __init__(self, cfg: RunConfig, tokens: TokenIds, device: torch.device, rank: int) -> None:
        train = cfg.train
        self._tokens = tokens
        self._seq_len = train.seq_len
        self._micro_batch_size = train.micro_batch_size
        self._first = rank * train.micro_batch_size  # this rank's share of a micro-batch of all ranks
        self._stride = cfg.world_size * train.micro_batch_size
        num_sequences = (len(tokens) - 1) // train.seq_len
        needed = self._stride * train.gradient_accumulation_steps
        if num_sequences < needed:
            raise ConfigError(
                "data",
                cfg.data.kind,
                f"the corpus makes {num_sequences} sequences of train.seq_len={train.seq_len} tokens and one step "
                f"needs {needed}: use more text, shorter sequences or a smaller batch",
            )
        self.order = SequenceOrder(num_sequences, cfg.seed)
        shape = (train.micro_batch_size, train.seq_len)
        self._pairs: list[Pair] = [self._empty_pair(shape, device) for _ in range(2)]
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._host = self._pairs  # on a CPU the buffers are filled in place; a GPU's are copied from pinned memory
        if self._on_gpu:
            with torch.cuda.device(device):  # pinning makes a CUDA context: on this rank's GPU, not on the first
                self._host = [self._empty_pair(shape, None) for _ in range(_STAGING_PAIRS)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._host)
        self._taken = 0  # micro-batches handed out
        self._filled = 0  # micro-batches copied, or being copied, to the device

    @staticmethod
    def _empty_pair(shape: tuple[int, int], device: torch.device | None) -> Pair:
        """Two int64 tensors; ``device`` None: pinned host memory."""

        def one() -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int64, device=device, pin_memory=device is None)

        return one(), one()

    def next(self) -> Pair:
        """Tokens and targets of the next micro-batch, both int64 [micro_batch_size, seq_len] on the device.

        Two pairs take turns: this one is overwritten by the first prefetch() or next() after the following next().
        """
        if self._filled == self._taken:
            self.prefetch()
        pair = self._pairs[self._taken % 2]
        self._taken += 1
        return pair

    def prefetch(self) -> None:
        """Fill the other pair with the following micro-batch; a second call before next() does nothing.

        Call it once the forward pass that reads the current pair is launched. On a GPU the copy is queued on the
        current stream without blocking, behind everything that read that pair before.
        """
        if self._filled > self._taken:
            return
        slot = self._filled % len(self._host)
        if (copied := self._copied[slot]) is not None:
            copied.synchronize()  # the host pair's last copy, several micro-batches ago
        host = self._host[slot]
        self._fill(host, self._filled)
        if self._on_gpu:
            for target, source in zip(self._pairs[self._filled % 2], host, strict=True):
                target.copy_(source, non_blocking=True)
            self._copied[slot] = event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._filled += 1

    def buffers(self) -> list[torch.Tensor]:
        """The four device tensors that live for the whole run."""
        return [tensor for pair in self._pairs for tensor in pair]

    def sequences(self, micro_batch: int) -> list[int]:
        """Indices of this rank's sequences in micro-batch ``micro_batch`` (0, 1, ...) of the run."""
        first = micro_batch * self._stride + self._first
        return [self.order.sequence_at(first + row) for row in range(self._micro_batch_size)]

    def _fill(self, host: Pair, micro_batch: int) -> None:
        tokens, targets = host[0].numpy(), host[1].numpy()
        for row, sequence in enumerate(self.sequences(micro_batch)):
            start = sequence * self._seq_len
            window = self._tokens[start : start + self._seq_len + 1]
            np.copyto(tokens[row], window[:-1])
            np.copyto(targets[row], window[1:])
