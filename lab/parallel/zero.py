"""zero1, zero2, zero3: DeepSpeed's ZeRO with a client torch optimizer. The one place that imports deepspeed.

Attribute names in ``live_tensors`` are those of DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py and
runtime/zero/stage3.py. DeepSpeed reads an overflow or gradient-norm flag on the host once per step.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.config import RunConfig
from lab.optim import build_optimizer, learning_rate, set_learning_rate
from lab.parallel.engine import LiveTensor, cached_tensors, optimizer_state_tensors, quantized_tensors
from lab.parallel.materialise import materialise
from lab.transforms.bnb_optimizers import check_sizes
from lab.transforms.precision import deepspeed_section
from lab.vocab import MemoryCategory


def deepspeed_config(cfg: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration: every value of ``parallel.zero`` under its key, timers and prints off."""
    zero = dataclasses.asdict(cfg.parallel.zero)
    if zero["overlap_comm"] is None:
        del zero["overlap_comm"]  # DeepSpeed's default depends on the stage
    return {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
        "gradient_accumulation_steps": cfg.train.gradient_accumulation_steps,
        "gradient_clipping": cfg.train.max_grad_norm or 0.0,
        "zero_optimization": {"stage": cfg.parallel.strategy.zero_stage, **zero},
        "zero_allow_untested_optimizer": True,  # all but Adam: SGD, Adafactor, bitsandbytes
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        **deepspeed_section(cfg),
    }


def import_deepspeed(device: torch.device) -> Any:
    """deepspeed, told its accelerator, quiet, and without the 30 s build of its CPU communication op."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # torch 2.13 renamed two collectives that 0.19.8 calls by their old names in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


class ZeroEngine:
    """Half (or fp32) weights in the module, a flat fp32 partition under the optimizer, states with it."""

    step_was_skipped = False

    def __init__(self, cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.num_parameters = sum(p.numel() for p in model.parameters())
        deepspeed, config = import_deepspeed(device), deepspeed_config(cfg)
        # Stage 3 replaces F.linear for the whole process ("will persist unless manually reset").
        self._linear: Callable[..., Tensor] = F.linear
        materialise_for_zero(cfg, model, device)
        self.base_optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], cfg.optimizer)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=self.base_optimizer, config=config
        )
        check_sizes(self.base_optimizer, cfg.optimizer)
        self._step = 0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.engine(tokens, targets)
        return loss

    def backward(self, loss: Tensor, last_micro_step: bool) -> None:
        self.engine.backward(loss)  # divides by gradient_accumulation_steps itself
        if not last_micro_step:
            self.engine.step()  # advances DeepSpeed's micro-step counter and nothing else

    def optimizer_step(self) -> None:
        set_learning_rate(self.base_optimizer, learning_rate(self.cfg, self._step))
        self._step += 1
        self.step_or_skip()

    def step_or_skip(self) -> None:
        """DeepSpeed's step; its loss scaler leaves the optimizer out after an overflow (engine.py, skipped_steps)."""
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        self.step_was_skipped = self.engine.skipped_steps > skipped_before

    def zero_grad(self) -> None:
        """Nothing: DeepSpeed's step has dropped the gradients."""

    def live_tensors(self) -> Iterator[LiveTensor]:
        yield from deepspeed_tensors(self.engine.module, self.optimizer, self.device)
        yield from cached_tensors(self.engine.module)
        yield from quantized_tensors(self.engine.module)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's whole value; under stage 3 every rank gathers it."""
        if self.cfg.parallel.strategy.zero_stage < 3:
            return parameter.data
        deepspeed = import_deepspeed(self.device)
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()

    def unseen_allocations(self) -> Iterator[tuple[MemoryCategory, int]]:
        return iter(())

    def close(self) -> None:
        # Without this, about one run in ten aborts at interpreter shutdown, after success.
        self.engine.destroy()
        F.linear = self._linear
        self.base_optimizer.state.clear()
        self.engine = self.optimizer = self.base_optimizer = None
        gc.collect()


