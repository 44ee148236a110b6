"""Every predicted byte at one moment of the steady step: the tensor, its formula with its numbers, the source.

The replay is the one behind ``predict``, so the total is that prediction's to the byte. What is added is read off the
events: which storages are live at the moment, in which block each was made, and what the label says of it
(``lab.analytic.sources``).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab.analytic.architecture import ParameterSpec
from lab.analytic.expandable import allocator_of
from lab.analytic.families.names import in_lab_words
from lab.analytic.inventory import inventory
from lab.analytic.optimizers_8bit import PAGED_FROM
from lab.analytic.simulation import Simulation, settle
from lab.analytic.sources import NAMED, parameter_of, source_of
from lab.analytic.step import Replay
from lab.analytic.symbols import Values, evaluations, values_of, with_parameter
from lab.analytic.tape import ALLOC, FREE, MOVE, Tensor
from lab.analytic.timeline import spans_of, totals
from lab.config import RunConfig
from lab.vocab import MemoryBreakdown, MemoryCategory, StepPhase

PEAK = "peak"
MOMENTS = (*(p.value for p in StepPhase if p is not StepPhase.BUILD), PEAK)
# Optimizer states that are made one per parameter, or per parameter of a kind (_made_for).
_TORCH_STATES = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer", "row_var", "col_var", "variance")
_PER_PARAMETER = (*_TORCH_STATES, "state1", "state2", "absmax1", "absmax2")


@dataclass
class Item:
    """Live storages that differ by their layer only."""

    category: MemoryCategory
    label: str  # blocks.* where the label names a block
    module: str
    what: str
    formula: str | None  # elements; None: the size follows from the order of events
    numbers: str | None  # the formula with its numbers
    elements: int | None
    itemsize: int | None  # bytes per element; None: hidden by the allocator's rounding
    reference: str
    tensor_bytes: int  # one storage's bytes, rounded up to the allocator's alignment
    count: int = 0
    total_bytes: int = 0  # of the allocator's blocks, which may exceed count * tensor_bytes
    layers: list[int] = field(default_factory=list)


@dataclass
class Explanation:
    """All bytes at ``at``; items, categories, modules, and layers plus what lies outside them sum to the total."""

    at: str
    phase: StepPhase  # in which the moment lies
    rank: int
    total_bytes: int
    items: list[Item]
    categories: MemoryBreakdown
    modules: dict[str, int]
    layers: dict[int, int]
    outside_layers_bytes: int
    rounding_bytes: int  # blocks larger than elements x bytes per element, where those are known
    unknown_labels: list[str]


class _LayeredReplay(Replay):
    """Notes the events during which each block ran, in forward and in recomputation."""

    spans: list[tuple[int, int, int]]

    def build(self) -> None:
        super().build()
        self.spans = []
        name = "block" if self.cfg.model.family == "lab" else "layer"
        run = getattr(self.decoder, name)

        def noted(i: int, *arguments: Any) -> Tensor:
            events = self.trace.events
            start = len(events)
            try:
                out: Tensor = run(i, *arguments)
                return out
            finally:
                self.spans.append((start, len(events), i))

        setattr(self.decoder, name, noted)


@dataclass
class Live:
    """One storage that is live at the moment."""

    ident: int
    made_at: int  # event index
    category: MemoryCategory
    label: str
    tensor_bytes: int
    block_bytes: int


@dataclass
class _Moment:
    replay: _LayeredReplay
    index: int
    phase: StepPhase
    rank: int
    total_bytes: int
    sizes: Sequence[int] | None


def explain(cfg: RunConfig, at: str = PEAK) -> Explanation:
    """Every byte of the worst rank at a phase's end or at the step's peak; ``at`` is one of MOMENTS."""
    if at not in MOMENTS:
        raise ValueError(f"{at}: one of {', '.join(MOMENTS)}")
    found = max((_moment(cfg, rank, at) for rank in Replay(cfg).rule.ranks()), key=lambda m: m.total_bytes)
    items, rounding, unknown = _items(cfg, found)
    modules: dict[str, int] = defaultdict(int)
    categories = MemoryBreakdown()
    layers: dict[int, int] = defaultdict(int)
    for item, blocks in items:
        modules[item.module] += item.total_bytes
        categories[item.category] += item.total_bytes
        for layer, size in blocks:
            if layer is not None:
                layers[layer] += size
    total = sum(item.total_bytes for item, _ in items)
    ordered = sorted(
        (item for item, _ in items), key=lambda i: (list(MemoryCategory).index(i.category), -i.total_bytes)
    )
    return Explanation(
        at=at,
        phase=found.phase,
        rank=found.rank,
        total_bytes=total,
        items=ordered,
        categories=categories,
        modules=dict(sorted(modules.items(), key=lambda m: -m[1])),
        layers=dict(sorted(layers.items())),
        outside_layers_bytes=total - sum(layers.values()),
        rounding_bytes=rounding,
        unknown_labels=unknown,
    )


def _moment(cfg: RunConfig, rank: int, at: str) -> _Moment:
    """The event after which the moment is read, on one rank."""
    replay = _LayeredReplay(cfg, rank)
    replay.build()
    for _ in range(min(replay.rule.steady_step + 1, cfg.train.steps)):
        replay.step()
    sizes: Sequence[int] | None = None
    if replay.gpu:
        simulation = Simulation(allocator_of(cfg)())
        settle(replay, simulation)
        sizes = simulation.block_bytes
    events, steady = replay.trace.events, replay.done - 1
    curve = totals(events, sizes)
    spans = spans_of(events, steady)
    if at == PEAK:
        index, phase = max(
            ((i, p) for p, first, last in spans for i in range(first, last + 1)), key=lambda pair: curve[pair[0]]
        )
    else:  # the last micro-step's end, as in timeline.phases
        phase = StepPhase(at)
        index = [last for p, _, last in spans if p is phase][-1]
    return _Moment(replay, index, phase, rank, curve[index], sizes)


def peak_blocks(cfg: RunConfig, rank: int) -> list[Live]:
    """Storages that are live at the steady step's peak on one rank; sizes as requested, rounded up."""
    found = _moment(cfg, rank, PEAK)
    return live_at(found.replay, found.index, found.sizes)


