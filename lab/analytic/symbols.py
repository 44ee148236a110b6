"""Symbols of the formulas that ``lab explain`` shows, and their values for one run.

======  ==========================================================  ========================================
b, s    micro-batch size, tokens per sequence                       h, f: hidden, intermediate size
n, k    query heads, key/value heads                                d: elements per head
v       vocabulary                                                  c: tokens whose logits exist at once
psi     all parameters that are trained                             w: the named parameter, w0 x w1 = w
N, G    ranks; ranks that share one FSDP shard group                e: bytes per element in matmuls
S, S_i  ZeRO-3: sum over parameters of cdiv(w, N); of sub-group i   U: FSDP unit's padded shard, elements
B       reduce_bucket_size                                          T: parameter tensors
W       cuBLAS workspace, bytes; W_lt: cuBLASLt's                   steps: optimizer steps of the run
r       adapter.rank                                                Q: quantization.block_size
r_e     partial segments of the embedding's gradient                r_p: of the position table's
======  ==========================================================  ========================================

``cdiv(a, b)`` = ceil(a / b); ``up(a, m)`` = a rounded up to a multiple of m.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import cache

from lab.analytic.architecture import ParameterSpec
from lab.analytic.inventory import trainable
from lab.analytic.sharding.carving import Carving
from lab.config import RunConfig
from lab.vocab import Precision

Values = Mapping[str, tuple[int, ...]]
"""Symbol -> what it may stand for (one value, except c, U and S_i)."""

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[[int, int], int]] = {
    "cdiv": lambda a, b: -(-a // b),
    "up": lambda a, m: -(-a // m) * m,
    "min": min,
}


@cache
def _parsed(formula: str) -> tuple[ast.expr, tuple[str, ...]]:
    tree = ast.parse(formula, mode="eval").body
    names = (n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id not in _FUNCTIONS)
    return tree, tuple(dict.fromkeys(names))


def names_in(formula: str) -> tuple[str, ...]:
    """Symbols of a formula, each once."""
    return _parsed(formula)[1]


def evaluations(formula: str, values: Values) -> Iterator[tuple[int, dict[str, int]]]:
    """(value, symbols used) for every choice of a symbol with several values; nothing if a symbol has none."""
    tree, names = _parsed(formula)
    if any(not values.get(name) for name in names):
        return
    several = next((name for name in names if len(values[name]) > 1), None)
    for choice in values[several] if several else (0,):
        used = {name: choice if name == several else values[name][0] for name in names}
        yield _evaluate(tree, used), used


def _evaluate(tree: ast.expr, used: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return used[tree.id]
    if isinstance(tree, ast.BinOp):
        return _OPERATORS[type(tree.op)](_evaluate(tree.left, used), _evaluate(tree.right, used))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        first, second = (_evaluate(a, used) for a in tree.args)
        return _FUNCTIONS[tree.func.id](first, second)
    raise ValueError(f"not a formula: {ast.unparse(tree)}")


def values_of(cfg: RunConfig) -> dict[str, tuple[int, ...]]:
    """Every symbol but w, w0 and w1, which depend on the parameter (``with_parameter``)."""
    m, t, zero = cfg.model, cfg.train, cfg.parallel.zero
    specs, world, group = trainable(cfg), cfg.world_size, cfg.fsdp_shard_size
    rows = t.micro_batch_size * t.seq_len
    chunk = rows if cfg.loss.kind != "chunked" else -(-rows // cfg.loss.num_chunks)
    shards = [-(-s.numel // world) for s in specs]
    single = {"b": t.micro_batch_size, "s": t.seq_len, "h": m.hidden_size, "f": m.intermediate_size}
    single |= {"n": m.num_heads, "k": m.num_kv_heads, "d": m.head_dim, "v": m.vocab_size, "steps": t.steps}
    single |= {"psi": sum(s.numel for s in specs), "N": world, "G": group, "S": sum(shards), "T": len(specs)}
    single |= {"r": cfg.adapter.rank, "Q": cfg.quantization.block_size}
    single |= {"B": zero.reduce_bucket_size, "e": 4 if cfg.precision.kind is Precision.FP32 else 2}
    single |= {"W": cfg.hardware.cublas_workspace_bytes, "W_lt": cfg.hardware.cublaslt_workspace_bytes}
    single["r_e"] = rows // 10 + min(rows, m.vocab_size)
    single["r_p"] = t.seq_len // 10 + min(t.seq_len, m.max_seq_len)
    values: dict[str, tuple[int, ...]] = {name: (value,) for name, value in single.items()}
    values["c"] = (chunk, rows % chunk) if rows % chunk else (chunk,)
    values["U"] = _unit_numels(specs, group, Carving(m) if cfg.engine.kind == "accelerate" else None)
    values["S_i"] = tuple(_sub_groups(shards, zero.sub_group_size))
    return values


def with_parameter(values: Values, spec: ParameterSpec | None) -> Values:
    """The symbols with those of one parameter."""
    if spec is None:
        return values
    rows = spec.shape[0]
    return {**values, "w": (spec.numel,), "w0": (rows,), "w1": (spec.numel // rows,)}


def _padded(spec: ParameterSpec, group: int) -> int:
    rows = spec.shape[0]
    return -(-rows // group) * (spec.numel // rows)


def _unit_numels(specs: list[ParameterSpec], group: int, carving: Carving | None) -> tuple[int, ...]:
    """Padded shards of a block and of the root; Accelerate makes further units, after the last block."""
    indices = [0, -1, *((carving.tail, carving.tail + 1) if carving else ())]
    unit_of = carving.unit_of if carving else lambda s: s.unit
    units = [[s for s in specs if unit_of(s) == index] for index in indices]
    return tuple(sum(_padded(s, group) for s in unit) for unit in units if unit)


def _sub_groups(shards: list[int], size: int) -> list[int]:
    """Elements of ZeRO-3's sub-groups: one closes once it holds ``size`` (_create_fp16_sub_groups)."""
    sums = [0]
    for numel in shards:
        if sums[-1] >= size:
            sums.append(0)
        sums[-1] += numel
    return sums
