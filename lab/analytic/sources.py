"""Every label of the replay -> what the tensor is, its element count in symbols, and where that is written.

The symbols are those of ``lab.analytic.symbols``; a formula there counts elements, or bytes where the rule says
``itemsize=1``. Several formulas: the tensor's bytes decide which one holds (a strategy, a backend). A test replays
the lab's options and asserts that every live tensor's formula gives its bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

ALL = "all parameters"
ATTENTION, MLP, BLOCK, HEAD, EMBEDDING = "blocks.*.attention", "blocks.*.mlp", "blocks.*", "head", "embedding"
NAMED = ""  # the module is in the label

_DERIVATIVES = "torch tools/autograd/derivatives.yaml"
_STAGE12 = "deepspeed runtime/zero/stage_1_and_2.py"
_STAGE3 = "deepspeed runtime/zero/stage3.py"
_FSDP = "torch distributed/fsdp/_fully_shard/_fsdp_collectives.py"
_BNB, _ADAFACTOR = "bitsandbytes optim/optimizer.py", "torch optim/_adafactor.py"
_EMBEDDING = "torch aten native/cuda/EmbeddingBackwardKernel.cu"
_REDUCE = "torch aten native/cuda/Reduce.cuh"
_PARAM = r"(?P<parameter>(?:blocks\.\d+\.[a-zA-Z_.0-9]+|embedding|position|norm|head)[. ](?:weight bias|weight|bias))"
_NORM = r"(?:blocks\.\d+\.(?:attention_norm|mlp_norm)|norm)"
_HEAD_NORM = r"blocks\.\d+\.attention\.[qk]_norm"  # Qwen3
_HF, _MASKS = "transformers models/*/modeling_*.py", "transformers masking_utils.py"


@dataclass(frozen=True)
class Source:
    """One rule: labels that match ``pattern``. ``formulas`` are empty where the size depends on an order of events."""

    pattern: re.Pattern[str]
    module: str
    what: str
    formulas: tuple[str, ...]
    itemsize: int | None
    reference: str


def _rule(
    pattern: str, module: str, what: str, formulas: str, reference: str = _DERIVATIVES, itemsize: int | None = None
) -> Source:
    parts = tuple(f.strip() for f in formulas.split("|")) if formulas else ()
    return Source(re.compile(pattern), module, what, parts, itemsize, reference)


_P, _HELD = "up(psi, 2 * N) // N", "w | cdiv(w0, G) * w1"
_PACKED = "cdiv(w, 2) | cdiv(w, 4) | cdiv(w, 8) | cdiv(cdiv(w, 2), G) | cdiv(cdiv(w, 4), G) | cdiv(cdiv(w, 8), G)"
_BLOCKS, _NESTED = "cdiv(w, Q)", "cdiv(cdiv(w, Q), 256)"
_BNB, _PEFT = "bitsandbytes functional.py, autograd/_functions.py", "peft tuners/lora/layer.py, bnb.py"
_DORA, _SQUARES = "peft tuners/lora/dora.py, variants.py", "w1 * w1 | w1 * r | w0 * w0 | w0 * r"  # Conv1D: [in, out]
_Q, _KV, _SQUARE, _X, _INNER = "b * s * n * d", "b * s * k * d", "b * n * s * s", "b * s * h", "b * s * f"
_Q8, _KV8 = "b * s * n * up(d, 8)", "b * s * k * up(d, 8)"  # flash of heads that are no whole 8 elements
_IN_OR_OUT = f"{_X} | {_Q} | {_KV} | {_INNER} | b * s * (n + 2 * k) * d | b * s"

SOURCES: tuple[Source, ...] = (
    # -- states, whole or sharded ------------------------------------------------------------------
    _rule(
        _PARAM,
        NAMED,
        "parameter, or its rows on this rank, padded; packed: two weights a byte",
        f"{_HELD} | {_PACKED}",
        "nn.Module; fsdp _fsdp_param.py; bitsandbytes functional.py",
    ),
    # -- what dequantizes packed weights, and dequantized ones -----------------------------------------
    _rule(f"(?:nested )?absmax(?:, 8 bit)? of {_PARAM}", NAMED, "a maximum per block", f"{_BLOCKS} | {_NESTED}", _BNB),
    _rule(f"row maxima of {_PARAM}", NAMED, "a maximum per row", "w0", _BNB, 4),
    _rule(f"4-bit code of {_PARAM}", NAMED, "table of 16 values", "16", _BNB, 4),
    _rule(f"8-bit code of {_PARAM}|bitsandbytes' 8-bit code", NAMED, "table of 256 values", "256", _BNB, 4),
    _rule(f"absmax offset of {_PARAM}", NAMED, "mean of the maxima", "1", _BNB, 4),
    _rule(f"dequantized {_PARAM}(?:, .*)?", NAMED, "whole weight, for one product", "w", _BNB),
    _rule("dequantized absmax|absmax to be quantized|absmax minus its mean", ALL, "fp32 maxima", "", _BNB, 4),
    _rule("4-bit code, magnitudes", ALL, "the table while it is normalised", "", f"{_BNB}, get_4bit_type", 4),
    _rule("absmax mean, partial sums|absmax mean, semaphores", ALL, "scratch of the reduction", "", _REDUCE),
    _rule("row scales", ALL, "row maxima over 127", "", _BNB, 4),
    # -- adapters ------------------------------------------------------------------------------------
    _rule(f"DoRA (?:identity|A) of {_PARAM}(?: input.*)?", NAMED, "identity [in, in]; A of it", _SQUARES, _DORA),
    _rule(
        f"DoRA (?:update|base|scaled update|adapted weight) of {_PARAM}(?:[ ,].*)?",
        NAMED,
        "the weight, B A, or their sum, for its rows' norms",
        "w | w1 * r | w0 * r",
        _DORA,
    ),
    _rule(f"DoRA (?:norm|ratio.*) of {_PARAM}", NAMED, "a number per output", "w0 | w1", _DORA),
    _rule(f"DoRA .* of {_PARAM} summed gradient", NAMED, "of the magnitudes over the norms", "w0 | w1", _DORA),
    _rule(f"DoRA .* of {_PARAM}(?:[ ,].*)?", NAMED, "input or output", "b * s * w0 | b * s * w1", _DORA),
    _rule(".* adapter dropout mask", NAMED, "a bool per element", f"{_X} | {_Q} | {_INNER}", _PEFT, 1),
    _rule(".* adapter A", NAMED, "A's output", "b * s * r", _PEFT),
    _rule(".* adapter B input.*", NAMED, "A's output: its copy or gradient", "b * s * r", _PEFT),
    _rule(
        ".* (?:adapter[ ,].*|adapted(?:[ ,].*)?|clone)", NAMED, "input, output, sum or a gradient", _IN_OR_OUT, _PEFT
    ),
    _rule(".* (?:input, (?:compute|fp16|int8).*|input row maxima|input's type)", NAMED, "input", _IN_OR_OUT, _BNB),
    _rule(".* int8 (?:operand|product), fp32", NAMED, "where cuBLASLt refuses the shape", "", _BNB, 4),
    _rule(".*, (?:input's type|int32|fp16)", NAMED, "output", _IN_OR_OUT, _BNB),
    _rule("flat parameters", ALL, "bit16_groups_flat", "up(psi, 2 * N)", _STAGE12),
    _rule("clone of the partition|master weights", ALL, "single_partition_of_fp32_groups", _P, _STAGE12),
    _rule("lp_param_buffer", ALL, "shards, each padded for itself", "S", _STAGE3),
    _rule("fp32_partitioned_groups_flat", ALL, "masters of one sub-group", "S_i", _STAGE3),
    _rule("grad_partitions_flat_buffer", ALL, "gradient shards, kept for good", "S", _STAGE3),
    _rule("exp_avg|exp_avg_sq", NAMED, "Adam moment", f"{_HELD} | {_P} | S_i", "torch optim/adamw.py"),
    _rule("momentum_buffer", NAMED, "SGD momentum", f"{_HELD} | {_P} | S_i", "torch optim/sgd.py"),
    _rule("step", NAMED, "step counter, on the GPU for fused AdamW only", "1", "torch optim/adamw.py", 4),
    _rule("state1|state2", NAMED, "bitsandbytes' moment", f"{_HELD} | {_P} | S_i", _BNB),
    _rule(
        "absmax1|absmax2", NAMED, "largest of 256 codes", f"cdiv(w, 256) | cdiv({_P}, 256) | cdiv(S_i, 256)", _BNB, 4
    ),
    _rule("qmap1|qmap2", ALL, "code table, one for all tensors", "256", _BNB, 4),
    _rule("row_var", NAMED, "Adafactor's variance of rows", "w0", _ADAFACTOR),
    _rule("col_var", NAMED, "Adafactor's variance of columns", "w1", _ADAFACTOR),
    _rule("variance", NAMED, "Adafactor's variance of a vector", f"w | {_P} | S_i", _ADAFACTOR),
    _rule("Adafactor .*", NAMED, "of one parameter, or of all (foreach)", "", _ADAFACTOR),
    # -- gradients ---------------------------------------------------------------------------------
    _rule(f"gradient of {_PARAM}", NAMED, "gradient as the backward makes it", "w"),
    _rule(
        "accumulated gradient",
        NAMED,
        "sum of two gradients",
        f"{_X} | {_Q} | {_KV} | {_INNER} | v * h | s * h | c * h | 1 | h | n * d | k * d | f | (n + 2 * k) * d",
    ),
    _rule("FSDP sharded gradient", NAMED, "reduce-scatter's output, one unit", "U", _FSDP),
    _rule("grads_in_partition", ALL, "whole size of the parameters that overlap the partition", "", _STAGE12),
    _rule("partition padding", ALL, "zeros up to the partition's size", "", _STAGE12),
    _rule("flat gradient partition|flat gradient", ALL, "flattened gradients of one step", f"{_P} | S_i", _STAGE12),
    _rule("gradient in the masters' type", ALL, "single_grad_partition", f"{_P} | S_i", _STAGE12),
    _rule("gradient (?:slice|shard), fp64", ALL, "one gradient, cast for its norm", "", "deepspeed zero/utils.py", 8),
    # -- gathered parameters and buckets -------------------------------------------------------------
    _rule(
        f"gathered {_PARAM}", NAMED, "whole parameter", "w | cdiv(w, N) * N | cdiv(w0, G) * w1 * G", f"{_STAGE3}; fsdp"
    ),
    _rule("DDP parameter counts|DDP parameter shapes", ALL, "compared across ranks", "", "torch c10d/reducer.cpp", 8),
    _rule("DDP used-parameter map", ALL, "static_graph: int32 per parameter", "", "torch c10d/reducer.cpp", 4),
    _rule("DDP bucket", ALL, "gradients in order of arrival up to bucket_cap_mb", "", "torch c10d/reducer.cpp"),
    _rule("ZeRO(?:-3)? reduce bucket", ALL, "ipg bucket, reduce_bucket_size elements", "B", _STAGE12),
    _rule("flattened bucket", ALL, "allreduce_bucket's flat copy of what is reduced at once", "", _STAGE12),
    _rule("averaged bucket", ALL, "avg_scatter_contiguous_grads: product of the bucket", "", _STAGE3),
    _rule("padding|padded gradient shard", ALL, "zeros for a rank's short last shard", "", _STAGE3),
    _rule("ZeRO-3 reduce-scatter", ALL, "N x padded shards of what is reduced at once", "", _STAGE3),
    _rule("gloo's clone.*", ALL, "gloo reduces a clone", "", "torch c10d/ProcessGroupGloo.cpp"),
    _rule(
        "ZeRO-3 all-gather", ALL, "N x padded shards of what one fetch brings", "", "deepspeed partition_parameters.py"
    ),
    _rule("FSDP all-gather input", NAMED, "cast of one unit's local shards", "U", _FSDP),
    _rule("FSDP all-gather output", NAMED, "one unit's shards of all ranks", "U * G", _FSDP),
    _rule("FSDP reduce-scatter input", NAMED, "one unit's whole gradients, flat", "U * G", _FSDP),
    _rule("blocks of chunk_cat", NAMED, "which threads copy which gradient", "", "torch cuda/TensorShape.cu", 8),
    _rule("padded gradient", NAMED, "rows that the ranks can share", "", "torch native/TensorShape.cpp"),
    _rule("device mesh", ALL, "ranks of the DeviceMesh, on the CPU", "N", "torch distributed/device_mesh.py", 4),
    _rule(f"whole {_PARAM}", NAMED, "parameter before it is cut", "w", "accelerate utils/fsdp_utils.py"),
    _rule("FSDP cast", NAMED, "cast of one parameter, one rank", "", _FSDP),
    _rule(f"autocast copy of {_PARAM}(?: gradient)?", NAMED, "autocast's cached cast", "w", "torch autocast_mode.cpp"),
    # -- ends of the model ---------------------------------------------------------------------------
    _rule("batch", "batch", "tokens and targets, two pairs", "b * s", "lab/data", 8),
    _rule("losses", HEAD, "loss per step", "steps", "lab/loop.py", 4),
    _rule("loss over micro-steps.*|scaled loss.*", HEAD, "scalar", "1", "deepspeed runtime/engine.py"),
    _rule("loss|loss gradient|total weight|loss sum.*", HEAD, "scalar", "1", _DERIVATIVES, 4),
    _rule("loss over items.*", HEAD, "scalar", "1", "transformers loss/loss_utils.py", 4),
    _rule("number of items|summed loss", HEAD, "scalar of the Trainer's loop", "1", "transformers trainer.py", 4),
    _rule("allocator's warm-up", NAMED, "bytes of all weights", "", "transformers modeling_utils.py"),
    _rule("labels that count(, int64)?", HEAD, "labels != -100", "b * (s - 1)", "transformers trainer.py"),
    _rule("attention mask, (bool|int64)", EMBEDDING, "mask without padding", "b * s", "transformers masking_utils.py"),
    _rule("mask without padding|sum of the mask", EMBEDDING, "is it?", "1", "transformers masking_utils.py"),
    _rule("DDP's copy of the loss.*", HEAD, "scalar", "1", "torch nn/parallel/distributed.py", 4),
    _rule("DDP's copy of the logits.*", HEAD, "output of the model", "b * s * v", "torch nn/parallel/distributed.py"),
    _rule("logits of the outputs, fp32.*", HEAD, "output of the model", "b * s * v", "accelerate utils/operations.py"),
    _rule("loss in output_dtype", HEAD, "scalar", "1", "accelerate utils/dataclasses.py", 2),
    _rule("loss gradient, fp32", HEAD, "scalar", "1", "torch distributed/fsdp/_fully_shard/_fsdp_state.py", 4),
    _rule("loss scale|growth tracker", HEAD, "scalar of the gradient scaler", "1", "torch amp/grad_scaler.py", 4),
    _rule("rope frequencies", ATTENTION, "while the tables are made", "d // 2 | 1", "lab/model", 4),
    _rule("rope positions", ATTENTION, "while the tables are made", "s", "lab/model", 4),
    _rule("rope (?:cos|sin)", ATTENTION, "rotary table", "s * d", "lab/model"),
    _rule("position ids", "position", "indices", "s", "lab/model", 8),
    _rule("position", "position", "rows of the position table", "s * h", "lab/model"),
    _rule("position (?:differences|jumps)|packed sequence indices", "position", "check", "b * s | b * (s + 1)", _MASKS),
    _rule("(?:padded|shifted) labels", HEAD, "int64", "b * s | b * (s + 1)", "transformers loss/loss_utils.py", 8),
    _rule("rotary frequencies", ATTENTION, "buffer inv_freq", "d // 2", _HF, 4),
    _rule("rotary (?:positions|angles|cos|sin)", ATTENTION, "rotary table", "s * d | s * d // 2 | s", _HF),
    _rule("embedding scale", EMBEDDING, "Gemma's embed_scale", "1", _HF),
    _rule("mask (?:indices|zero)", ATTENTION, "for the mask", "s | b | b * s | 1", _MASKS),
    _rule("embedding sum summed gradient", "position", "gradient of the position rows", "s * h"),
    _rule("embedding.*(?:mask)", EMBEDDING, "dropout mask", _X, _DERIVATIVES, 1),
    _rule("embedding.*", EMBEDDING, "embedding, its sum or dropout", _X),
    _rule(
        "sorted indices|segments",
        EMBEDDING,
        "indices being sorted",
        "b * s | min(b * s, v) | r_e | s | r_p",
        _EMBEDDING,
        8,
    ),
    _rule("partial segments", EMBEDDING, "fp32 partial sums", "r_e * h | r_p * h", _EMBEDDING, 4),
    _rule("loss per token.*", HEAD, "column of the log-softmax", "c", "lab/model/loss.py"),
    _rule("loss one-hot column", HEAD, "minus one per token", "c", "lab/model/loss.py", 4),
    _rule("loss scale factor", HEAD, "scalar", "1", "lab/model/loss.py", 4),
    _rule("logits input.*", HEAD, "head input: gradient or autocast copy", "c * h"),
    _rule("chunk gradients", HEAD, "gradient of the chunks' input", _X),
    _rule("(?:log-softmax|logits).*", HEAD, "logits, log-softmax, or gradient; one chunk at a time", "c * v"),
    # -- norms -----------------------------------------------------------------------------------------
    _rule(f"{_NORM} weight(?:, fp32| plus one).*", NAMED, "Gemma's 1 + weight", "h", _HF),
    _rule(
        f"{_HEAD_NORM} (?:rstd|mean square|rstd gradient)", ATTENTION, "a number per head", "b * s * n | b * s * k", _HF
    ),
    _rule(f"{_HEAD_NORM}(?: .*)?", ATTENTION, "norm per head", f"{_Q} | {_KV}", _HF),
    _rule(f"{_NORM} (?:rstd|mean|mean square|rstd gradient)", NAMED, "a number per row", "b * s"),
    _rule(f"{_NORM}(?: .*)?", NAMED, "norm: output, gradient, or a step of it", _X),
    # -- attention -------------------------------------------------------------------------------------
    _rule("(?:query|key|value|query, key and value) input.*", ATTENTION, "input: gradient or autocast copy", _X),
    _rule("query, key and value.*", ATTENTION, "fused projection or its gradient", "b * s * (n + 2 * k) * d"),
    _rule(
        "(?:scaled )?(?:query|key|value)(?:[ ,].*)?",
        ATTENTION,
        "projection, rope step or gradient",
        f"{_Q} | {_KV} | {_Q8} | {_KV8}",
    ),
    _rule("attention projection input.*", ATTENTION, "input: gradient or autocast copy", _Q),
    _rule("attention projection", ATTENTION, "output projection", _X),
    _rule("log-sum-exp", ATTENTION, "per query row", "b * n * s | b * n * up(s, 32)", "torch attention.cu", 4),
    _rule("attention random state", ATTENTION, "seed, offset", "1", "torch attention.cu", 8),
    _rule("(?:additive )?causal mask", ATTENTION, "mask", "s * s | b * s * s | 1", "torch transformers/attention.cpp"),
    _rule("additive causal mask, padded", ATTENTION, "rows of 16 elements", "b * s * up(s, 16)", "torch attention.cpp"),
    _rule("mask values", ATTENTION, "0, -inf", "1 | 4", "torch transformers/attention.cpp"),
    _rule("masked rows", ATTENTION, "_safe_softmax", "b * n * s", "torch transformers/attention.cpp", 1),
    _rule("attention dropout mask|masked scores, bool", ATTENTION, "a bool per score", _SQUARE, _DERIVATIVES, 1),
    _rule(
        "attention backward row sums",
        ATTENTION,
        "gradient times output, summed per query row",
        "b * n * up(s, 128) | b * n * up(s, 32) | b * n * s",
        "torch flash_api.cpp; cuda/attention_backward.cu",
        4,
    ),
    _rule("attention splits", ATTENTION, "output or log-sum-exp per part of the keys", "", "torch flash_api.cpp", 4),
    _rule("gradient times output", ATTENTION, "before it is summed per row", _Q, "torch attention_backward.cu", 4),
    _rule(
        "fp32 query gradient accumulator",
        ATTENTION,
        "dq_accum",
        "b * n * up(s, 128) * up(d, 32) | b * n * up(s, 128) * up(d, 64)",
        "torch flash_api.cpp, mha_bwd",
        4,
    ),
    _rule("expanded key/value gradient", ATTENTION, "dk, dv per query head", f"{_Q} | {_Q8}", "torch flash_api.cpp"),
    _rule("attention output gradient, padded", ATTENTION, "zeros around it", _Q8, "torch attention.cpp"),
    _rule("attention output(?: gradient)?, contiguous", ATTENTION, "as rows", f"{_Q} | {_Q8}", "torch attention.cu"),
    _rule("cuDNN workspace", ATTENTION, "cuDNN's smallest workspace", "256", "torch cudnn/MHA.cpp", 1),
    _rule(
        "cuDNN attention workspace",
        ATTENTION,
        "fp32 query gradient, row sums, expanded key and value gradients",
        "256 + 4 * b * n * s * (d + 1) | 256 + 4 * b * n * s * (d + 1) + 2 * e * b * n * s * d",
        "torch cudnn/MHA.cpp",
        1,
    ),
    _rule(
        "attention backward workspace",
        ATTENTION,
        "memory-efficient kernel: an fp32 accumulator and a header per tile; for wide half-precision heads also keys'",
        "b * n * cdiv(s, 64) * (16384 + 16) | b * n * cdiv(s, 128) * (65536 + 16) | "
        "b * n * cdiv(s, 128) * cdiv(d, 64) * (32768 + 16)",
        "torch mem_eff_attention/kernel_backward.h",
        1,
    ),
    _rule(
        "fp32 attention output accumulator",
        ATTENTION,
        "of wide heads",
        _Q,
        "torch mem_eff_attention/kernel_forward.h",
        4,
    ),
    _rule("attention output(?: contiguous)?", ATTENTION, "output", f"{_Q} | {_Q8}"),
    _rule("(?:attention|scaled|masked|scores|softmax).*", ATTENTION, "scores, weights, output", f"{_SQUARE} | {_Q}"),
    # -- MLP, residual ---------------------------------------------------------------------------------
    _rule("mlp (?:gate|up) input.*", MLP, "input: gradient or autocast copy", _X),
    _rule("mlp down input.*", MLP, "input: gradient or autocast copy", _INNER),
    _rule("mlp down", MLP, "output", _X),
    _rule("(?:silu|gelu|mlp (?:gate|up|product)).*", MLP, "inner activation or its gradient", _INNER),
    _rule("residual dropout mask", BLOCK, "a bool per element", _X, _DERIVATIVES, 1),
    _rule("residual.*", BLOCK, "residual stream", _X),
    # -- libraries, the step -----------------------------------------------------------------------------
    _rule("cuBLAS workspace.*", "libraries", "per handle and stream", "W", "torch cuda/CublasHandlePool.cpp", 1),
    _rule("cuBLASLt workspace.*", "libraries", "per handle and stream", "W_lt", "torch cuda/CublasHandlePool.cpp", 1),
    _rule("column sum|norm, partial sums", "libraries", "partial sums of a reduction", "", _REDUCE, 1),
    _rule("norm, semaphore", "libraries", "of a reduction", "1", _REDUCE, 4),
    _rule("gradient plus weight decay", ALL, "for the step", "", "torch optim/sgd.py"),
    _rule(r"sqrt\(exp_avg_sq\)|AdamW denominator", ALL, "for the step", "", "torch optim/adamw.py"),
    _rule("gradient norms, partial", ALL, "a norm per chunk of 65536 elements", "", "torch ForeachReduceOp.cu", 4),
    _rule("gradient norms", ALL, "a norm per gradient", "T", "torch nn/utils/clip_grad.py", 4),
    _rule("inf_or_nan_tracker|tensor of the barrier", ALL, "a bool", "1", _STAGE3, 1),
    _rule(
        "(?:global |total |sub-group )?(?:gradient )?norm|total norm|clip coefficient",
        ALL,
        "scalar, fp32 or fp64",
        "1",
        "torch nn/utils/clip_grad.py; deepspeed runtime/utils.py",
    ),
    _rule("isinf.*|isnan|overflow", ALL, "has_overflow", "S | 1", _STAGE3),
)


@cache
def source_of(label: str) -> Source | None:
    """The first rule whose pattern is the whole label; None for a label the table does not know."""
    return next((s for s in SOURCES if s.pattern.fullmatch(label)), None)


@cache
def parameter_of(label: str) -> str | None:
    """The parameter that a label names: 'gradient of blocks.0.mlp_norm weight' -> 'blocks.0.mlp_norm.weight'."""
    rule = source_of(label)
    found = rule.pattern.fullmatch(label) if rule else None
    name = found.groupdict().get("parameter") if found else None
    return name.replace("weight bias", "bias").replace(" ", ".") if name else None
