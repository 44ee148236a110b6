"""Every Linear of a model: plain, quantized, with an adapter or both. The one seam for all families."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from lab.analytic.adapters import lora
from lab.analytic.dora import MAGNITUDE, DoraLayer, dora
from lab.analytic.ops import Ops, Parameter
from lab.analytic.quantization import linear_4bit, linear_int8
from lab.analytic.tape import Tensor
from lab.config import RunConfig


class ModuleHooks(Protocol):
    """What a strategy does around a module's call."""

    def enter(self, module: str, x: Tensor) -> Tensor: ...
    def leave(self, module: str, y: Tensor) -> Tensor: ...


Plain = Callable[[Tensor, str, str], Tensor]


class Linears:
    """``linears(x, name, label, rows)`` is module ``name`` applied to x [rows, in].

    A weight that was quantized says so itself (``Parameter.quantized``); a module has an adapter if
    ``NAME.lora_A.weight`` is among the parameters. ``label`` names the output in the trace.
    """

    def __init__(self, cfg: RunConfig, ops: Ops, params: dict[str, Parameter], hooks: ModuleHooks) -> None:
        self.cfg, self.ops, self.p, self.hooks = cfg, ops, params, hooks

    def __call__(
        self, x: Tensor, name: str, label: str, rows: int, plain: Plain | None = None, turned: bool = False
    ) -> Tensor:
        """``plain``: a family's own layer in nn.Linear's place, as (x, name, label).

        ``turned``: the gradient comes in another order of memory than rows. Products copy it, the adapter's too; of a
        quantized weight the 4-bit one takes it as it lies (matmul.cpp, should_fold), the int8 one copies it within.
        """
        x = self.hooks.enter(name, x)
        return self.hooks.leave(name, self._forward(x, name, label, rows, plain, turned))

    def _forward(self, x: Tensor, name: str, label: str, rows: int, plain: Plain | None, turned: bool) -> Tensor:
        if f"{name}.lora_A.weight" not in self.p:
            return self._base(x, name, label, rows, plain, turned)
        as_rows = partial(self._as_rows, label=label, turned=turned)
        weight, itemsize = self.p[f"{name}.weight"], self.p[f"{name}.lora_A.weight"].tensor.itemsize

        def base(y: Tensor) -> Tensor:
            y = self.hooks.enter(f"{name}.base_layer", y)
            return self.hooks.leave(f"{name}.base_layer", self._base(y, name, label, rows, plain, turned))

        def adapter(leaf: str, y: Tensor, count: int, out_label: str) -> Tensor:
            module = f"{name}.lora_{leaf}"
            y = self.hooks.enter(module, y)
            out = self.ops.linear(y, self.p[f"{module}.weight"], None, count, out_label)
            return self.hooks.leave(module, as_rows(out) if leaf == "B" and count == rows else out)

        def dropped(y: Tensor) -> Tensor:  # a module without dropout too: nn.Identity
            y = self.hooks.enter(f"{name}.lora_dropout", y)
            if dropout:
                y = self.ops.dropout(y, f"{label} adapter dropout")
            return self.hooks.leave(f"{name}.lora_dropout", y)

        down, up, dropout = partial(adapter, "A"), partial(adapter, "B"), self.cfg.adapter.dropout
        magnitude, bias = self.p.get(f"{name}{MAGNITUDE}.weight"), self.p.get(f"{name}.bias")
        if magnitude is not None:
            columns = self.p[f"{name}.lora_A.weight"].shape[1]
            sizes = columns, rows, itemsize
            layer = DoraLayer(weight, bias, magnitude, down, up, *sizes, label, dropout, plain is not None, as_rows)
            return dora(self.ops, layer, base, x)
        kind = weight.quantized.kind if weight.quantized else ""
        down = partial(down, count=rows, out_label=f"{label} adapter A")
        up = partial(up, count=rows, out_label=f"{label} adapter B")
        return lora(self.ops, base, down, up, dropped, x, itemsize, label, kind)

    def _as_rows(self, y: Tensor, label: str, turned: bool) -> Tensor:
        return self.ops.gradient_as_rows(y, label) if turned else y

    def _base(self, x: Tensor, name: str, label: str, rows: int, plain: Plain | None, turned: bool) -> Tensor:
        if plain is not None:
            return plain(x, name, label)
        w, b = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        if w.quantized is None:
            return self._as_rows(self.ops.linear(x, w, b, rows, label), label, turned)
        if w.quantized.kind == "int8":
            return linear_int8(self.ops, x, w, b, rows, label, turned)
        return linear_4bit(self.ops, x, w, b, rows, label, self.cfg.quantization)
