"""single and ddp: every rank holds the whole model; ddp all-reduces gradients in buckets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lab.config import RunConfig
from lab.parallel.engine import (
    LiveTensor,
    cached_tensors,
    optimizer_state_tensors,
    parameters_and_gradients,
    quantized_tensors,
)
from lab.parallel.materialise import materialise
from lab.parallel.torch_step import TorchStep
from lab.transforms.precision import autocast
from lab.vocab import MemoryCategory, Strategy

WATCHDOG_SECONDS = 0.1  # torch 2.11, ProcessGroupNCCL.hpp, kWatchdogThreadSleepMillis
WATCHDOG_PERIODS = 10  # a busy host delays the watchdog's thread: 3 have been too few there


class ReplicatedEngine(TorchStep):
    """Weights as they are, autocast around forward in mixed precision, torch.optim.

    DDP's reduction buckets live in C++: no Python object refers to them, DDP's log tells their sizes. With
    ``gradient_as_bucket_view`` the gradients are views of them and count as gradients while they exist.
    """

    def __init__(self, cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.num_parameters = sum(p.numel() for p in model.parameters())  # before some are packed
        for _ in materialise(model, cfg.seed, cfg.model.num_layers, device):
            pass
        if cfg.train.compile:  # before DDP, whose hooks stay outside the compiled graph
            model.forward = torch.compile(model.forward)
        self.decoder = model  # without DDP around it
        self.model: nn.Module = _ddp(cfg, model, device) if cfg.parallel.strategy is Strategy.DDP else model
        self.make_optimizer((p for p in model.parameters() if p.requires_grad), device)
        self._micro_step = 0
        self._first_bucket = steps_with_first_bucket(cfg, device)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # DDP decides in forward whether the coming backward reduces: only that of the last micro-step.
        self._micro_step += 1
        last = self._micro_step % self.cfg.train.gradient_accumulation_steps == 0
        keep_local = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if keep_local else nullcontext(), autocast(self.cfg, self.device):
            loss: Tensor = self.model(tokens, targets)
        return loss

    def zero_grad(self) -> None:
        super().zero_grad()
        self.release_first_bucket()

    def release_first_bucket(self) -> None:
        """After each step; once, when it was the last with DDP's first bucket, wait for NCCL's watchdog.

        Until it has seen that the reduction is over, its Work holds the first bucket, all gradients in one
        (ProcessGroupNCCL.cpp, stashed_for_allocator_safety_); if it still does when DDP makes its buckets anew, in the
        next forward, both exist at once and the segments stay for the rest of the run. Which it is would otherwise
        hang on how long the optimizer step takes on the host.
        """
        self._first_bucket -= 1
        if self._first_bucket == 0:
            await_watchdog(self.device)

    def live_tensors(self) -> Iterator[LiveTensor]:
        yield from parameters_and_gradients(self.decoder.parameters())
        yield from quantized_tensors(self.decoder)
        for tensor in optimizer_state_tensors(self.optimizer, self.device):
            yield MemoryCategory.OPTIMIZER_STATES, tensor
        yield from cached_tensors(self.decoder)

    def unseen_allocations(self) -> Iterator[tuple[MemoryCategory, int]]:
        if isinstance(self.model, DistributedDataParallel):
            yield from ddp_allocations(self.model)

    def close(self) -> None:
        self.drop_states()
        self.model = self.decoder = nn.Module()


def steps_with_first_bucket(cfg: RunConfig, device: torch.device) -> int:
    """Steps until DDP makes its buckets anew, if the old one is waited for; a static graph's first step only counts.

    0: nobody waits; only NCCL keeps what it reduces.
    """
    ddp = cfg.parallel.strategy is Strategy.DDP and device.type == "cuda" and cfg.parallel.ddp.release_first_bucket
    return (2 if cfg.parallel.ddp.static_graph else 1) if ddp else 0


def await_watchdog(device: torch.device) -> None:
    """Until NCCL's watchdog has seen that everything sent so far is over."""
    torch.cuda.synchronize(device)
    time.sleep(WATCHDOG_PERIODS * WATCHDOG_SECONDS)


def ddp_allocations(model: DistributedDataParallel) -> Iterator[tuple[MemoryCategory, int]]:
    """Bytes of the buffers that DDP shows nobody, by what its log says of them."""
    log = model._get_ddp_logging_data()
    # Made at construction; made again in the second step, in the order of the first one's gradients.
    for name in ("rebuilt_bucket_sizes", "bucket_sizes"):
        for size in str(log.get(name, "")).split(","):
            if size.strip():
                yield MemoryCategory.COMM_BUFFERS, int(size)
    if model.static_graph:  # which parameters are used, on the host and on the device
        count = sum(p.requires_grad for p in model.parameters())
        yield from [(MemoryCategory.COMM_BUFFERS, 4 * count)] * 2


def _ddp(cfg: RunConfig, model: nn.Module, device: torch.device) -> DistributedDataParallel:
    options = cfg.parallel.ddp
    # True is the default of every version; torch 2.13 warns where it is passed.
    buffers: dict[str, Any] = {} if options.broadcast_buffers else {"broadcast_buffers": False}
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        bucket_cap_mb=options.bucket_cap_mb,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
        static_graph=options.static_graph,
        **buffers,
    )
