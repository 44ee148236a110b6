"""Every rank's measurement on rank 0."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from lab.record import RankMeasurement

_TIMEOUT = timedelta(seconds=120)


def gather(measurement: RankMeasurement, world_size: int) -> list[RankMeasurement] | None:
    """All ranks' measurements in rank order on rank 0, None elsewhere. Every rank must call it.

    Needs the default process group when ``world_size`` > 1. A group over gloo is made for it where the
    default one is NCCL: pickles then never touch a GPU, whose memory is what was measured. Raises
    RuntimeError when a rank does not come within two minutes.
    """
    if world_size == 1:
        return [measurement]
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=_TIMEOUT)
    received: list[RankMeasurement | None] | None = [None] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(measurement, received, dst=0, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    return None if received is None else [m for m in received if m is not None]