def live_at(replay: Replay, index: int, sizes: Sequence[int] | None) -> list[Live]:
    """Storages that are live after the event at ``index``, in the order in which they were made."""
    live: dict[int, Live] = {}
    for i, (kind, ident, nbytes, category, label, _) in enumerate(replay.trace.events[: index + 1]):
        if kind == ALLOC:
            block = nbytes if sizes is None else sizes[ident]
            live[ident] = Live(ident, i, MemoryCategory(category), in_lab_words(label), nbytes, block)
        elif kind == FREE:
            del live[ident]
        elif kind == MOVE:
            live[ident].category = MemoryCategory(category)
    return list(live.values())


_Blocks = list[tuple[int | None, int]]  # (layer, bytes) per storage


def _items(cfg: RunConfig, found: _Moment) -> tuple[list[tuple[Item, _Blocks]], int, list[str]]:
    """Items with their storages' layers, bytes lost to rounding, labels that the table does not know."""
    groups: dict[tuple[object, ...], tuple[Item, _Blocks]] = {}
    unknown: set[str] = set()
    rounding = 0
    for storage, layer, item in described(cfg, found.replay, live_at(found.replay, found.index, found.sizes)):
        if source_of(storage.label) is None:
            unknown.add(item.label)
        key = (item.category, item.label, item.module, item.formula, item.itemsize, item.tensor_bytes)
        group, blocks = groups.setdefault(key, (item, []))
        group.count += 1
        group.total_bytes += storage.block_bytes
        blocks.append((layer, storage.block_bytes))
        if layer is not None and layer not in group.layers:
            group.layers.append(layer)
        if item.elements is not None and item.itemsize is not None:
            rounding += storage.block_bytes - item.elements * item.itemsize
    return list(groups.values()), rounding, sorted(unknown)


