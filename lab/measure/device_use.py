"""What is not the allocator's: a GPU's whole use as NVML shows it, and the host process's resident bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
import torch

from lab.config.device import gpu_is_shared
from lab.record import RankMeasurement


def gpu_uses() -> dict[str, int]:
    """Bytes in use on every GPU that NVML shows, by UUID; empty where it cannot be read. Touches no GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library or no driver: DeviceUse says so
        return {}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {_text(pynvml.nvmlDeviceGetUUID(h)): int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles}
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


class DeviceUse:
    """Bytes in use on one GPU, all processes and the driver together; None where nothing can tell.

    ``before``: `gpu_uses` before this process touched a GPU. What was in use then beyond ``idle_bytes``, the idle
    card's (a hardware row's; 0: not known), is none of this run's and is taken off: ``foreign_bytes``.
    """

    def __init__(self, device: torch.device, before: Mapping[str, int] | None = None, idle_bytes: int = 0) -> None:
        self.notes: list[str] = []
        self.foreign_bytes: int | None = None
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
            used_before = (before or {}).get(_text(pynvml.nvmlDeviceGetUUID(self._handle)))
            if used_before is not None and idle_bytes:
                self.foreign_bytes = max(used_before - idle_bytes, 0)
        except Exception as error:  # no library, no permission, a MIG slice: the run goes on without
            self._handle = None
            self.notes.append(f"NVML cannot be read ({error}): device_used is cudaMemGetInfo's total minus free")

    def read(self) -> int | None:
        if self._index is None:
            return None
        if self._nvml is not None:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) - (self.foreign_bytes or 0)
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


def _text(value: str | bytes) -> str:
    """NVML's strings are bytes in older bindings."""
    return value.decode() if isinstance(value, bytes) else value


class HostUse:
    """Resident set size of this process, bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def read(self) -> int:
        return int(self._process.memory_info().rss)


def count_kept_memory(measurement: RankMeasurement) -> None:
    """Count what was in use before the run as the run's after all.

    For one with managed memory: what the driver kept of an earlier process's is given to the next that asks.
    """
    foreign = measurement.device_foreign_bytes
    measurement.device_foreign_bytes = None
    readings = [p for step in measurement.steps for p in step.phases.values()]
    for reading in [*readings, *([measurement.build] if measurement.build else [])]:
        if reading.device_used_bytes is not None:
            reading.device_used_bytes += foreign or 0
