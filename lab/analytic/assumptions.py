"""What the prediction does not model, said in the prediction itself."""

from __future__ import annotations

from lab.config import RunConfig
from lab.config.finetuning import odd_int8_outputs
from lab.vocab import Precision, Strategy


def assumptions(cfg: RunConfig, managed_bytes: int = 0) -> list[str]:
    """One sentence per thing that is taken for granted or left out for this configuration.

    ``managed_bytes``: paged optimizer states of the worst rank.
    """
    out = ["worst rank; steady state is the step from which steps repeat"]
    if cfg.hardware.device_type == "cuda":
        if cfg.train.expandable_segments:
            out.append("caching allocator with expandable segments")
        else:
            out.append("caching allocator with default settings; segment addresses as one driver (580.159) gives them")
        out.append("cuBLAS workspaces of the forward and backward threads only; one CUDA stream per thread")
        if not cfg.hardware.cuda_context_bytes:
            out.append(
                f"hardware={cfg.hardware.name}: CUDA context and NCCL not measured, device_used is too low by them"
            )
        if not cfg.hardware.num_streaming_multiprocessors:
            out.append(f"hardware={cfg.hardware.name}: number of multiprocessors not known, no scratch of reductions")
    else:
        out.append(
            "CPU: bytes of live tensors as PyTorch's dispatcher sees them; kernels' own scratch memory is not seen"
        )
        out.append("CPU: no caching allocator, reserved equals allocated; device_used is not modelled")
    if cfg.precision.kind is Precision.FP16_MIXED:
        out.append(
            "fp16: a step that is taken; one that the loss scaler skips for an overflow is recorded, not compared"
        )
    if cfg.parallel.strategy is Strategy.ZERO3 and cfg.hardware.device_type == "cuda" and cfg.world_size > 1:
        out.append(
            "ZeRO-3: blocks of gathered parameters are free again once released, as if the GPU kept up with the "
            "host; where it is behind, reserved and device_used are higher (by how much: experiments/zero3_batch)"
        )
    waits = cfg.parallel.ddp.release_first_bucket
    if cfg.parallel.strategy is Strategy.DDP and cfg.hardware.device_type == "cuda" and not waits:
        out.append(
            "DDP: the first backward's bucket is kept until the second step's first all-reduce; NCCL's watchdog may "
            "let go of it earlier, then reserved and device_used are lower by up to one copy of the gradients"
        )
    if cfg.optimizer.kind.startswith("paged_") and cfg.hardware.device_type == "cpu":
        out.append("paged optimizer on a CPU: bitsandbytes does not page there, its states are plain tensors")
    if managed_bytes:
        out.append(
            f"{managed_bytes} bytes of optimizer states in CUDA managed memory, outside PyTorch's allocator: "
            "in device_used as long as the GPU has room for them, else on the host"
        )
    out += _finetuning(cfg)
    out += _hf(cfg)
    if cfg.engine.kind == "hf_trainer":
        out.append("Trainer: sequences of one length without padding; nothing is evaluated or saved between steps")
        if cfg.quantization.kind != "none":
            out.append(
                "Trainer: from_pretrained quantized the weights as it loaded them onto the GPU, then came the adapters"
            )
    if cfg.train.compile:
        out.append("train.compile=true: memory of compiled graphs is not modelled; this is the eager prediction")
    return out


def _finetuning(cfg: RunConfig) -> list[str]:
    """What holds for quantized bases and adapters."""
    out = []
    if cfg.quantization.kind not in ("none", "int8") and cfg.hardware.device_type == "cuda":
        out.append(
            "bitsandbytes 0.50: below 1536 rows a 4-bit product takes the way that it takes on sm_90 (H100, H200)"
        )
    if (
        cfg.parallel.strategy.is_fsdp
        and cfg.quantization.kind not in ("none", "int8")
        and cfg.quantization.storage_dtype == "uint8"
    ):
        out.append("FSDP2 cuts packed bytes from torch 2.13 on; before, set quantization.storage_dtype to a float type")
    if odd := odd_int8_outputs(cfg):
        shapes = ", ".join(f"{name} has {rows}" for name, rows in odd.items())
        out.append(
            f"int8: outputs that are no multiple of 4 ({shapes}); cuBLASLt refuses some such products (seen with 5340 "
            "rows and more; 256 and 3072 rows ran): if so, name them in quantization.skip_modules"
        )
    if cfg.quantization.kind == "int8":
        out.append("int8: bitsandbytes keeps a product's input until the graph is dropped, checkpointed or not")
    return out


def _hf(cfg: RunConfig) -> list[str]:
    """What the op list of a Hugging Face family leaves out."""
    model, hf = cfg.model, cfg.model.hf
    if model.family == "lab":
        return []
    out = ["transformers' modeling code of 5.17 and 5.23, without kernels from the hub"]
    if model.family == "other":
        out.append(
            f"approximate: no op list for model_type {hf.model_type}, replayed as a Llama of its shapes; its own "
            "norms, projections, experts, activations and position encoding are left out"
        )
    if cfg.engine.kind == "accelerate":
        out.append(_accelerated_outputs(cfg))
    if hf.activation not in ("silu", "gelu", "gelu_new"):
        out.append(f"activation {hf.activation} replayed as silu, which keeps its input alone")
    if hf.rope_type == "dynamic":
        out.append("rotary frequencies that the forward recomputes are left out")
    return out


def _accelerated_outputs(cfg: RunConfig) -> str:
    """accelerator.py, prepare_model: convert_outputs_to_fp32 around the forward of what is prepared.

    Only where that runs under Accelerate's autocast: mixed precision in one process or DDP.
    """
    precision, strategy = cfg.precision.kind, cfg.parallel.strategy
    mixed = precision in (Precision.BF16_MIXED, Precision.FP16_MIXED)
    converted = mixed and strategy in (Strategy.SINGLE, Strategy.DDP)
    itemsize = 4 if converted or precision is Precision.FP32 else 2
    logits = cfg.train.micro_batch_size * cfg.train.seq_len * cfg.model.vocab_size * itemsize
    return (
        "engine=accelerate prepares the lab's module, which returns the loss alone: a loop that prepares the "
        "transformers model itself and keeps its outputs through backward also holds their "
        f"{'fp32 ' if converted else ''}logits, {logits} bytes"
    )
