"""What the prediction does not model, said in the prediction itself."""

from __future__ import annotations

from lab.config import RunConfig


def assumptions(cfg: RunConfig) -> list[str]:
    """One sentence per thing that is taken for granted or left out for this configuration."""
    out = ["worst rank; steady state is the step from which steps repeat"]
    if cfg.hardware.device_type == "cuda":
        out.append("caching allocator with default settings; driver addresses grow with each segment")
        out.append("cuBLAS workspaces of the forward and backward threads only; one CUDA stream per thread")
        if not cfg.hardware.cuda_context_bytes:
            out.append(
                f"hardware={cfg.hardware.name}: CUDA context and NCCL not measured, device_used is too low by them"
            )
    else:
        out.append(
            "CPU: bytes of live tensors as PyTorch's dispatcher sees them; kernels' own scratch memory is not seen"
        )
        out.append("CPU: no caching allocator, reserved equals allocated; device_used is not modelled")
    if cfg.train.compile:
        out.append("train.compile=true: memory of compiled graphs is not modelled; this is the eager prediction")
    return out
