"""A Trainer's model and arguments -> the lab's settings: what is predicted, and what is only assumed.

Names are those of transformers' TrainingArguments (5.17 to 5.23). Nothing here imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.config import ConfigError, RunConfig, load
from lab.config.plain import read_option

_STRATEGIES = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp"}
_OPTIMIZERS = {  # TrainingArguments.optim -> (optimizer, implementation; None: torch's own choice for the device)
    "adamw_torch": ("adamw", None),
    "adamw_torch_fused": ("adamw", "fused"),
    "sgd": ("sgd", None),
    "adamw_bnb_8bit": ("adamw_8bit", "fused"),
    "adamw_8bit": ("adamw_8bit", "fused"),
    "paged_adamw_8bit": ("paged_adamw_8bit", "fused"),
    "paged_adamw": ("paged_adamw_32bit", "fused"),
    "paged_adamw_32bit": ("paged_adamw_32bit", "fused"),
    "lion_8bit": ("lion_8bit", "fused"),
}
_ALWAYS = ("engine", "model", "name", "launch", "world_size", "tracker", "train", "hardware", "parallel")
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "uint8": "uint8"}
_ATTENTION = {"sdpa": "auto", "eager": "eager"}


@dataclass(frozen=True)
class Facts:
    """What the arguments alone do not say: read off the model, the Accelerator and the first batch."""

    device_type: str  # cpu | cuda
    world_size: int
    max_steps: int
    seq_len: int
    batch_keys: tuple[str, ...] = ("attention_mask", "input_ids", "labels")  # int64 [b, s] tensors of a batch
    distributed_type: str = "NO"  # Accelerate's name for what it applied
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # DeepSpeed's configuration as applied
    parameter_dtype: str = "float32"
    attention: str = "sdpa"  # config._attn_implementation
    adapter: Mapping[str, Any] | None = None  # a peft model's only configuration, as a dictionary
    input_gradients: bool = False  # enable_input_require_grads was called
    quantization: Mapping[str, Any] | None = None  # config.quantization_config, as a dictionary
    padded: bool = False  # the first batch's attention_mask has zeros
    release_first_bucket: bool = False  # the callback waits for NCCL's watchdog after the first step
    ddp: Mapping[str, Any] = field(default_factory=dict)  # the wrapper's settings, under DDP's own names
    expandable_segments: bool = False  # of PyTorch's allocator, as PYTORCH_ALLOC_CONF asked


@dataclass
class Settings:
    """Overrides of a run; ``assumed``: taken for granted; ``missing``: why there can be no prediction."""

    overrides: list[str]
    assumed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def trainer_settings(args: Any, facts: Facts, model_path: str, name: str, output_dir: str) -> Settings:
    """TrainingArguments (or anything with its attributes) and facts -> the settings of the run that is predicted.

    ``model_path``: the model's config.json. Raises nothing: what cannot be predicted is in ``missing``.
    """
    out = Settings(
        [
            *("engine=hf_trainer", "model=hf", f'model.path="{model_path}"', "model.random_weights=true"),
            *(f"name={name}", f'launch.output_dir="{output_dir}"', f"world_size={facts.world_size}", "tracker=none"),
            *(f"train.micro_batch_size={args.per_device_train_batch_size}", f"train.seq_len={facts.seq_len}"),
            f"train.gradient_accumulation_steps={args.gradient_accumulation_steps}",
            f"train.steps={facts.max_steps}",
            f"train.max_grad_norm={args.max_grad_norm if args.max_grad_norm else 'null'}",
            f"engine.batch_tensors={len(facts.batch_keys)}",
            f"engine.attention_mask={'true' if 'attention_mask' in facts.batch_keys else 'false'}",
        ]
    )
    if facts.device_type == "cpu":
        out.overrides.append("hardware=cpu")
    strategy = _strategy(facts, out)
    _precision(args, facts, strategy, out)
    _optimizer(args, facts, strategy, out)
    _model(args, facts, out)
    return out


def resolved(settings: Settings) -> RunConfig:
    """The run's configuration. What the lab refuses is left out of it, and there is no prediction then."""
    try:
        return load(settings.overrides)
    except ConfigError as error:
        settings.missing.append(str(error))
        return load([o for o in settings.overrides if o.split("=")[0].split(".")[0] in _ALWAYS])


