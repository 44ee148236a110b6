"""ZeRO-3's modules, as its parameter coordinator sees them.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py; names are DeepSpeed's where there is one.
"""

from __future__ import annotations

from lab.analytic.sharding.zero3_gather import Sharded, by_ds_id


class Module:
    """A module and the parameters that it holds directly or reads of another module's (iter_params)."""

    __slots__ = ("by_index", "grads_remaining", "name", "numel", "params", "recomputed", "to_release")

    def __init__(self, name: str, params: list[Sharded]) -> None:
        self.name = name
        self.grads_remaining = 0  # ds_grads_remaining, of its inputs
        self.recomputed: dict[Sharded, None] = {}  # ds_recompute_parameters
        self.to_release: dict[int, list[Sharded]] = {}  # lru_cache of params_to_release, by place in the order
        self._hold(params)

    def _hold(self, params: list[Sharded]) -> None:
        self.params, self.numel = params, sum([p.numel for p in params])
        self.by_index = sorted(params, key=by_ds_id) if len(params) > 1 else params

    def add(self, p: Sharded) -> None:
        """register_external_parameter."""
        self._hold([*self.params, p])

    def take_recomputed(self) -> list[Sharded]:
        taken = list(self.recomputed)
        self.recomputed.clear()
        return taken


class Modules(dict[str, Module]):
    """By name; those that are not known hold nothing."""

    def __missing__(self, name: str) -> Module:
        module = self[name] = Module(name, [])
        return module
