"""fsdp, fsdp_grad_op, hsdp: PyTorch's FSDP2 (``fully_shard``), one unit per block and the root unit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lab.config import RunConfig
from lab.parallel.engine import LiveTensor, cached_tensors, optimizer_state_tensors, quantized_tensors
from lab.parallel.materialise import initial_value, materialise, materialise_buffers, slots
from lab.parallel.torch_step import TorchStep
from lab.transforms.precision import compute_dtype
from lab.vocab import MemoryCategory, Precision, Strategy


def device_mesh(cfg: RunConfig, device: torch.device) -> DeviceMesh:
    """1-d mesh to shard over; hsdp: (replicate, shard), neighbouring ranks shard together."""
    if cfg.parallel.strategy is Strategy.HSDP:
        size = cfg.fsdp_shard_size
        return init_device_mesh(device.type, (cfg.world_size // size, size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (cfg.world_size,), mesh_dim_names=("shard",))


def mixed_precision_policy(cfg: RunConfig) -> MixedPrecisionPolicy:
    """Parameters are gathered in the compute dtype; gradients reduced in fp32 or in that dtype."""
    if cfg.precision.kind in (Precision.FP32, Precision.BF16_PURE):
        return MixedPrecisionPolicy()
    reduce_dtype = torch.float32 if cfg.parallel.fsdp.reduce_dtype == "fp32" else None
    return MixedPrecisionPolicy(param_dtype=compute_dtype(cfg), reduce_dtype=reduce_dtype)


class FSDPEngine(TorchStep):
    """Sharded fp32 (bf16_pure: bf16) parameters, gradients and states; whole parameters while a unit runs.

    Every micro-step reduce-scatters, FSDP2's default: gradients accumulate sharded, N times smaller.
    set_requires_gradient_sync(False) before the last would keep whole fp32 gradients instead.
    """

    def __init__(self, cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.num_parameters = sum(p.numel() for p in model.parameters())
        quantized = cfg.quantization.kind != "none"
        self.model = _shard(cfg, model, device, materialised=quantized)
        if not quantized:
            _initialise_shards(cfg, self.model, device)
        # The sharded parameters, kept here because a gathered unit shows its whole ones instead.
        self.shards = [p for p in self.model.parameters() if isinstance(p, DTensor)]
        self.make_optimizer([p for p in self.shards if p.requires_grad], device)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens, targets)
        return loss

    def live_tensors(self) -> Iterator[LiveTensor]:
        for shard in self.shards:
            yield MemoryCategory.PARAMETERS, _local(shard)
            if shard.grad is not None:
                yield MemoryCategory.GRADIENTS, _local(shard.grad)
        for parameter in recast_parameters(self.model):
            yield MemoryCategory.PARAMETERS, parameter
        for parameter in self.model.parameters():  # whole ones, in units that are gathered now
            if not isinstance(parameter, DTensor):
                yield MemoryCategory.GATHERED_PARAMETERS, parameter.data
        for gradient in whole_gradients(self.model):
            yield MemoryCategory.GRADIENTS, gradient
        for tensor in optimizer_state_tensors(self.optimizer, self.device):
            yield MemoryCategory.OPTIMIZER_STATES, _local(tensor)
        yield from cached_tensors(self.model)
        yield from quantized_tensors(self.model)

    def unseen_allocations(self) -> Iterator[tuple[MemoryCategory, int]]:
        return iter(())

    def close(self) -> None:
        self.drop_states()
        self.shards = []
        self.model = nn.Module()


def recast_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Whole parameters whose data are no longer what was gathered: bitsandbytes' Linear4bit casts its bias for good."""
    for unit in model.modules():
        group = unit._get_fsdp_state()._fsdp_param_group if isinstance(unit, FSDPModule) else None
        for member in group.fsdp_params if group else ():
            whole = getattr(member, "_unsharded_param", None)
            if whole is not None and whole.dtype != (member.param_dtype or member.orig_dtype):
                yield _local(whole.data)


def whole_gradients(model: nn.Module) -> Iterator[Tensor]:
    """Gradients that are not reduced yet, of every unit, gathered or not: ``no_sync`` keeps them over micro-steps.

    The model's parameters show those of gathered units only. Source: torch/distributed/fsdp/_fully_shard (2.11 and
    2.13), _fsdp_param.py: ``_unsharded_param``, made by the first all-gather, keeps its ``.grad``;
    ``unsharded_accumulated_grad`` takes its place where gradients are reduced in another dtype.
    """
    for unit in model.modules():
        group = unit._get_fsdp_state()._fsdp_param_group if isinstance(unit, FSDPModule) else None
        for member in group.fsdp_params if group else ():
            whole = getattr(member, "_unsharded_param", None)
            for gradient in (member.unsharded_accumulated_grad, whole.grad if whole is not None else None):
                if gradient is not None:
                    yield _local(gradient)


def _shard(cfg: RunConfig, model: nn.Module, device: torch.device, materialised: bool) -> nn.Module:
    """fully_shard of every block and the root. ``materialised``: each unit gets its values first, whole.

    So quantized ones: what is cut is a weight's packed bytes, [elements, 1], with its quantization state on every
    rank. FSDP2 makes plain parameters of them; Linear4bit finds the state on the module
    (fix_4bit_weight_quant_state_from_module).
    """
    mesh, policy = device_mesh(cfg, device), mixed_precision_policy(cfg)
    reshard = cfg.parallel.strategy is not Strategy.FSDP_GRAD_OP
    blocks = model.get_submodule("blocks")
    for block in blocks.children():
        if materialised:
            _materialise_unit(cfg, model, block, device)
        if cfg.train.compile:  # the forward only: FSDP's hooks stay outside the graph
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root (embedding, final norm, head) keeps FSDP2's default: gathered from forward to backward.
    if materialised:
        _materialise_unit(cfg, model, model, device)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _materialise_unit(cfg: RunConfig, model: nn.Module, unit: nn.Module, device: torch.device) -> None:
    members = {id(p) for p in unit.parameters()}
    for _ in materialise(model, cfg.seed, cfg.model.num_layers, device, only=members):
        pass


def _initialise_shards(cfg: RunConfig, model: nn.Module, device: torch.device) -> None:
    """Allocate the local shards and cut each whole initial parameter to size, without communication."""
    tied = slots(model)  # before to_empty, which makes a new tensor for every place
    model.to_empty(device=device)
    materialise_buffers(model, device, only_meta=False)
    for slot in tied:
        module, leaf = slot.places[0]
        slot.put(getattr(module, leaf))
        parameter = slot.parameter
        if not isinstance(parameter, DTensor):
            raise TypeError(f"{slot.name}: not sharded by fully_shard")
        value = initial_value(slot, cfg.seed, cfg.model.num_layers, device).to(parameter.dtype)
        cut = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with torch.no_grad():
            parameter.to_local().copy_(cut.to_local())


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
