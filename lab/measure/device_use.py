"""What is not the allocator's: a GPU's whole use as NVML shows it, and the host process's resident bytes."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from lab.config.device import gpu_is_shared


class DeviceUse:
    """Bytes in use on one GPU, all processes and the driver together; None where nothing can tell."""

    def __init__(self, device: torch.device) -> None:
        self.notes: list[str] = []
        self._handle: Any = None
        self._nvml: Any = None
        self._index: int | None = None
        if device.type != "cuda":
            return
        if gpu_is_shared():
            self.notes.append("lab sweep --share: other runs were on this GPU, so device use and speed are left out")
            return
        self._index = torch.cuda.current_device() if device.index is None else device.index
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = nvml_handle(pynvml, self._index)
            pynvml.nvmlDeviceGetMemoryInfo(self._handle)
            self._nvml = pynvml
        except Exception as error:  # no library, no permission, a MIG slice: the run goes on without
            self._handle = None
            self.notes.append(f"NVML cannot be read ({error}): device_used is cudaMemGetInfo's total minus free")

    def read(self) -> int | None:
        if self._index is None:
            return None
        if self._nvml is not None:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        free, total = torch.cuda.mem_get_info(self._index)
        return int(total - free)

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None


def nvml_handle(nvml: Any, index: int) -> Any:
    """NVML's handle of torch's device ``index``: by UUID, since CUDA_VISIBLE_DEVICES renumbers torch's side only."""
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


class HostUse:
    """Resident set size of this process, bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def read(self) -> int:
        return int(self._process.memory_info().rss)
