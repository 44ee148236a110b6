"""The training loop: phases around what the engine does, and no wait for the device inside a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lab.config import RunConfig
from lab.data import Batches
from lab.measure import Meter
from lab.parallel import Engine, LiveTensor
from lab.vocab import MemoryCategory, StepPhase


class Losses:
    """Loss per step in one fp32 tensor [steps] on the device, read on the host only when asked.

    A step's loss is the mean over its micro-batches, on this rank's share of the batch.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.tensor = torch.zeros(steps, dtype=torch.float32, device=device)
        self.known: list[float] = []  # on the host, as of the last read

    def add(self, step: int, loss: Tensor, micro_steps: int) -> None:
        """Queued on the device; allocates nothing."""
        self.tensor[step].add_(loss.detach(), alpha=1.0 / micro_steps)

    def read(self, finished_steps: int) -> list[float]:
        """Losses of the finished steps; waits for the device."""
        self.known = self.tensor[:finished_steps].tolist()
        return self.known


class Clock:
    """Seconds per step over the steady steps, by the wall: two waits for the device in the whole run."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.first = 2 if steps > 2 else steps - 1  # DDP and DeepSpeed hold old buckets before the third step
        self.steps, self.device = steps, device
        self._begin = 0.0
        self.step_seconds: float | None = None

    def before(self, step: int) -> None:
        if step == self.first:
            self._begin = self._now()

    def stop(self) -> None:
        self.step_seconds = (self._now() - self._begin) / (self.steps - self.first)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def live_tensors(engine: Engine, batches: Batches, losses: Losses) -> Iterator[LiveTensor]:
    """Every tensor that someone owns, for the ledger: the engine's, the batches (kept for backward), the losses."""
    yield from engine.live_tensors()
    for buffer in batches.buffers():
        yield MemoryCategory.ACTIVATIONS, buffer
    yield MemoryCategory.LOGITS_AND_LOSS, losses.tensor


def train(
    cfg: RunConfig,
    engine: Engine,
    batches: Batches,
    meter: Meter,
    losses: Losses,
    on_step: Callable[[int], None] = lambda _: None,
) -> Clock:
    """Run ``cfg.train.steps`` optimizer steps. ``on_step(index)`` comes after each step, outside its measurement."""
    micro_steps = cfg.train.gradient_accumulation_steps
    clock = Clock(cfg.train.steps, engine.device)
    for step in range(cfg.train.steps):
        clock.before(step)
        with meter.step(step):
            for micro_step in range(micro_steps):
                tokens, targets = batches.next()
                with meter.phase(StepPhase.FORWARD):
                    loss = engine.forward(tokens, targets)
                    meter.claim(MemoryCategory.LOGITS_AND_LOSS, loss)
                batches.prefetch()  # the GPU is busy with forward now
                losses.add(step, loss, micro_steps)
                with meter.phase(StepPhase.BACKWARD):
                    engine.backward(loss, last_micro_step=micro_step + 1 == micro_steps)
                del loss
            with meter.phase(StepPhase.OPTIMIZER_STEP):
                engine.optimizer_step()
            with meter.phase(StepPhase.ZERO_GRAD):
                engine.zero_grad()
            if engine.step_was_skipped:
                meter.mark_skipped()
        on_step(step)
    clock.stop()
    return clock
