"""A run with Accelerate's FSDP2 on a CPU, where Accelerate itself ignores the plugin: its state is set by hand here.

Started with a run's overrides; everything but that state is the lab's and Accelerate's own code.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from lab.config import EngineConfig, RunConfig, load
from lab.parallel import accelerate_engine
from lab.train import run
from lab.vocab import Precision


def configuration(overrides: list[str]) -> RunConfig:
    """Past the rule that keeps Accelerate's FSDP off CPUs."""
    cfg = load([*overrides, "parallel.fsdp.reduce_dtype=param"])
    return dataclasses.replace(cfg, engine=EngineConfig("accelerate"))


def make_accelerator(cfg: RunConfig, device: torch.device) -> Any:
    """Accelerator(cpu=True), then what AcceleratorState.__init__ does for FSDP on GPUs."""
    from accelerate import Accelerator

    plugin = accelerate_engine.fsdp_plugin(cfg)
    mixed = {Precision.BF16_MIXED: "bf16"}.get(cfg.precision.kind, "no")
    steps = cfg.train.gradient_accumulation_steps
    accelerator = Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=steps)
    if mixed != "no":
        plugin.set_mixed_precision(mixed)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


if __name__ == "__main__":
    accelerate_engine.make_accelerator = make_accelerator
    sys.exit(run(configuration(sys.argv[1:]), sys.argv))
