"""Which hardware row this machine is, without torch: NVML's GPU name, else the CPU."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from lab.config.known import options
from lab.config.plain import read_option

SHARED_GPU_VARIABLE = "LAB_SHARED_GPU"  # set by `lab sweep --share`: other runs are on this GPU at the same time


def hardware_row() -> dict[str, Any]:
    """The row of ``configs/hardware`` that ``hardware=auto`` stands for on this machine."""
    gpus = visible_gpu_names()
    if not gpus:
        return read_option("hardware", "cpu")
    for name in options("hardware"):
        if (row := read_option("hardware", name)).get("gpu_name") == gpus[0]:
            return row
    return {**read_option("hardware", "unknown_gpu"), "gpu_name": gpus[0]}


def gpu_is_shared() -> bool:
    """Then NVML's device use and all times are not this run's alone; PyTorch's own counters are."""
    return bool(os.environ.get(SHARED_GPU_VARIABLE))


def visible_gpu_names() -> list[str]:
    """NVML names of the GPUs this process may use; empty without a driver or with none visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    names = _nvml_names()
    if visible is not None and all(part.strip().isdigit() for part in visible.split(",")):
        names = [names[int(i)] for i in visible.split(",") if int(i) < len(names)]
    return names


def _nvml_names() -> list[str]:
    """Every GPU's name in NVML's order; none where the library or the driver is missing."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")  # the driver's own; without it pynvml need not be imported (50 ms)
        import pynvml  # nvidia-ml-py

        pynvml.nvmlInit()
    except Exception:  # OSError, ImportError or one of NVML's own kinds, all meaning: no GPU to be had
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
        names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
    return [n.decode() if isinstance(n, bytes) else n for n in names]