def materialise_for_zero(cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
    """Whole weights on ``device`` for stages 1 and 2; for stage 3 cut over the ranks as they are made."""
    if cfg.parallel.strategy.zero_stage == 3:
        deepspeed, config = import_deepspeed(device), deepspeed_config(cfg)
        _partition(cfg, model, device, lambda unit: deepspeed.zero.Init(module=unit, config_dict_or_path=config))
    else:
        for _ in materialise(model, cfg.seed, cfg.model.num_layers, device):
            pass


def _partition(cfg: RunConfig, model: nn.Module, device: torch.device, partition: Callable[[nn.Module], Any]) -> None:
    """Materialise and partition block by block, then the rest: at most one whole block exists at a time."""
    for unit in [*model.get_submodule("blocks").children(), model]:
        members = {id(p) for p in unit.parameters()}
        for _ in materialise(model, cfg.seed, cfg.model.num_layers, device, only=members):
            pass
        partition(unit)


def _tensors(*values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts; None is skipped."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(*value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(*value)


def _as(category: MemoryCategory, *values: Any) -> Iterator[LiveTensor]:
    for tensor in _tensors(*values):
        yield category, tensor.detach()


def deepspeed_tensors(model: nn.Module, optimizer: Any, device: torch.device) -> Iterator[LiveTensor]:
    """What DeepSpeed's ``optimizer``, of any stage, holds for the module ``model``; its base optimizer's states too."""
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    yield from (_stage3_tensors if stage3 else _stage12_tensors)(model, optimizer)
    for tensor in optimizer_state_tensors(optimizer.optimizer, device):
        yield MemoryCategory.OPTIMIZER_STATES, tensor
    # Scalars kept from step to step.
    kept = ("_global_grad_norm", "inf_or_nan_tracker")
    yield from _as(MemoryCategory.TEMPORARIES, [getattr(optimizer, name, None) for name in kept])


def _gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Any]:
    for parameter in parameters:
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)


def _stage12_tensors(model: nn.Module, optimizer: Any) -> Iterator[LiveTensor]:
    """Stages 1 and 2: flat whole weights, one flat master partition (a clone in fp32 too), reduce buckets."""
    yield from _as(MemoryCategory.PARAMETERS, optimizer.bit16_groups_flat, [p.data for p in model.parameters()])
    masters = optimizer.single_partition_of_fp32_groups
    yield from _as(MemoryCategory.MASTER_WEIGHTS, masters)
    yield from _as(
        MemoryCategory.COMM_BUFFERS,
        [bucket.buffer for bucket in optimizer.ipg_buckets.values()],  # made for each backward
        optimizer.extra_large_param_to_reduce,
    )
    yield from _as(
        MemoryCategory.GRADIENTS,
        list(_gradients(model.parameters())),
        optimizer.averaged_gradients,  # this rank's partition, from the last backward to the step
        optimizer.all_grad_tensors,  # accumulated over micro-steps
        optimizer.previous_reduced_grads,
        [bucket.grads for bucket in optimizer.ipg_buckets.values()],
        [master.grad for master in masters],
    )


def _stage3_tensors(model: nn.Module, optimizer: Any) -> Iterator[LiveTensor]:
    """Stage 3: flat shards, flat master shards, a persistent gradient shard and reduce bucket."""
    parameters: list[Any] = list(model.parameters())
    yield from _as(MemoryCategory.PARAMETERS, optimizer.lp_param_buffer, [p.ds_tensor for p in parameters])
    masters = optimizer.fp32_partitioned_groups_flat
    yield from _as(MemoryCategory.MASTER_WEIGHTS, masters)
    yield from _as(MemoryCategory.COMM_BUFFERS, [bucket.buffer for bucket in optimizer.ipg_buckets.values()])
    yield from _as(
        MemoryCategory.GRADIENTS,
        optimizer.grad_partitions_flat_buffer,
        optimizer.averaged_gradients,
        list(_gradients(parameters)),
        [master.grad for master in masters],
    )
    # Flat buffers of all-gathers in flight; parameters hold the handle until they are used.
    inflight = getattr(model, "ds_inflight_param_registry", {})
    handles = [part for handle in inflight.values() for part in getattr(handle, "handles", [handle])]
    yield from _as(MemoryCategory.COMM_BUFFERS, [getattr(handle, "partitions", None) for handle in handles])
    # Whole parameters that are gathered now: small ones always (param_persistence_threshold), the others
    # while they are used again within max_reuse_distance.
    yield from _as(MemoryCategory.GATHERED_PARAMETERS, [p.data for p in parameters])
