"""Typed schema of every config group, as frozen dataclasses; one field, one comment with its unit.

The YAML folders under ``configs/`` have the same group and field names. Cross-field rules live in
``lab.config.rules``; this file only says which fields exist and which types they have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lab.vocab import AttentionBackend, Checkpointing, Precision, Strategy


@dataclass(frozen=True)
class HFConfig:
    """What only Hugging Face families have; read from config.json (lab/config/hf_config.py), never set by hand."""

    model_type: str = ""  # as config.json spells it
    activation: str = "silu"  # silu | gelu | gelu_new, or a name that the prediction does not know
    output_bias: bool = False  # bias of the attention's output projection; model.bias: of query, key and value
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMSNorm per head on query and key (Qwen3)
    sliding_window: int | None = None  # tokens; null: full attention
    full_layers: tuple[int, ...] = ()  # with a sliding window: the layers that attend fully all the same
    rope_type: str = "default"  # default | linear | llama3 | yarn | dynamic (recomputed in the forward)
    embedding_dropout: float = 0.0  # GPT-2's embd_pdrop; model.dropout is the attention weights'
    residual_dropout: float = 0.0  # GPT-2's resid_pdrop

    def slides(self, layer: int) -> bool:
        """Does this layer look at the last ``sliding_window`` tokens only?"""
        return self.sliding_window is not None and layer not in self.full_layers


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer: shapes and the options that matter for memory."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # elements per head; null in YAML: hidden_size / num_heads
    vocab_size: int
    max_seq_len: int  # rows of the learned position table; upper bound of train.seq_len
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    mlp: str = "swiglu"  # swiglu | gelu
    position: str = "rope"  # rope | learned
    bias: bool = False  # biases of the attention and MLP projections (and of LayerNorm)
    fused_qkv: bool = False  # one projection for query, key and value, as GPT-2's c_attn
    tied_head: bool = False  # output head shares the token embedding's weight
    dropout: float = 0.0  # after embedding, attention (weights and output) and MLP
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    # -- model=hf
    path: str | None = None  # folder, hub id or config.json
    random_weights: bool = False  # from config.json alone
    allow_pickle: bool = False  # read a checkpoint that exists as a pickle only
    family: str = "lab"  # lab | llama | mistral | qwen2 | qwen3 | gemma | gpt2 | other; from config.json
    hf: HFConfig = field(default_factory=HFConfig)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from. Tokenized with a byte-level BPE trained once and cached."""

    kind: str = "python_stdlib"  # python_stdlib | text | hf
    path: str | None = None  # glob of text files (kind=text); dataset id or folder (kind=hf)
    split: str = "train"  # kind=hf
    column: str = "text"  # kind=hf
    tokenizer_vocab_size: int = 8192  # entries; never more than model.vocab_size
    cache_dir: str = "outputs/.cache"
    max_bytes: int = 16_000_000  # bytes of text read at most


@dataclass(frozen=True)
class DDPOptions:
    """torch.nn.parallel.DistributedDataParallel: its own names and defaults; what the lab adds comes last."""

    bucket_cap_mb: float = 25.0  # MiB
    gradient_as_bucket_view: bool = False
    broadcast_buffers: bool = True
    static_graph: bool = False
    # Wait once, 1 s before DDP makes its buckets anew, until NCCL has let go of the first one (GPU).
    # Off here, for records from before it: there NCCL's watchdog, every 100 ms, decided.
    release_first_bucket: bool = False


@dataclass(frozen=True)
class ZeroOptions:
    """DeepSpeed's zero_optimization section: its own names and defaults (elements, not bytes)."""

    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None  # None: DeepSpeed's default, on for stage 3 only
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    round_robin_gradients: bool = False
    sub_group_size: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000


@dataclass(frozen=True)
class FSDPOptions:
    """torch.distributed.fsdp.fully_shard. One unit per block plus the root unit."""

    shard_size: int | None = None  # hsdp only: ranks in one shard group; null: world_size / 2
    reduce_dtype: str = "fp32"  # fp32 | param: dtype of the gradient reduce-scatter in mixed precision


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Strategy = Strategy.SINGLE
    ddp: DDPOptions = field(default_factory=DDPOptions)
    zero: ZeroOptions = field(default_factory=ZeroOptions)
    fsdp: FSDPOptions = field(default_factory=FSDPOptions)


@dataclass(frozen=True)
class PrecisionConfig:
    kind: Precision = Precision.BF16_MIXED
    tf32: bool = True  # TF32 matmuls for fp32 operands on GPUs that have them