def _strategy(facts: Facts, out: Settings) -> str:
    """The parallel option, with DeepSpeed's sizes where they are numbers."""
    stage = facts.deepspeed.get("zero_optimization", {}).get("stage", 0)
    strategy = f"zero{stage}" if facts.distributed_type == "DEEPSPEED" and stage else "fsdp"
    strategy = _STRATEGIES.get(facts.distributed_type, strategy)
    out.overrides.append(f"parallel={strategy}")
    if strategy == "ddp":  # the lab's own pause after the first step
        out.overrides.append(f"parallel.ddp.release_first_bucket={str(facts.release_first_bucket).lower()}")
        for key, value in facts.ddp.items():
            group = "engine" if key == "find_unused_parameters" else "parallel.ddp"
            out.overrides.append(f"{group}.{key}={str(value).lower()}")
    if facts.expandable_segments:
        out.overrides.append("train.expandable_segments=true")
    if strategy == "fsdp":
        out.missing.append(f"{facts.distributed_type} through a Trainer is not modelled")
    if strategy.startswith("zero"):
        zero = facts.deepspeed["zero_optimization"]
        for key in ("offload_optimizer", "offload_param"):
            if (zero.get(key) or {}).get("device", "none") != "none":
                out.missing.append(f"DeepSpeed's {key} is not modelled")
        known = read_option("parallel", strategy)["zero"]
        for key, value in zero.items():
            if key in known and isinstance(value, (bool, int, float)):
                out.overrides.append(f"parallel.zero.{key}={str(value).lower()}")
        if "optimizer" in facts.deepspeed:
            out.missing.append("an optimizer that DeepSpeed makes from its own configuration is not modelled")
    return strategy


def _precision(args: Any, facts: Facts, strategy: str, out: Settings) -> None:
    """bf16/fp16 arguments over fp32 parameters are mixed precision; half parameters are taken as pure."""
    half = facts.parameter_dtype in ("bfloat16", "float16")
    if strategy.startswith("zero"):
        sections = {k: (facts.deepspeed.get(k) or {}).get("enabled") for k in ("bf16", "fp16")}
        kind = next((f"{k}_mixed" for k, on in sections.items() if on), "fp32")
    elif half:
        kind = "bf16_pure"
        if args.bf16 or args.fp16:
            out.overrides.append("engine.autocast=true")
        if facts.parameter_dtype == "float16":
            out.assumed.append("float16 parameters take the memory of bfloat16 ones")
    else:
        kind = "bf16_mixed" if args.bf16 else "fp16_mixed" if args.fp16 else "fp32"
    out.overrides.append(f"precision={kind}")


def _optimizer(args: Any, facts: Facts, strategy: str, out: Settings) -> None:
    given = str(getattr(args.optim, "value", args.optim))
    if given not in _OPTIMIZERS:
        out.missing.append(f"optim={given} is not modelled")
        return
    kind, implementation = _OPTIMIZERS[given]
    if implementation is None:  # torch/optim/optimizer.py, _default_to_fused_or_foreach: foreach on GPUs only
        implementation = "foreach" if facts.device_type == "cuda" else "for_loop"
    if strategy.startswith("zero"):
        out.assumed.append("DeepSpeed is given one parameter group; the Trainer's two are padded each for itself")
    out.overrides += [f"optimizer={kind}", f"optimizer.implementation={implementation}"]
    out.overrides.append(f"optimizer.weight_decay={args.weight_decay}")
    if kind == "sgd":  # trainer_optimizer.py, _get_sgd: torch's own default but for optim_args
        given = getattr(args, "optim_args", None) or ""
        options = dict(option.replace(" ", "").split("=", 1) for option in given.split(",") if "=" in option)
        out.overrides.append(f"optimizer.momentum={options.get('momentum', 0)}")


