"""What each operation allocates, keeps for backward and frees, in the order it does so.

One function per operation of ``lab.model``. Element counts are per rank. Each follows PyTorch's
derivative formula (tools/autograd/derivatives.yaml); the order of allocations inside a backward was
read off the allocator's trace on an H200 (torch 2.11) and off the storage tracker on a CPU (2.13).
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.analytic.ops_base import LOSS, BaseOps, Parameter, Quantized
from lab.analytic.tape import FP32, INT64, Grads, Node, Tensor, viewed
from lab.vocab import MemoryCategory

__all__ = ["LOSS", "Ops", "Parameter", "Quantized"]

EMBEDDING_SORT_ABOVE = 3072  # indices; aten/src/ATen/native/cuda/Embedding.cu


@dataclass
class Ops(BaseOps):
    """The operations."""

    # -- embedding, residual, dropout ---------------------------------------------------------

    def embedding(self, p: Parameter, numel_out: int, label: str, rows: int, indices: Tensor | None = None) -> Tensor:
        """Rows of the table; keeps the indices (int64; the batch itself unless given); dense table gradient.

        Above 3072 indices the CUDA backward sorts them and sums partial segments in fp32
        (cuda/Embedding.cu, cuda/EmbeddingBackwardKernel.cu): per index two int64 for the sort, three per
        segment, and one fp32 row per partial segment, at most rows / 10 + min(rows, table rows) of them.
        """
        table, itemsize, tape = p.numel, p.tensor.itemsize, self.tape
        table_rows, width = p.shape

        def backward(grads: Grads) -> Grads:
            if rows <= EMBEDDING_SORT_ABOVE:
                return [tape.new(table, itemsize, f"gradient of {p.name}")]
            segments = min(rows, table_rows)
            partial = rows // 10 + segments
            gpu = tape.trace.on_device_kernels
            held = [self.new(rows, INT64, "sorted indices") for _ in range(2)] if gpu else []
            g = tape.new(table, itemsize, f"gradient of {p.name}")
            if gpu:
                held += [self.new(n, INT64, "segments") for n in (rows, segments, segments, partial)]
            self.scratch(FP32 * partial * width, "partial segments")
            del held
            return [g]

        node = tape.node([p.leaf()], backward, [indices])
        y = self.new(numel_out, itemsize, label)
        y.node = node
        return y

    def add(self, x: Tensor, y: Tensor, label: str, broadcast: bool = False) -> Tensor:
        """x + y in the wider type; keeps nothing; a narrower operand's gradient is cast, a broadcast one's summed."""
        size, tape = max(x.itemsize, y.itemsize), self.tape
        y_numel, x_size, y_size, same = y.numel, x.itemsize, y.itemsize, not broadcast
        needs_x, needs_y = x.node is not None, y.node is not None

        def backward(grads: Grads) -> Grads:
            g = grads[0]
            assert g is not None
            gx = gy = None
            if needs_x:
                gx = g if x_size == size else tape.new(g.numel, x_size, label + " gradient")
            if not needs_y:
                return [gx, None]
            if same:
                gy = g if y_size == size else tape.new(g.numel, y_size, label + " gradient")
            else:
                gy = tape.new(y_numel, y_size, label + " summed gradient")
            return [gx, gy]

        node = tape.node([x, y], backward)
        out = self.new(max(x.numel, y.numel), size, label)
        out.node = node
        return out

    def dropout(self, x: Tensor, label: str) -> Tensor:
        """Keeps a mask; backward makes the masked gradient.

        CUDA: native_dropout, a bool mask made before the output (cuda/Dropout.cu). CPU: noise of x's type, then the
        product (aten/src/ATen/native/Dropout.cpp).
        """
        numel, itemsize, tape = x.numel, x.itemsize, self.tape
        if tape.trace.on_device_kernels:
            mask = self.new(numel, 1, label + " mask")
            y = self.new(numel, itemsize, label)
        else:
            mask = self.new(numel, itemsize, label + " noise")
        node = tape.node([x], lambda _: [tape.new(numel, itemsize, label + " gradient")], [mask])
        if not tape.trace.on_device_kernels:  # the noise is an input of the product: kept before that is made
            y = self.new(numel, itemsize, label)
        y.node = node
        return y

    # -- linear ------------------------------------------------------------------------------

    def linear(self, x: Tensor, w: Parameter, b: Parameter | None, rows: int, label: str) -> Tensor:
        """x [rows, in] @ w.T [in, out] (+ b). Keeps x and w (their autocast copies under autocast).

        Backward without bias: weight gradient, then input gradient (mm); with bias: input gradient,
        weight gradient, bias gradient by a column sum (addmm).
        """
        if self.linear_keeps_parameter:
            return self._linear_of_parameter(x, w, b, rows, label)
        bias = self.weight(b) if b is not None else None
        weight = self.weight(w)
        if self.amp is not None:
            x = self.cast(x, self.amp, label + " input, autocast copy")
        out_features, in_features = w.shape
        size, tape, ops, name = x.itemsize, self.tape, self, w.name  # not w itself: backward keeps no weight
        category = LOSS if label == "logits" else MemoryCategory.TEMPORARIES
        if bias is not None:  # _flatten_nd_linear: input.reshape before weight.t(), so that it goes on after that
            x = x.view(node=tape.node([x], lambda g: [viewed(g[0])]))
        # weight.t() is a node between the product and the weight: its gradient waits there for its turn.
        turned = Tensor(weight.storage, weight.numel, size, tape.node([weight], lambda g: [viewed(g[0])]))
        needs_x, needs_w, numel_x = x.node is not None, weight.node is not None, x.numel
        needs_b = bias is not None and bias.node is not None

        def backward(grads: Grads) -> Grads:
            gx = gw = None
            if bias_size and needs_x:
                gx = tape.new(numel_x, size, label + " input gradient")
            if needs_w:
                gw = tape.new(out_features * in_features, size, f"gradient of {name}")
            elif not bias_size and needs_x:
                gx = tape.new(numel_x, size, label + " input gradient")
            ops.matmul_workspace("backward", lt=False)  # at the first product, whose output is there
            if not bias_size and needs_x and needs_w:
                gx = tape.new(numel_x, size, label + " input gradient")
            return [viewed(gx), gw, None]

        def validate(outputs: Grads) -> None:  # the output's gradient, summed to the bias
            outputs[2] = tape.new(out_features, size, f"gradient of {name} bias")
            ops.column_sum(rows, out_features)

        bias_size = 0 if bias is None else bias.itemsize
        # Saved in declared order: addmm's mat1, mat2; mm's mat2, self; each for the other's gradient only.
        kept_x, kept_w = x if needs_w else None, turned if needs_x else None
        kept = [kept_x, kept_w] if bias_size else [kept_w, kept_x]
        node = tape.node([x, turned, bias], backward, kept, validate=validate if needs_b else None)
        del kept, kept_x, kept_w, turned
        y = self.kept_or(rows * out_features, size, label, category)
        if not self.taken_back:
            self.matmul_workspace("forward", lt=bool(bias_size))
        del weight, bias
        y.node = node
        return y

    def _linear_of_parameter(self, x: Tensor, w: Parameter, b: Parameter | None, rows: int, label: str) -> Tensor:
        """LinearFunctionForZeroStage3 (deepspeed/runtime/zero/linear.py), which zero.Init puts in F.linear's place.

        Keeps x and the parameters themselves, so not the storage they have at the moment (``keep_parameter``). The
        output is there before anything is saved. Backward: input gradient, weight gradient, bias gradient.
        """
        out_features, in_features = w.shape
        size, tape, ops, needs_x, numel_x = x.itemsize, self.tape, self, x.node is not None, x.numel
        category = LOSS if label == "logits" else MemoryCategory.TEMPORARIES
        params = [w] if b is None else [w, b]

        def backward(grads: Grads) -> Grads:
            gx = tape.new(numel_x, size, label + " input gradient") if needs_x else None
            ops.matmul_workspace("backward", lt=False)
            out: Grads = [gx, None]
            if w.trainable:
                out[1] = tape.new(out_features * in_features, size, f"gradient of {w.name}")
            if b is not None and not b.trainable:
                out.append(None)
            elif b is not None:
                out.append(tape.new(out_features, size, f"gradient of {b.name}"))
                ops.column_sum(rows, out_features)
            return out

        node = tape.node([x, *(p.leaf() for p in params)], backward)
        y = self.kept_or(rows * out_features, size, label, category)
        self.matmul_workspace("forward", lt=False)
        tape.save(node, x)
        for p in params:
            self.keep_parameter(node, p)
        y.node = node
        return y

    def keep_parameter(self, node: Node | None, p: Parameter) -> None:
        """Save a leaf under ZeRO-3, which swaps storages: autograd keeps the parameter, checkpointing a view of it,
        but of a frozen one itself (torch/utils/checkpoint.py, _recomputation_hook).
        """
        if self.linear_keeps_parameter and self.tape.pack is not None:
            self.tape.save(node, p.tensor if p.trainable else self.new(0, p.tensor.itemsize, ""))

    # -- norms, activations --------------------------------------------------------------------

    def norm(self, x: Tensor, w: Parameter, b: Parameter | None, rows: int, kind: str, label: str) -> Tensor:
        """RMSNorm or LayerNorm over the last dimension.

        Keeps x, the weight and statistics per row (rstd; LayerNorm also the mean), which are fp32 on a GPU and of
        x's type on a CPU. LayerNorm is on autocast's fp32 list, and both norms' weights are fp32 under autocast, so
        the output is fp32 there.
        """
        if self.amp is not None:
            x = self.cast(x, FP32, label + " input, fp32 copy")
        numel, size, tape = x.numel, x.itemsize, self.tape
        params = [p for p in (w, b) if p is not None]
        hidden, needs_x = w.numel, x.node is not None

        def backward(grads: Grads) -> Grads:
            gx = tape.new(numel, size, label + " gradient") if needs_x else None
            trained = [p.trainable for p in params]
            return [gx, *(tape.new(hidden, size, f"gradient of {label} weight") if t else None for t in trained)]

        node = tape.node([x, *(p.leaf() for p in params)], backward, [x])
        for p in params:
            self.keep_parameter(node, p)
        y = self.new(numel, size, label)
        statistic_size = FP32 if tape.trace.on_device_kernels else size
        names = ("mean", "rstd") if kind == "layernorm" else ("rstd",)
        statistics = [self.new(rows, statistic_size, f"{label} {name}") for name in names]
        for statistic in statistics:
            self.tape.save(node, statistic)
        del statistics
        y.node = node
        return y

    def silu(self, x: Tensor) -> Tensor:
        return self.unary(x, "silu", True, "silu gradient")

    def gelu(self, x: Tensor) -> Tensor:
        return self.unary(x, "gelu", True, "gelu gradient")

    def mul(self, x: Tensor, y: Tensor, label: str) -> Tensor:
        """x * y, each kept where the other needs a gradient; backward makes y's gradient and x's."""
        numel, size, tape = x.numel, x.itemsize, self.tape
        needs = [t.node is not None for t in (x, y)]

        def backward(grads: Grads) -> Grads:
            gy, gx = (tape.new(numel, size, label + " gradient") if need else None for need in reversed(needs))
            return [gx, gy]

        saved = [y if needs[0] else None, x if needs[1] else None]  # declared by name: other, self
        node = tape.node([x, y], backward, saved)
        del saved
        out = self.new(numel, size, label)
        out.node = node
        return out

    # -- rope ----------------------------------------------------------------------------------

    def rope(self, x: Tensor, label: str) -> Tensor:
        """x * cos + cat(-x2, x1) * sin over tables that need no gradient: nothing of x is kept."""
        numel, size, tape = x.numel, x.itemsize, self.tape
        half = numel // 2

        def split_backward(grads: Grads) -> Grads:  # chunk's backward: the halves side by side
            return [tape.new(numel, size, label + " gradient")]

        split = tape.node([x], split_backward, num_slots=2)
        first, second = x.view(half, split, 0), x.view(half, split, 1)
        a = self.unary(x, label + " cos product", False, label + " gradient")
        negated = self.unary(second, label + " negated half", False, label + " gradient")

        def cat_backward(grads: Grads) -> Grads:  # two views of the incoming gradient
            g = grads[0]
            assert g is not None
            return [g.view(half), g.view(half)]

        cat = tape.node([negated, first], cat_backward)
        rotated = self.new(numel, size, label + " rotated", MemoryCategory.TEMPORARIES)
        rotated.node = cat
        del negated, first, second
        b = self.unary(rotated, label + " sin product", False, label + " gradient")
        del rotated
        return self.add(a, b, label)

    # -- splitting, scaling ----------------------------------------------------------------------

    def split(self, x: Tensor, counts: list[int], label: str) -> list[Tensor]:
        """Views of consecutive parts; backward puts their gradients side by side."""
        numel, size, tape = x.numel, x.itemsize, self.tape
        node = tape.node([x], lambda _: [tape.new(numel, size, label)], num_slots=len(counts))
        return [x.view(count, node, i) for i, count in enumerate(counts)]

    def scale(self, x: Tensor, label: str) -> Tensor:
        """A scalar times or over a constant."""
        return self.unary(x, label, False, label + " gradient")