@dataclass(frozen=True)
class CheckpointingConfig:
    kind: Checkpointing = Checkpointing.NONE
    every_k: int = 2  # kind=every_k: blocks 0, k, 2k, ... are checkpointed


@dataclass(frozen=True)
class AttentionConfig:
    backend: AttentionBackend = AttentionBackend.AUTO


@dataclass(frozen=True)
class LossConfig:
    kind: str = "cross_entropy"  # cross_entropy | no_upcast | in_place | chunked
    num_chunks: int = 8  # kind=chunked: token chunks whose logits exist one at a time


@dataclass(frozen=True)
class QuantizationConfig:
    """bitsandbytes Linear4bit and Linear8bitLt in place of the model's Linears; embeddings never."""

    kind: str = "none"  # none | int8 | fp4 | nf4 | nf4_double
    block_size: int = 64  # weights that share one absmax; the 4-bit kinds
    compute_dtype: str = "bf16"  # bf16 | fp16 | fp32: of the product, and of the weights before they are quantized
    storage_dtype: str = "uint8"  # uint8 | bf16 | fp16 | fp32: packed bytes seen as this type (FSDP needs a float)
    skip_modules: tuple[str, ...] = ("head", "lm_head")  # names or last parts of names of Linears that stay as they are


@dataclass(frozen=True)
class AdapterConfig:
    """peft adapters beside frozen weights."""

    kind: str = "none"  # none | lora | dora
    rank: int = 16
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.05  # of the adapter's input
    target_modules: tuple[str, ...] = ("all-linear",)  # all Linears but the head; or names, last parts of names
    train_embeddings: bool = False  # the token embedding is trained too, itself and not a copy
    prepare_kbit: bool = True  # upcast half-precision parameters beside a quantized base to fp32, as peft does
    save: bool = False  # write the trained adapter to the run folder's adapter/
    load: str | None = None  # folder of a saved adapter to start from
    allow_pickle: bool = False  # read an adapter that was saved as a pickle, which may run code


@dataclass(frozen=True)
class OptimizerConfig:
    kind: str = "adamw"  # adamw | sgd | adafactor | adamw_8bit | paged_adamw_8bit | paged_adamw_32bit | lion_8bit
    implementation: str = "fused"  # foreach | fused | for_loop
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.9  # sgd; 0 keeps no state
    min_8bit_size: int = 4096  # elements: smaller tensors keep fp32 states (bitsandbytes' 8-bit optimizers)


@dataclass(frozen=True)
class EngineConfig:
    kind: str = "native"  # native | accelerate | hf_trainer (predicted here, run by transformers.Trainer)
    accelerate_config: str | None = None  # kind=accelerate: a config file of `accelerate launch`
    batch_tensors: int = 3  # kind=hf_trainer: int64 [b, s] tensors of one batch (input_ids, attention_mask, labels)
    attention_mask: bool = True  # kind=hf_trainer: one of them is a mask, without padding
    find_unused_parameters: bool | None = None  # kind=hf_trainer: DDP's; null: as the Trainer asks for by itself
    input_gradients: bool = False  # kind=hf_trainer: enable_input_require_grads, as peft does for checkpointing
    autocast: bool = False  # kind=hf_trainer: autocast although the parameters are in half precision already


@dataclass(frozen=True)
class MeasureConfig:
    level: str = "counters"  # off | counters | ledger | snapshot
    ledger_steps: tuple[int, ...] = (0, -1)  # steps (negative: from the end) whose phase ends get a ledger


@dataclass(frozen=True)
class TrackerConfig:
    kind: str = "wandb"  # wandb | none
    mode: str = "auto"  # auto (online after a login, else offline) | offline | online
    project: str = "training-memory-lab"
    entity: str | None = None


