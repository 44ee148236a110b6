"""What ``deepspeed.zero.Init`` does to a model's parameters.

Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.architecture import ParameterSpec
from lab.analytic.sharding.base import PARAMETERS
from lab.analytic.tape import FP32, Event, Trace


def cut(specs: Sequence[ParameterSpec], world: int, itemsize: int, trace: Trace) -> list[Event]:
    """materialise draws each in fp32 and casts it; then zero.Init. Returns the shards that go later.

    ``itemsize``: bytes per element of the parameters, in each of ``world`` shards.
    """
    whole: list[Event] = []
    for spec in specs:
        drawn = trace.allocate(spec.numel * FP32, PARAMETERS, spec.name)
        if itemsize != FP32:
            cast = trace.allocate(spec.numel * itemsize, PARAMETERS, spec.name)
            trace.free(drawn)
            drawn = cast
        whole.append(drawn)
    shards: list[Event] = []
    for spec, drawn in zip(specs, whole, strict=True):
        shard_numel = -(-spec.numel // world)
        shard = trace.allocate(shard_numel * itemsize, PARAMETERS, f"shard of {spec.name}")
        if spec.trainable:  # else no optimizer knows it, and it stays for good
            shards.append(shard)
        trace.free(drawn)
    return shards
