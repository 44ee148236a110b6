"""What the run ran on: versions, GPUs, commit, memory-relevant environment variables. No torch import.

A rank has torch loaded already, so CUDA's, cuDNN's and NCCL's versions are asked of it; the sweep driver,
which recovers records of runs that died, has only the installed packages' metadata.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "deepspeed",
    "accelerate",
    "bitsandbytes",
    "peft",
    "transformers",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
    "nvidia-ml-py",
)
# Variables that change how much memory is used or how it is counted.
_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUDA_MODULE_LOADING",
    "CUDA_LAUNCH_BLOCKING",
    "TORCH_NCCL_AVOID_RECORD_STREAMS",
    "OMP_NUM_THREADS",
)


def environment() -> dict[str, Any]:
    """JSON-able description of this machine and installation; missing things are left out."""
    out: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        # Enough to tell machines apart; a committed record names no host.
        "host": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        "versions": _versions(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k in _VARIABLES or k.startswith("NCCL_")},
    }
    if gpus := _gpus():
        out["gpus"] = gpus
    if git := _git():
        out["git"] = git
    return out


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return versions


def _gpus() -> list[dict[str, Any]]:
    """NVML's name, memory and driver of every GPU of this machine; empty without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver or no library: no GPU
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append(
                {
                    "index": index,
                    "name": _text(pynvml.nvmlDeviceGetName(handle)),
                    "total_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    "driver": driver,
                }
            )
        return gpus
    except pynvml.NVMLError:  # a driver that refuses a query costs the entry, not the run
        return []
    finally:
        pynvml.nvmlShutdown()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _git() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in, and whether tracked files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
