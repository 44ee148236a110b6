"""The part of a step that is the same with and without sharding: loss scale, backward, clipping, torch.optim."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lab.config import RunConfig
from lab.optim import build_optimizer, learning_rate, scaled_step, set_learning_rate
from lab.transforms.precision import grad_scaler


class TorchStep:
    """Base of engines that train plain parameters or DTensors with an optimizer of their own."""

    cfg: RunConfig
    parameters: list[Any]  # what the optimizer updates: whole parameters, or FSDP2's shards (DTensor)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    step_was_skipped = False

    def make_optimizer(self, parameters: Iterable[Any], device: torch.device) -> None:
        """Once the parameters are where they stay."""
        self.parameters = list(parameters)
        self.optimizer = build_optimizer(self.parameters, self.cfg.optimizer)
        self.scaler = grad_scaler(self.cfg, device)
        self._step = 0

    def backward(self, loss: Tensor, last_micro_step: bool) -> None:
        if (steps := self.cfg.train.gradient_accumulation_steps) > 1:
            loss = loss / steps
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def optimizer_step(self) -> None:
        set_learning_rate(self.optimizer, learning_rate(self.cfg, self._step))
        self._step += 1
        self.step_was_skipped = not scaled_step(self.cfg, self.optimizer, self.scaler, self.parameters)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def drop_states(self) -> None:
        """Gradients and optimizer states; the model is the engine's own to drop."""
        self.zero_grad()
        self.optimizer.state.clear()
        self.parameters = []
