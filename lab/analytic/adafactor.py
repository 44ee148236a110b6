"""torch.optim.Adafactor: its factored states, and what one step allocates for a moment.

Source: torch/optim/_adafactor.py (2.11 and 2.13). A matrix of r rows and c columns, e bytes per element, keeps e * r of
row_var and e * c of col_var; a vector keeps its variance in full, e * n. The step counters (4 B) stay on the host.
ZeRO hands the optimizer one flat partition, a vector: nothing is factored, and the states are as large as SGD's.

Moments of a step, in bytes of one parameter (e * n):

- for_loop: the estimate of its variance, which becomes the update in place. The name ``update`` keeps the parameter's
  before until this one's takes its place, so two neighbours' exist at once; a vector also squares its gradient.
- foreach: the estimates of all matrices at once; the vectors' come while the matrices' are still named.

torch.norm's scratch memory is modelled as in lab.analytic.reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.optimizers import STATES, Optimizer, Shape, foreach_types
from lab.analytic.reduce import column_partials, norm_workspace_bytes
from lab.analytic.tape import FP32, Tape, Tensor
from lab.config import OptimizerConfig


class Adafactor(Optimizer):
    """``shapes`` are needed: only matrices have factored states. None: every tensor is a vector."""

    def __init__(self, tape: Tape, cfg: OptimizerConfig, num_sms: int = 0) -> None:
        super().__init__(tape, cfg)
        self.num_sms = num_sms if tape.trace.on_device_kernels else 0

    def step(self, params: Sequence[tuple[int, int]], shapes: Sequence[Shape] | None = None, group: int = 0) -> None:
        sized = [
            _Updated(numel, size, shape)
            for (numel, size), shape in zip(params, shapes or [(n,) for n, _ in params], strict=True)
        ]
        if group not in self.made:
            self.made.add(group)
            for p in sized:
                self._init_state(p)
        if self.cfg.implementation == "foreach":
            self._multi_tensor(sized)
        else:
            self._single_tensor(sized)

    def _init_state(self, p: _Updated) -> None:
        new = self.tape.new
        if not self.tape.trace.on_device_kernels:
            self.states.append(new(1, FP32, "step", STATES))
        if p.is_matrix:
            self.states.append(new(p.rows, p.itemsize, "row_var", STATES))
            self.states.append(new(p.columns, p.itemsize, "col_var", STATES))
        else:
            self.states.append(new(p.numel, p.itemsize, "variance", STATES))

    def _single_tensor(self, params: Sequence[_Updated]) -> None:
        """_single_tensor_adafactor: names are bound anew for every parameter, and keep the last one's until then."""
        row_mean = col_mean = grad_squared = estimate = update = None
        for p in params:
            self._norm(p)  # of the parameter
            if p.is_matrix:
                row_mean = self._row_norm(p)
                col_mean = self._column_norm(p)
                estimate = self.tape.new(p.numel, p.itemsize, "Adafactor variance estimate")
                self._row_mean(p)
            else:
                grad_squared = self.tape.new(p.numel, p.itemsize, "Adafactor gradient squared")
                estimate = self.tape.new(p.numel, p.itemsize, "Adafactor variance estimate")
            update = estimate  # clamp_ and rsqrt_ are in place
            self._norm(p)  # of the update
        del row_mean, col_mean, grad_squared, estimate, update

    def _multi_tensor(self, params: Sequence[_Updated]) -> None:
        """_multi_tensor_adafactor: one group after the other.

        _group_tensors_by_device_dtype_and_is_multidim: type by type, and each type's matrices and vectors, whichever
        comes first.
        """
        sizes = foreach_types([p.itemsize for p in params])
        kinds = dict.fromkeys((size, p.is_matrix) for size in sizes for p in params if p.itemsize == size)
        updates: list[Tensor] = []
        for size, matrices in kinds:
            group = [p for p in params if p.itemsize == size and p.is_matrix == matrices]
            for p in group:
                self._norm(p)
            if matrices:
                means = [self._row_norm(p) for p in group]
                del means
                means = [self._column_norm(p) for p in group]
                del means
                estimates = [self.tape.new(p.numel, p.itemsize, "Adafactor variance estimate") for p in group]
                means = [self._row_mean(p) for p in group]
                del means
            else:
                squared = [self.tape.new(p.numel, p.itemsize, "Adafactor gradient squared") for p in group]
                del squared
                estimates = [self.tape.new(p.numel, p.itemsize, "Adafactor variance estimate") for p in group]
            updates = estimates
            for p in group:
                self._norm(p)
        del updates

    # -- reductions: a result, and scratch memory while it is made ---------------------------------

    def _reduced(self, numel: int, itemsize: int, partial_bytes: int, semaphore_bytes: int = FP32) -> Tensor:
        out = self.tape.new(numel, itemsize, "Adafactor norm")
        if partial_bytes:
            sums = self.tape.new(partial_bytes, 1, "norm, partial sums")
            self.tape.new(semaphore_bytes, 1, "Adafactor norm, semaphores")
            del sums
        return out

    def _whole(self, numel: int, itemsize: int) -> Tensor:
        """One number of ``numel`` elements."""
        return self._reduced(1, itemsize, norm_workspace_bytes(numel, self.num_sms, FP32) if self.num_sms else 0)

    def _norm(self, p: _Updated) -> Tensor:
        """tensor.norm(2).item(): read at once."""
        return self._whole(p.numel, p.itemsize)

    def _row_norm(self, p: _Updated) -> Tensor:
        """torch.norm(grad, dim=-1): a row fits one thread block's share, no scratch memory."""
        return self._reduced(p.rows, p.itemsize, 0)

    def _column_norm(self, p: _Updated) -> Tensor:
        """torch.norm(grad, dim=-2)."""
        scratch = column_partials(p.rows, p.columns, self.num_sms) if self.num_sms else (0, 0)
        return self._reduced(p.columns, p.itemsize, *scratch)

    def _row_mean(self, p: _Updated) -> Tensor:
        """row_var.mean(dim=-2)."""
        return self._whole(p.rows, p.itemsize)


class _Updated:
    """One parameter as the optimizer sees it."""

    def __init__(self, numel: int, itemsize: int, shape: Shape) -> None:
        self.numel, self.itemsize = numel, itemsize
        self.is_matrix = len(shape) > 1
        self.columns = shape[-1]
        self.rows = numel // shape[-1]
