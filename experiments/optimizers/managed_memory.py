"""How much of the GPU the driver takes for CUDA managed memory.

    python experiments/optimizers/managed_memory.py > experiments/optimizers/managed_memory.json

Paged optimizer states are many managed allocations. For each list of sizes below a process of its own makes and fills
some, in turn, until the driver has taken memory from the card six times, and notes after how many, by NVML. Needs
an idle GPU and CUDA's runtime library on the loader's path (LD_LIBRARY_PATH).
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

MIB, KIB = 1 << 20, 1 << 10
ALONE = [100, 200, 391, 512, 560, 640, 705, 768, 900, 1024, 1028, 1280, 1536, 2048, 2112, 3072, 5420]  # KiB
MIXED = [[700, 700, 700, 500], [1000, 300], [300, 1000], [1500, 400], [2500, 300, 300], [98, 900, 1100], [391, 1024]]
LISTS = [[n * KIB] for n in ALONE] + [[n * KIB for n in sizes] for sizes in MIXED] + [[100_000], [173_001, 350_000]]


def rises_of(sizes: list[int]) -> dict[str, object]:
    """Allocations made when the device use rose, and by how many bytes; the first addresses, from the first one on."""
    import pynvml

    runtime = ctypes.CDLL("libcudart.so.13")
    if runtime.cudaFree(None):
        raise RuntimeError("no CUDA context")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    addresses: list[int] = []
    rises: list[tuple[int, int]] = []
    before = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    while len(rises) < 6 and len(addresses) < 6000:
        pointer, size = ctypes.c_void_p(), ctypes.c_size_t(sizes[len(addresses) % len(sizes)])
        if runtime.cudaMallocManaged(ctypes.byref(pointer), size, 1) or runtime.cudaMemset(pointer, 0, size):
            raise RuntimeError("CUDA refused an allocation")
        runtime.cudaDeviceSynchronize()
        addresses.append(int(pointer.value or 0))
        now = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        if now != before:
            rises.append((len(addresses), now - before))
            before = now
    return {"sizes": sizes, "rises": rises, "offsets": [a - addresses[0] for a in addresses[:16]]}


def main() -> int:
    if len(sys.argv) > 1:
        print(json.dumps(rises_of([int(size) for size in sys.argv[1:]])), flush=True)
        return 0
    rows = []
    for sizes in LISTS:
        done = subprocess.run(
            [sys.executable, __file__, *map(str, sizes)], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(done.stdout.strip())
    print("[\n" + ",\n".join(rows) + "\n]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
