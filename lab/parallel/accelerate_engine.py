"""engine=accelerate: DDP, FSDP2 and DeepSpeed through Accelerate's plugins. The one place that imports accelerate.

What Accelerate 1.15 does that the native engines do not (accelerator.py unless another file is named):

- backward: the loss is divided by the micro-steps even when there is one; gradient accumulation runs under
  ``accumulate`` (``no_sync``), so FSDP2 keeps whole gradients until the last micro-step and ZeRO-1 reduces only then.
- prepare_model: autocast around the model's own forward, and ``convert_outputs_to_fp32`` (the lab's models return an
  fp32 loss, transformers' too: lab.model.hf drops their outputs; so nothing is converted).
- DDP: bucket_cap_mb is passed only where it is not 25, so that by default PyTorch's first bucket is 1 MiB.
- FSDP2 (utils/fsdp_utils.py, fsdp2_prepare_model): the final norm is a unit of its own that stays gathered after
  forward, with the head where a model shows it, as transformers' do; their embedding is one more unit. Parameters in
  half precision become fp32 in mixed precision; parameters, gradients' reduction and outputs in the compute dtype
  (utils/dataclasses.py, set_mixed_precision), so that the loss is cast to it.
- DeepSpeed (utils/deepspeed.py, DeepSpeedEngineWrapper): the engine's step runs inside Accelerate's backward. Here it
  is put off to ``optimizer_step``, so that both phases can be told apart; nothing is made or dropped in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lab.config import RunConfig
from lab.model.hf import HFCausalLM
from lab.optim import build_optimizer, learning_rate, set_learning_rate
from lab.parallel.fsdp import FSDPEngine
from lab.parallel.materialise import materialise
from lab.parallel.replicated import ReplicatedEngine, steps_with_first_bucket
from lab.parallel.zero import ZeroEngine, deepspeed_config, import_deepspeed, materialise_for_zero
from lab.transforms.precision import deepspeed_section
from lab.vocab import Precision, Strategy

_MIXED = {Precision.BF16_MIXED: "bf16", Precision.FP16_MIXED: "fp16"}
_FLAGS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")  # set by Accelerator for later ones; undone by ``close``


def make_accelerator(cfg: RunConfig, device: torch.device) -> Any:
    """Accelerator with the plugin of ``cfg.parallel``. Needs the process group for every strategy but ``single``."""
    from accelerate import Accelerator

    strategy, cpu = cfg.parallel.strategy, device.type == "cpu"
    arguments: dict[str, Any] = {"kwargs_handlers": [], "cpu": cpu and not strategy.zero_stage}
    if strategy is Strategy.DDP:
        arguments["kwargs_handlers"].append(_ddp_arguments(cfg))
    if strategy.zero_stage:
        arguments |= _deepspeed_arguments(cfg, device)
    elif strategy.is_fsdp:
        arguments["fsdp_plugin"] = fsdp_plugin(cfg)
    if cpu and strategy.zero_stage:
        from accelerate.utils import InitProcessGroupKwargs

        arguments["kwargs_handlers"].append(InitProcessGroupKwargs(backend="gloo"))
    with _environment(single=strategy is Strategy.SINGLE):
        return Accelerator(
            mixed_precision=_MIXED.get(cfg.precision.kind, "no"),
            gradient_accumulation_steps=cfg.train.gradient_accumulation_steps,
            **arguments,
        )


def _ddp_arguments(cfg: RunConfig) -> Any:
    from accelerate import DistributedDataParallelKwargs

    o = cfg.parallel.ddp
    options = {"gradient_as_bucket_view": o.gradient_as_bucket_view, "static_graph": o.static_graph}
    cap: Any = int(o.bucket_cap_mb) if o.bucket_cap_mb == int(o.bucket_cap_mb) else o.bucket_cap_mb
    return DistributedDataParallelKwargs(bucket_cap_mb=cap, broadcast_buffers=o.broadcast_buffers, **options)


def fsdp_plugin(cfg: RunConfig) -> Any:
    """FSDP2, one unit per block; the lab's own checkpointing. The weights are on every rank's host already."""
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=cfg.parallel.strategy is not Strategy.FSDP_GRAD_OP,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"] if cfg.model.family == "lab" else None,  # None: _no_split_modules
        cpu_ram_efficient_loading=False,
    )


def _deepspeed_arguments(cfg: RunConfig, device: torch.device) -> dict[str, Any]:
    import_deepspeed(device)
    from accelerate import DeepSpeedPlugin

    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=deepspeed_config(cfg))}


@contextmanager
def _environment(single: bool) -> Iterator[None]:
    """``single`` is one process without a group: Accelerate would open one wherever LOCAL_RANK is set."""
    hidden = {name: os.environ.pop(name) for name in ("LOCAL_RANK",) if single and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def check_applied(cfg: RunConfig, accelerator: Any, device: torch.device) -> str:
    """What Accelerate really applied, as one line. Raises RuntimeError where it is not what was asked for."""
    strategy, state = cfg.parallel.strategy, accelerator.state
    stage = state.deepspeed_plugin.zero_stage if str(state.distributed_type).endswith("DEEPSPEED") else 0
    section = deepspeed_section(cfg)
    if stage:
        given = accelerator.deepspeed_config
        mixed: Any = next((name for name in ("bf16", "fp16") if given.get(name, {}).get("enabled")), "no")
        wanted_mixed = next(iter(section), "no")
    else:
        mixed, wanted_mixed = accelerator.mixed_precision, _MIXED.get(cfg.precision.kind, "no")
    distributed = "MULTI_CPU" if device.type == "cpu" else "MULTI_GPU"
    if strategy is Strategy.SINGLE:
        distributed = "NO"
    elif strategy is not Strategy.DDP:
        distributed = "DEEPSPEED" if strategy.zero_stage else "FSDP"
    applied = {
        "distributed_type": state.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "mixed_precision": mixed,
        "fsdp_version": state.fsdp_plugin.fsdp_version if state.distributed_type.value == "FSDP" else 0,
        "zero_stage": stage,
    }
    wanted = {
        "distributed_type": distributed,
        "num_processes": cfg.world_size,
        "mixed_precision": wanted_mixed,
        "fsdp_version": 2 if strategy.is_fsdp else 0,
        "zero_stage": strategy.zero_stage,
    }
    if applied != wanted:
        wrong = ", ".join(f"{k}: {applied[k]} instead of {wanted[k]}" for k in wanted if applied[k] != wanted[k])
        raise RuntimeError(f"Accelerate did not apply what was asked for: {wrong}")
    return "engine=accelerate applied " + ", ".join(f"{k}={v}" for k, v in applied.items() if v)


class _Accelerated:
    """A step through ``accelerator``: accumulate around forward and backward, clipping, the prepared optimizer."""

    cfg: RunConfig
    accelerator: Any
    prepared: tuple[Any, Any]  # model and optimizer, as ``accelerator.prepare`` returned them
    step_was_skipped = False

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.prepared = self.accelerator.prepare(model, optimizer)
        self.notes = [check_applied(self.cfg, self.accelerator, device)]
        self._accumulation = ExitStack()
        self._step = 0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self._accumulation.enter_context(self.accelerator.accumulate(self.prepared[0]))
        loss: Tensor = self.prepared[0](tokens, targets)
        return loss

    def backward(self, loss: Tensor, last_micro_step: bool) -> None:
        assert self.accelerator.sync_gradients is last_micro_step
        self.accelerator.backward(loss)
        self._accumulation.close()

    def set_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        set_learning_rate(optimizer, learning_rate(self.cfg, self._step))
        self._step += 1

    def optimizer_step(self) -> None:
        model, optimizer = self.prepared
        self.set_learning_rate(optimizer.optimizer)
        if self.cfg.train.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(model.parameters(), self.cfg.train.max_grad_norm)
        optimizer.step()
        self.step_was_skipped = bool(optimizer.step_was_skipped)

    def zero_grad(self) -> None:
        self.prepared[1].zero_grad()

    def release(self) -> None:
        """Let the next Accelerator of this process be another one."""
        from accelerate.state import AcceleratorState, GradientState

        del self.prepared, self.accelerator
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for flag in _FLAGS:
            os.environ.pop(flag, None)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class AccelerateReplicated(_Accelerated, ReplicatedEngine):
    """single and ddp."""

    def __init__(self, cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
        self.cfg, self.device, self.accelerator = cfg, device, make_accelerator(cfg, device)
        self.num_parameters = sum(p.numel() for p in model.parameters())  # before some are packed
        for _ in materialise(model, cfg.seed, cfg.model.num_layers, device):
            pass
        self.decoder = model
        self.parameters = _trained(model)
        self.optimizer = build_optimizer(self.parameters, cfg.optimizer)
        self.prepare(model, self.optimizer, device)
        self.model = self.prepared[0]
        self._first_bucket = steps_with_first_bucket(cfg, device)

    def zero_grad(self) -> None:
        _Accelerated.zero_grad(self)
        self.release_first_bucket()

    def close(self) -> None:
        ReplicatedEngine.close(self)
        self.release()


class AccelerateFSDP(_Accelerated, FSDPEngine):
    """fsdp and fsdp_grad_op: whole weights on the host, moved to the device and cut unit by unit."""

    def __init__(self, cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
        self.cfg, self.device, self.accelerator = cfg, device, make_accelerator(cfg, device)
        for _ in materialise(model, cfg.seed, cfg.model.num_layers, torch.device("cpu")):
            pass
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.optimizer = build_optimizer(_trained(model), cfg.optimizer)
        if isinstance(model, HFCausalLM):
            _show_units(model)
        self.prepare(model, self.optimizer, device)
        self.model = self.prepared[0]
        self.shards = [p for p in self.model.parameters() if isinstance(p, DTensor)]
        self.parameters = [p for p in self.shards if p.requires_grad]

    def close(self) -> None:
        FSDPEngine.close(self)
        self.release()


def _show_units(model: HFCausalLM) -> None:
    """What fsdp2_prepare_model asks a transformers model for: its blocks' class, embeddings, and the norm's parent."""
    hf: Any = model.hf
    model.__dict__ |= {  # no submodules: names stay as they are
        "_no_split_modules": [type(block).__name__ for block in model.blocks][:1],
        "get_input_embeddings": hf.get_input_embeddings,
        "get_output_embeddings": hf.get_output_embeddings,
        "base_model_prefix": "base_model",
        "base_model": hf.base_model,
    }


class AccelerateZero(_Accelerated, ZeroEngine):
    """zero1, zero2, zero3: ``base_optimizer`` and ``engine`` as in the native engine, made by Accelerate."""

    def __init__(self, cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
        self.cfg, self.device, self.accelerator = cfg, device, make_accelerator(cfg, device)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._linear = torch.nn.functional.linear
        materialise_for_zero(cfg, model, device)
        self.base_optimizer = build_optimizer(_trained(model), cfg.optimizer)
        self.prepare(model, self.base_optimizer, device)
        self.engine = self.prepared[0]
        self.optimizer = self.engine.optimizer

    def backward(self, loss: Tensor, last_micro_step: bool) -> None:
        self.engine.step = lambda: None  # Accelerate's backward ends with it
        try:
            _Accelerated.backward(self, loss, last_micro_step)
        finally:
            del self.engine.step

    def optimizer_step(self) -> None:
        self.set_learning_rate(self.base_optimizer)
        self.step_or_skip()

    def close(self) -> None:
        ZeroEngine.close(self)
        self.release()


ENGINES: dict[Strategy, Any] = {
    Strategy.SINGLE: AccelerateReplicated,
    Strategy.DDP: AccelerateReplicated,
    Strategy.ZERO1: AccelerateZero,
    Strategy.ZERO2: AccelerateZero,
    Strategy.ZERO3: AccelerateZero,
    Strategy.FSDP: AccelerateFSDP,
    Strategy.FSDP_GRAD_OP: AccelerateFSDP,
}


def import_engine(cfg: RunConfig) -> Any:
    """The engine's class, with its libraries imported: seconds that touch no GPU memory."""
    if cfg.parallel.strategy.zero_stage:
        import_deepspeed(torch.device(cfg.hardware.device_type))
    import accelerate  # noqa: F401

    return ENGINES[cfg.parallel.strategy]


@contextmanager
def watched_backward(before: Callable[[], None], after: Callable[[bool], None]) -> Iterator[None]:
    """``before()`` and ``after(sync_gradients)`` around every ``Accelerator.backward`` of this process.

    A Trainer's callbacks get no Accelerator, so its class is what can be told. ``after`` is not called on an error.
    """
    from accelerate import Accelerator

    original = Accelerator.backward

    def backward(accelerator: Any, loss: Tensor, **kwargs: Any) -> None:
        before()
        original(accelerator, loss, **kwargs)
        after(accelerator.sync_gradients)

    Accelerator.backward = backward
    try:
        yield
    finally:
        Accelerator.backward = original


def applied_state() -> tuple[str, dict[str, Any], int]:
    """(distributed_type, DeepSpeed's configuration, FSDP's version) of this process's Accelerator."""
    from accelerate.state import AcceleratorState

    state = AcceleratorState()
    kind = str(state.distributed_type.value)
    deepspeed = dict(state.deepspeed_plugin.deepspeed_config) if kind == "DEEPSPEED" else {}
    return kind, deepspeed, state.fsdp_plugin.fsdp_version if kind == "FSDP" else 0