def described(
    cfg: RunConfig, replay: _LayeredReplay, storages: Sequence[Live]
) -> Iterator[tuple[Live, int | None, Item]]:
    """(storage, layer, what it is). The layer is None for what belongs to no block or to all of them."""
    values = values_of(cfg)
    specs = {in_lab_words(s.name): s for s in inventory(cfg)}
    owners = {ident: in_lab_words(name) for ident, name in _owners(replay).items()}
    layer_at = _layer_finder(replay.spans)
    for storage in storages:
        rule = source_of(storage.label)
        name = parameter_of(storage.label) or owners.get(storage.ident)
        named = with_parameter(values, specs.get(name) if name else None)
        formulas = rule.formulas if rule else ()
        closed = _close(formulas, rule.itemsize if rule else None, storage.tensor_bytes, named, replay.trace.alignment)
        formula, numbers, elements, itemsize, used = closed or (None, None, None, rule.itemsize if rule else None, {})
        module, layer = _place(rule.module if rule else NAMED, name, storage.label)
        if module == NAMED:
            module = (
                "root unit" if used.get("U") == values["U"][-1] else "blocks.*" if "U" in used else "all parameters"
            )
        if layer is None and module.startswith("blocks."):
            layer = layer_at(storage.made_at)
        item = Item(
            category=storage.category,
            label=re.sub(r"blocks\.\d+", "blocks.*", storage.label),
            module=module,
            what=rule.what if rule else "",
            formula=formula,
            numbers=numbers,
            elements=elements,
            itemsize=itemsize,
            reference=rule.reference if rule else "",
            tensor_bytes=storage.tensor_bytes,
        )
        yield storage, layer, item


def _owners(replay: Replay) -> dict[int, str]:
    """Storage -> parameter, for optimizer state that was made one tensor per parameter, in their order."""
    made: dict[str, list[int]] = {label: [] for label in _PER_PARAMETER}
    for kind, ident, _, _, label, _ in replay.trace.events:
        if kind == ALLOC and label in made:
            made[label].append(ident)
    owners: dict[int, str] = {}
    for label, idents in made.items():
        names = [s.name for s in replay.rule.stepped() if _made_for(label, s, replay.cfg)]
        if len(idents) == len(names):
            owners.update(zip(idents, names, strict=True))
    return owners


def _made_for(label: str, spec: ParameterSpec, cfg: RunConfig) -> bool:
    """Whether a parameter has this state in an allocation of its own."""
    if label in ("row_var", "col_var", "variance"):
        return (len(spec.shape) > 1) != (label == "variance")
    if label.startswith("absmax"):
        return spec.numel >= cfg.optimizer.min_8bit_size
    paged = cfg.optimizer.kind.startswith("paged_") and cfg.hardware.device_type == "cuda"
    return not (paged and label.startswith("state") and spec.numel >= PAGED_FROM)


def _layer_finder(spans: list[tuple[int, int, int]]) -> Callable[[int], int | None]:
    """Event index -> the block that ran then; blocks do not nest."""
    ordered = sorted(spans)
    starts = [start for start, _, _ in ordered]

    def layer_at(event: int) -> int | None:
        place = bisect_right(starts, event) - 1
        return ordered[place][2] if place >= 0 and event < ordered[place][1] else None

    return layer_at


def _place(module: str, parameter: str | None, label: str) -> tuple[str, int | None]:
    """(module without its layer, layer)."""
    text = parameter.rpartition(".")[0] if parameter else label
    block = re.match(r"blocks\.(\d+)\.([a-z_]+)", text)
    layer = int(block[1]) if block else None
    if module != NAMED:
        return module, layer
    if block:
        return f"blocks.*.{block[2]}", layer
    if parameter:
        return text, None
    return ("norm", None) if label.startswith("norm") else (NAMED, None)


def _close(
    formulas: Sequence[str], itemsize: int | None, nbytes: int, values: Values, alignment: int
) -> tuple[str, str, int, int | None, dict[str, int]] | None:
    """The first formula that gives ``nbytes`` after rounding: text, with numbers, elements, element size, symbols.

    The element size is None where the rounding hides it: several sizes give the same bytes (a scalar on a GPU).
    """
    sizes = (itemsize,) if itemsize else (8, 4, 2, 1)
    for formula in formulas:
        for elements, used in evaluations(formula, values):
            fitting = [size for size in sizes if -(-elements * size // alignment) * alignment == nbytes]
            if fitting:
                return formula, _with_numbers(formula, used), elements, fitting[0] if len(fitting) == 1 else None, used
    return None


def _with_numbers(formula: str, used: Mapping[str, int]) -> str:
    """'b * s' -> '4 * 2048'; names of functions stay."""
    return re.sub(r"[A-Za-z_]\w*", lambda match: str(used.get(match[0], match[0])), formula)
