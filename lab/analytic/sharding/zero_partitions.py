"""How DeepSpeed's stages 1 and 2 cut the parameters: a flat group, equal partitions, slices. Sizes in elements.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py. The client optimizer has one parameter group, so there is
one flat group. ``parameter_alignment`` is off, its default: nothing is padded between parameters.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

from lab.analytic.architecture import ParameterSpec

NCCL_START_ALIGNMENT_FACTOR = 2  # elements; DeepSpeedZeroOptimizer.nccl_start_alignment_factor


def round_robin(specs: Sequence[ParameterSpec], world: int) -> list[ParameterSpec]:
    """``round_robin_gradients`` (_round_robin_reorder): parameter i goes to list i mod N, lists one after another."""
    return [specs[i] for first in range(world) for i in range(first, len(specs), world)]


class FlatGroup:
    """bit16_groups_flat: all parameters side by side, zeros up to a multiple of 2 * world_size, N equal partitions.

    numel = ceil(sum / (2 N)) * 2 N (flatten_dense_tensors_aligned); partition_numel = numel / N. A partition's
    ``members`` are the parameters that overlap it (get_partition_info): whole parameters, also those of which
    another rank owns a part.
    """

    def __init__(self, specs: Sequence[ParameterSpec], world: int, reorder: bool) -> None:
        self.world = world
        self.place = {spec.name: i for i, spec in enumerate(specs)}  # in the model
        self.order = round_robin(specs, world) if reorder else list(specs)
        self.start: dict[str, int] = {}
        end = 0
        for spec in self.order:
            self.start[spec.name] = end
            end += spec.numel
        alignment = NCCL_START_ALIGNMENT_FACTOR * world
        self.numel = -(-end // alignment) * alignment
        self.partition_numel = self.numel // world
        self._starts = list(self.start.values())
        self._ends = [self.start[spec.name] + spec.numel for spec in self.order]
        self._owners: dict[str, list[tuple[int, int]]] = {}
        self._members: dict[int, list[ParameterSpec]] = {}

    def owners(self, spec: ParameterSpec) -> list[tuple[int, int]]:
        """(partition, elements of ``spec`` in it), ascending: grad_start_offset's slices in average_tensor."""
        found = self._owners.get(spec.name)
        if found is None:
            found = self._owners[spec.name] = self._find_owners(spec)
        return found

    def _find_owners(self, spec: ParameterSpec) -> list[tuple[int, int]]:
        start, size = self.start[spec.name], self.partition_numel
        end = start + spec.numel
        return [(r, min(end, (r + 1) * size) - max(start, r * size)) for r in range(start // size, -(-end // size))]

    def members(self, rank: int) -> list[ParameterSpec]:
        """params_in_partition of one rank, in flat order."""
        if rank not in self._members:
            low, high = rank * self.partition_numel, (rank + 1) * self.partition_numel
            self._members[rank] = self.order[bisect_right(self._ends, low) : bisect_left(self._starts, high)]
        return self._members[rank]

    def slices(self, rank: int) -> list[int]:
        """Elements of each member that fall into the rank's partition; they sum to the partition less its padding."""
        low, high = rank * self.partition_numel, (rank + 1) * self.partition_numel
        starts = [self.start[s.name] for s in self.members(rank)]
        return [
            min(start + s.numel, high) - max(start, low) for s, start in zip(self.members(rank), starts, strict=True)
        ]

    def reduced_slices(self, specs: Iterable[ParameterSpec]) -> list[int]:
        """Slices of a bucket as average_tensor lists them: neighbours with one owner are one slice."""
        sizes: list[int] = []
        previous = -1
        for spec in specs:
            for rank, numel in self.owners(spec):
                if rank == previous:
                    sizes[-1] += numel
                else:
                    sizes.append(numel)
                previous = rank
        return sizes

    def early_and_large(self, backward_order: bool, kept: Callable[[int], int]) -> list[int]:
        """Ranks of which no other keeps as much gradient as early: one of them has the highest peak of backward.

        The rest of the memory is the same on every rank and falls as gradients are reduced, so the rank whose first
        own gradient is reduced first needs most, unless a later one keeps more. ``backward_order``: gradients are
        reduced as they are made, the last parameter's first; else in the parameters' order. ``kept``: by rank.
        """

        def first_own(rank: int) -> int:
            places = [self.place[s.name] for s in self.members(rank)]
            return -max(places, default=-1) if backward_order else min(places, default=len(self.place))

        found: list[int] = []
        for rank in sorted(range(self.world), key=lambda r: (first_own(r), -kept(r), -r)):
            if not found or kept(rank) > kept(found[-1]):
                found.append(rank)
        return found
