"""What recorded runs say of a GPU's memory outside PyTorch's allocator, and a row of configs/hardware as YAML."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.analytic.hardware import asks_cudnn, communicators
from lab.config import RunConfig, load, run_config_from_json
from lab.record import RunRecord
from lab.vocab import RunStatus


@dataclass(frozen=True)
class Probe:
    """What ``python -m lab.measure.gpu_probe`` prints."""

    gpu_name: str
    capacity_bytes: int
    idle_bytes: int
    num_streaming_multiprocessors: int
    allocation_alignment_bytes: int
    cublas_workspace_bytes: int
    cublaslt_workspace_bytes: int


def hardware_row(records: Iterable[RunRecord], idle_bytes: int | None = None) -> dict[str, int]:
    """The row's fields that these runs determine, in bytes; empty without a single-process run on a GPU.

    ``idle_bytes``: None takes the one of the runs' own hardware row. Medians over ranks and phases of the steady steps.
    """
    outside: dict[str, list[int]] = {}
    for record in records:
        if record.status is not RunStatus.OK or record.steady_step is None:
            continue
        cfg = run_config_from_json(record.config)
        if cfg.hardware.device_type != "cuda" or any(rank.managed_bytes for rank in record.ranks):
            continue
        if idle_bytes is None:
            idle_bytes = load([f"hardware={cfg.hardware.name}"]).hardware.idle_bytes
        for rank in record.ranks:
            for phase in rank.steps[record.steady_step].phases.values():
                if phase.device_used_bytes:
                    used = phase.device_used_bytes - phase.end_reserved_bytes
                    outside.setdefault(_kind(cfg), []).append(used)
    medians = {kind: int(statistics.median_low(values)) for kind, values in outside.items()}
    if "single" not in medians and "single, cuDNN" not in medians:
        return {}
    row: dict[str, int] = {}
    bare = medians.get("single", medians.get("single, cuDNN", 0))
    row["cuda_context_bytes"] = bare - (idle_bytes or 0)
    if (int8 := medians.get("single, cuDNN, int8")) is not None and "single, cuDNN" in medians:
        row["bitsandbytes_int8_bytes"] = int8 - medians["single, cuDNN"]
    if "single" in medians and "single, cuDNN" in medians:
        row["cudnn_bytes"] = medians["single, cuDNN"] - bare
    # Communicators: runs whose attention asks cuDNN against one process that does, others against one that does not.
    for suffix in (", cuDNN", ""):
        alone = medians.get(f"single{suffix}")
        several = medians.get(f"several ranks{suffix}")
        if alone is None:
            continue
        if several is not None:
            row.setdefault("nccl_bytes", several - alone)
            if (two := medians.get(f"two communicators{suffix}")) is not None:
                row.setdefault("nccl_further_bytes", two - several)
        for field, kind, beside in (
            ("nccl_one_rank_bytes", "one rank", "single"),
            ("nccl_one_rank_further_bytes", "one rank, two communicators", "one rank"),
            ("nccl_idle_bytes", "one rank, no collectives", "single"),
        ):
            with_it, without = (medians.get(f"{k}{suffix}") for k in (kind, beside))
            if with_it is not None and without is not None:
                row.setdefault(field, with_it - without)
    return row


def _kind(cfg: RunConfig) -> str:
    """Which communicators a run has (lab/analytic/hardware.py), whether it loads cuDNN and has int8 products."""
    count = communicators(cfg)
    if count == 0:
        kind = "single"
    elif cfg.world_size == 1 and cfg.parallel.strategy.is_fsdp:
        kind = "one rank, no collectives"
    elif cfg.world_size == 1:
        kind = "one rank" if count == 1 else "one rank, two communicators"
    else:
        kind = "several ranks" if count == 1 else "two communicators"
    return f"{kind}{', cuDNN' if asks_cudnn(cfg) else ''}{', int8' if cfg.quantization.kind == 'int8' else ''}"


def row_name(gpu_name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", gpu_name.lower().removeprefix("nvidia ")).strip("_")


def row_yaml(name: str, probe: Probe, row: Mapping[str, int], environment: Mapping[str, Any]) -> str:
    """A complete ``configs/hardware/NAME.yaml``: each number with the command that measured it; 0 where it is open."""
    versions = {**environment.get("versions", {}), **next(iter(environment.get("gpus", [])), {})}
    known = ", ".join(f"{key} {versions[key]}" for key in ("driver", "torch", "cuda", "nccl") if versions.get(key))
    probed = "python -m lab.measure.gpu_probe"
    study = {
        "cuda_context_bytes": ("parallel=single attention=math", "one process's context, cuBLAS, the kernels it loads"),
        "cudnn_bytes": ("parallel=single attention=cudnn", "cuDNN, where attention asks it"),
        "nccl_bytes": ("parallel=ddp,zero2,fsdp world_size=2", "the first communicator"),
        "nccl_further_bytes": ("parallel=zero3 precision=fp16_mixed world_size=2", "a second communicator"),
        "nccl_one_rank_bytes": ("parallel=zero2 world_size=1", "a communicator of one rank with collectives"),
        "nccl_one_rank_further_bytes": ("parallel=zero3 precision=fp16_mixed world_size=1", "a second one of one rank"),
        "nccl_idle_bytes": ("parallel=fsdp world_size=1", "a communicator that no collective ran on"),
        "bitsandbytes_int8_bytes": ("quantization=int8", "bitsandbytes' own cuBLAS handle, for int8 products"),
    }
    lines = [
        f"# {probe.gpu_name}{f': {known}' if known else ''}.",
        "# Made by `lab hardware --measure`: the probe's readings, and NVML's device use minus what PyTorch reserved",
        "# in the runs of `lab sweep experiment=hardware` (again: `lab hardware outputs/hardware`).",
        f"name: {name}",
        "device_type: cuda",
        f"gpu_name: {probe.gpu_name}",
        f"capacity_bytes: {probe.capacity_bytes} # NVML's total; {probed}",
        f"idle_bytes: {probe.idle_bytes} # NVML's use of the idle card; {probed}",
    ]
    for field, (points, what) in study.items():
        source = f"lab sweep experiment=hardware {points}" if field in row else f"open: needs {points}"
        lines.append(f"{field}: {row.get(field, 0)} # {what}; {source}")
    lines += [
        "nccl_deepspeed_bytes: 0 # DeepSpeed's ZeRO uses the first communicator",
        f"cublas_workspace_bytes: {probe.cublas_workspace_bytes} # per handle, at the first matmul; {probed}",
        f"cublaslt_workspace_bytes: {probe.cublaslt_workspace_bytes} # per handle, at the first addmm; {probed}",
        f"allocation_alignment_bytes: {probe.allocation_alignment_bytes} # of one byte; {probed}",
        f"num_streaming_multiprocessors: {probe.num_streaming_multiprocessors} # {probed}",
        "dense_bf16_flops: 0 # open: the vendor's datasheet; only sizes FLOPs utilisation",
    ]
    return "\n".join(lines) + "\n"
