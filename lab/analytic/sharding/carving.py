"""FSDP2's units as Accelerate makes them (1.15, utils/fsdp_utils.py, fsdp2_prepare_model).

Every block; then, of what a model shows of itself: its input embedding, and the tail, the final norm with the head,
which stays gathered after forward. With a tied head the embedding is the tail's. The root has the rest. The lab's own
decoder shows its final norm only; a transformers model all three.
"""

from __future__ import annotations

from lab.analytic.architecture import ParameterSpec
from lab.analytic.families.inventory import PREFIX, embedding_module
from lab.config import ModelConfig


class Carving:
    """Which unit holds a parameter; -1 is the root, a block's unit its index, and two more follow the blocks.

    ``first`` and ``last``: modules whose call opens and ends a unit's forward (_register_group_forward_hooks).
    ``looked_at``: weights of the embeddings, input and output, by which it sees whether they are tied.
    ``units``: in the order of named_modules, as the root's final callback comes to them.
    """

    def __init__(self, model: ModelConfig) -> None:
        count = model.num_layers
        self.tail, blocks = count, range(count)
        self.first, self.last = {"norm": count}, {"norm": count}
        self.members = dict(self.first)
        self.units, self.shard_order = [-1, *blocks, count], [*blocks, count, -1]
        self.zero_order = self.shard_order  # the root's gradients go with the last parameter, the head
        self.looked_at: tuple[str, ...] = ()
        if model.family == "lab":
            return
        norm = f"{PREFIX}transformer.ln_f" if model.family == "gpt2" else f"{PREFIX}model.norm"
        embedding, head, apart = embedding_module(model), f"{PREFIX}lm_head", count + 1
        self.looked_at = (f"{embedding}.weight", f"{head}.weight")
        if model.tied_head:
            self.first, self.last, self.members = {embedding: count}, {head: count}, {embedding: count, norm: count}
            self.units, self.zero_order = [-1, count, *blocks], [-1, *blocks, count]
            return
        self.first, self.last = {embedding: apart, norm: count}, {embedding: apart, head: count}
        self.members = {**self.first, head: count}
        self.units, self.shard_order = [-1, apart, *blocks, count], [*blocks, apart, count, -1]
        self.zero_order = [apart, -1, *blocks, count]

    def unit_of(self, spec: ParameterSpec) -> int:
        """By the module that holds it, an adapter's around that module too."""
        if spec.unit >= 0:
            return spec.unit
        return next((unit for module, unit in self.members.items() if spec.name.startswith(f"{module}.")), -1)