def _model(args: Any, facts: Facts, out: Settings) -> None:
    """Checkpointing, attention, and everything that changes the model or its loss."""
    # 5.23 calls activation_checkpointing what 5.17 calls gradient_checkpointing.
    checkpointed, options = (
        getattr(args, f"activation_{name}", None) or getattr(args, f"gradient_{name}", None)
        for name in ("checkpointing", "checkpointing_kwargs")
    )
    out.overrides.append(f"checkpointing={'full' if checkpointed else 'none'}")
    if checkpointed and (options or {}).get("use_reentrant"):
        out.missing.append("reentrant checkpointing is not modelled: use_reentrant=False is")
    if facts.attention in _ATTENTION:
        out.overrides.append(f"attention={_ATTENTION[facts.attention]}")
    else:
        out.missing.append(f"attn_implementation={facts.attention} is not modelled")
    if facts.padded:
        out.assumed.append("batches without padding: the attention mask [b, 1, s, s] of padded ones is left out")
    if facts.input_gradients:
        out.overrides.append("engine.input_gradients=true")
    if facts.adapter is not None:
        _adapter(facts.adapter, out)
    if facts.quantization is not None:
        _quantization(facts.quantization, facts, out)
    for name, neutral in (("label_smoothing_factor", 0.0), ("torch_compile", False), ("use_liger_kernel", False)):
        if getattr(args, name, neutral) != neutral:
            out.missing.append(f"{name}={getattr(args, name)} is not modelled")
    if getattr(args, "neftune_noise_alpha", None):
        out.missing.append("neftune_noise_alpha is not modelled")
    if getattr(args, "n_gpu", 1) > 1:
        out.missing.append(
            "one process with several GPUs (torch.nn.DataParallel) is not modelled; start it by torchrun"
        )


def _adapter(config: Mapping[str, Any], out: Settings) -> None:
    """A peft LoraConfig; target_modules are names by now."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        out.missing.append(f"peft_type={kind} is not modelled")
        return
    unusual = ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "layers_to_transform")
    for key in (*unusual, "lora_bias", "trainable_token_indices"):
        if config.get(key):
            out.missing.append(f"{key} of a LoraConfig is not modelled")
    if config.get("bias", "none") != "none":
        out.missing.append("trained biases of a LoraConfig are not modelled")
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        out.missing.append("target_modules as a regular expression is not modelled")
        return
    out.overrides += [
        f"adapter={'dora' if config.get('use_dora') else 'lora'}",
        f"adapter.rank={config['r']}",
        f"adapter.alpha={config['lora_alpha']}",
        f"adapter.dropout={config['lora_dropout']}",
        f"adapter.target_modules=[{','.join(sorted(targets))}]",
    ]


def _quantization(config: Mapping[str, Any], facts: Facts, out: Settings) -> None:
    """A BitsAndBytesConfig; transformers leaves the head as it is."""
    if config.get("load_in_8bit"):
        out.overrides.append("quantization=int8")
    elif config.get("load_in_4bit"):
        double = "_double" if config.get("bnb_4bit_use_double_quant") else ""
        kind = f"{config.get('bnb_4bit_quant_type', 'fp4')}{double}"
        if kind not in ("nf4", "fp4", "nf4_double"):
            out.missing.append(f"quantization {kind} is not modelled")
            return
        compute = _DTYPES.get(str(config.get("bnb_4bit_compute_dtype")).removeprefix("torch."), "fp32")
        storage = _DTYPES.get(str(config.get("bnb_4bit_quant_storage")).removeprefix("torch."), "uint8")
        out.overrides += [f"quantization={kind}", f"quantization.compute_dtype={compute}"]
        out.overrides.append(f"quantization.storage_dtype={storage}")
    else:
        out.missing.append(f"quant_method={config.get('quant_method')} is not modelled")
        return
    upcast = "false" if facts.parameter_dtype in ("bfloat16", "float16") else "true"
    out.overrides.append(f"adapter.prepare_kbit={upcast}")
    skipped = config.get("llm_int8_skip_modules") or ["lm_head"]
    out.overrides.append(f"quantization.skip_modules=[{','.join(skipped)}]")
