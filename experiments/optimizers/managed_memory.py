"""How much of the GPU the driver takes for CUDA managed memory: ``python experiments/optimizers/managed_memory.py``.

Paged optimizer states are many managed allocations. For each size of one, a process of its own makes and touches them
(by a fill on the GPU and a prefetch, as bitsandbytes does) until the driver has taken memory from the card five times,
and notes after how many it did, by NVML. One line of JSON per size; needs an idle GPU.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

MIB = 1 << 20
KIB = 1 << 10
SIZES = [100 * KIB, 200 * KIB, 391 * KIB, 512 * KIB, 560 * KIB, 640 * KIB, 705 * KIB, 768 * KIB, 900 * KIB, MIB]
SIZES += [MIB + 4 * KIB, 1280 * KIB, 1536 * KIB, 2 * MIB, 2 * MIB + 64 * KIB, 3 * MIB, 5 * MIB + 300 * KIB]


def steps_of(size: int) -> dict[str, object]:
    """Allocations made when the device use rose, and by how many bytes, for ``size`` bytes each."""
    import pynvml
    import torch

    torch.zeros(1, device="cuda")
    runtime = ctypes.CDLL("libcudart.so.13")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used() -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)

    pointer, addresses, rises, before = ctypes.c_void_p(), [], [], used()
    first = before
    while len(rises) < 6 and len(addresses) < 6000:
        if runtime.cudaMallocManaged(ctypes.byref(pointer), ctypes.c_size_t(size), 1):
            raise RuntimeError("cudaMallocManaged failed")
        runtime.cudaMemset(pointer, 0, ctypes.c_size_t(size))
        runtime.cudaDeviceSynchronize()
        addresses.append(int(pointer.value or 0))
        now = used()
        if now != before:
            rises.append([len(addresses), now - before])
            before = now
    offsets = [a - addresses[0] for a in addresses[:12]]
    return {"size": size, "rises": rises, "taken": before - first, "offsets": offsets}


def main() -> int:
    if len(sys.argv) > 1:
        print(json.dumps(steps_of(int(sys.argv[1]))), flush=True)
        return 0
    for size in SIZES:
        done = subprocess.run([sys.executable, __file__, str(size)], check=False, capture_output=True, text=True)
        print(done.stdout.strip() or f"{size}: {done.stderr.strip()[-300:]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