@dataclass(frozen=True)
class HardwareConfig:
    """A row of the hardware table, ``configs/hardware/NAME.yaml``; each number there says how it was measured."""

    name: str  # auto: the row whose gpu_name NVML shows, else cpu
    device_type: str = "cpu"  # cpu | cuda
    gpu_name: str = ""  # as NVML spells it
    capacity_bytes: int = 0  # device memory that CUDA offers; 0: not known
    idle_bytes: int = 0  # device use that NVML shows on the idle card
    cuda_context_bytes: int = 0  # one process's CUDA context, cuBLAS and the kernels that training loads
    cudnn_bytes: int = 0  # cuDNN, where attention asks it
    cublas_workspace_bytes: int = 0  # per (handle, stream), through PyTorch's allocator
    cublaslt_workspace_bytes: int = 0  # per (handle, stream); 0: unified with cuBLAS's
    nccl_bytes: int = 0  # first communicator, outside PyTorch's allocator
    nccl_deepspeed_bytes: int = 0  # DeepSpeed's further communicators
    nccl_further_bytes: int = 0  # a second communicator: HSDP's shard and replicate groups, ZeRO-3 in fp16
    nccl_one_rank_bytes: int = 0  # a communicator of one rank that collectives ran on: DDP, DeepSpeed on one GPU
    nccl_one_rank_further_bytes: int = 0  # a second one of one rank
    nccl_idle_bytes: int = 0  # a communicator that none ran on: FSDP on one GPU
    bitsandbytes_int8_bytes: int = 0  # the cuBLAS handle that bitsandbytes makes for its first int8 product
    allocation_alignment_bytes: int = 1  # the caching allocator rounds sizes up to this (512 on CUDA)
    num_streaming_multiprocessors: int = 0  # sizes reductions' scratch memory (aten/native/cuda/Reduce.cuh)
    dense_bf16_flops: float = 0.0  # peak FLOP/s, for model FLOPs utilisation


@dataclass(frozen=True)
class LaunchConfig:
    """How `lab sweep` starts points."""

    timeout_s: float = 1800.0  # seconds per point
    output_dir: str = "outputs"


@dataclass(frozen=True)
class TrainConfig:
    micro_batch_size: int = 1  # sequences per rank and forward pass
    seq_len: int = 256  # tokens per sequence
    gradient_accumulation_steps: int = 1
    steps: int = 5  # optimizer steps
    warmup_steps: int = 0  # optimizer steps of linear learning-rate warm-up
    max_grad_norm: float | None = None  # null: no clipping
    compile: bool = False  # torch.compile; memory then not modelled
    memory_limit_gib: float | None = None  # GiB that PyTorch's allocator may reserve, each rank; null: no limit
    expandable_segments: bool = False  # PyTorch's allocator grows segments instead of adding some


@dataclass(frozen=True)
class RunConfig:
    """One run, complete and consistent: what `resolve` returns and everything else takes."""

    name: str
    seed: int
    world_size: int
    train: TrainConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    checkpointing: CheckpointingConfig
    attention: AttentionConfig
    loss: LossConfig
    quantization: QuantizationConfig
    adapter: AdapterConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    measure: MeasureConfig
    tracker: TrackerConfig
    hardware: HardwareConfig
    launch: LaunchConfig
    choices: dict[str, str] = field(default_factory=dict)  # Hydra's group choices
    overrides: tuple[str, ...] = ()  # as given on the command line

    @property
    def dp_degree(self) -> int:
        """Data-parallel ranks; every strategy of today is data parallel."""
        return self.world_size

    @property
    def vocab_size_is_ambiguous(self) -> bool:
        """Do other saved tensors have rows as long as the logits' (written-out attention weights, for one)?"""
        m = self.model
        widths = [m.hidden_size, m.intermediate_size, m.num_heads * m.head_dim]
        if self.attention.backend in (AttentionBackend.EAGER, AttentionBackend.MATH):
            widths.append(self.train.seq_len)
        return m.vocab_size in widths

    @property
    def is_unwrapped_ddp(self) -> bool:
        """Accelerate puts no DDP around a model that one process trains on a GPU (accelerator.py, multi_device)."""
        alone = self.parallel.strategy is Strategy.DDP and self.world_size == 1
        return alone and self.engine.kind == "accelerate" and self.hardware.device_type == "cuda"

    @property
    def ddp_finds_unused(self) -> bool:
        """Does transformers.Trainer tell DDP to look for unused parameters (_build_accelerator_args)?

        By itself unless blocks are checkpointed; of a peft model, which is no PreTrainedModel, always.
        """
        if self.parallel.strategy is not Strategy.DDP or self.engine.kind != "hf_trainer":
            return False
        asked = self.engine.find_unused_parameters
        by_itself = self.checkpointing.kind is Checkpointing.NONE or self.adapter.kind != "none"
        return by_itself if asked is None else asked

    @property
    def memory_limit_bytes(self) -> int | None:
        """What PyTorch's allocator may reserve on a rank's GPU; None: as much as there is."""
        gib = self.train.memory_limit_gib
        return None if gib is None else int(gib * (1 << 30))

    @property
    def fsdp_shard_size(self) -> int:
        """Ranks over which FSDP shards one unit."""
        if self.parallel.strategy is Strategy.HSDP:
            return self.parallel.fsdp.shard_size or max(self.world_size // 2, 1)
        return self.world_size

    @property
    def tokens_per_step(self) -> int:
        t = self.train
        return t.micro_batch_size * t.seq_len * t.gradient_accumulation_steps * self.world_size
