"""What one GPU says of itself: ``python -m lab.measure.gpu_probe`` prints one line of JSON for the hardware table.

Two parts in this order: NVML's readings of the idle card, before this process has a CUDA context; then a context, and
the workspaces that PyTorch's own allocator hands to cuBLAS and cuBLASLt, seen as what stays allocated after a
product whose operands are gone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from lab.measure.device_use import nvml_handle


def main() -> int:
    """Exit code 1 with one line on stderr where the GPU is not idle."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    idle = {pynvml.nvmlDeviceGetUUID(h): int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles}
    busy = {pynvml.nvmlDeviceGetUUID(h): len(pynvml.nvmlDeviceGetComputeRunningProcesses(h)) for h in handles}
    handle = nvml_handle(pynvml, 0)
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    if busy.get(uuid):
        print(f"the GPU is not idle: {busy[uuid]} processes use it", file=sys.stderr)
        return 1
    name: Any = pynvml.nvmlDeviceGetName(handle)
    print(
        json.dumps(
            {
                "gpu_name": name.decode() if isinstance(name, bytes) else name,
                "capacity_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                "idle_bytes": idle[uuid],
                "num_streaming_multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
                **workspaces(torch.device("cuda", 0)),
            }
        )
    )
    return 0


def workspaces(device: torch.device) -> dict[str, int]:
    """Bytes that one byte takes, and that stay with the cuBLAS handle after a first matmul and a first addmm."""
    byte = torch.empty(1, dtype=torch.uint8, device=device)
    alignment = torch.cuda.memory_allocated(device)
    operand, bias = torch.ones(64, 64, dtype=torch.bfloat16, device=device), torch.ones(64, device=device).bfloat16()
    start = torch.cuda.memory_allocated(device)
    product = operand @ operand
    del product
    matmul = torch.cuda.memory_allocated(device) - start
    product = torch.addmm(bias, operand, operand)
    del product, byte
    addmm = torch.cuda.memory_allocated(device) + alignment - start - matmul
    return {
        "allocation_alignment_bytes": alignment,
        "cublas_workspace_bytes": matmul,
        "cublaslt_workspace_bytes": addmm,
    }


if __name__ == "__main__":
    sys.exit(main())
