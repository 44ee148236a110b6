"""What every strategy offers to the loop and to the measuring side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from lab.transforms.quantization import kept_inputs, quantization_state
from lab.vocab import MemoryCategory

LiveTensor = tuple[MemoryCategory, Tensor]


class Engine(Protocol):
    """A model made ready to train under one strategy. One implementation per file in ``lab/parallel``."""

    device: torch.device
    num_parameters: int  # elements of the whole model, a tied weight counted once
    step_was_skipped: bool  # the newest ``optimizer_step`` left the optimizer out, for an overflow; known on the host

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """int64 [micro_batch_size, seq_len] twice -> mean loss of the micro-batch, fp32 scalar."""

    def backward(self, loss: Tensor, last_micro_step: bool) -> None:
        """Backward of loss / gradient_accumulation_steps; gradients are reduced when the strategy reduces."""

    def optimizer_step(self) -> None:
        """Learning rate, loss scale, clipping and the optimizer's step: once per optimizer step."""

    def zero_grad(self) -> None:
        """Drop the gradients (``set_to_none``); DeepSpeed has done it inside its step."""

    def live_tensors(self) -> Iterator[LiveTensor]:
        """Tensors that live between kernels, by category; storages may repeat, the first category counts."""

    def unseen_allocations(self) -> Iterator[tuple[MemoryCategory, int]]:
        """Exact bytes of allocations that no Python tensor refers to: DDP's buckets."""

    def close(self) -> None:
        """Drop every tensor, hook and patch, so that the process group can be destroyed."""


def optimizer_state_tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[Tensor]:
    """Every state tensor on ``device``, step counters included (fused keeps them there, foreach on the host).

    bitsandbytes' two code tables belong to the optimizer, not to a parameter. Its paged states are CPU tensors over
    managed memory, and so not on a GPU's list.
    """
    tables = getattr(optimizer, "name2qmap", {})
    for state in (tables, *optimizer.state.values()):
        for value in state.values():
            if isinstance(value, Tensor) and value.device.type == device.type:
                yield value


def cached_tensors(model: nn.Module) -> Iterator[LiveTensor]:
    """Tables that the model keeps from the first forward on; backward reads them, so they are activations."""
    for tensor in getattr(model, "cached_tensors", list)():
        yield MemoryCategory.ACTIVATIONS, tensor


def parameters_and_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[LiveTensor]:
    """Plain parameters and their ``.grad``."""
    for parameter in parameters:
        yield MemoryCategory.PARAMETERS, parameter.data
        if parameter.grad is not None:
            yield MemoryCategory.GRADIENTS, parameter.grad


def quantized_tensors(model: nn.Module) -> Iterator[LiveTensor]:
    """What quantized Linears hold beside their weights, and the inputs that int8 layers keep for backward."""
    for tensor in quantization_state(model):
        yield MemoryCategory.QUANTIZATION_STATE, tensor
    for tensor in kept_inputs(model):
        yield MemoryCategory.ACTIVATIONS, tensor
