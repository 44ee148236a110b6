"""Which hardware row this machine is, without torch: NVML's GPU name, else the CPU."""

from __future__ import annotations

import os


def visible_gpu_names() -> list[str]:
    """NVML names of the GPUs this process may use; empty without a driver or with none visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    try:
        import pynvml  # nvidia-ml-py

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: no GPU
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
        names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    finally:
        pynvml.nvmlShutdown()
    if visible is not None and all(part.strip().isdigit() for part in visible.split(",")):
        names = [names[int(i)] for i in visible.split(",") if int(i) < len(names)]
    return [n.decode() if isinstance(n, bytes) else n for n in names]
