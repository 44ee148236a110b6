"""bitsandbytes' optimizers: states made one tensor at a time at the first step; the update kernels allocate nothing.

Source: bitsandbytes 0.50, optim/optimizer.py (names below are its own). n = elements of one tensor that is updated.

====================  =================================  =========================================================
state                 bytes                              where
====================  =================================  =========================================================
state1, state2        n each, as uint8; 4 n each below   the GPU; paged ones from 1e5 elements on in managed memory
                      ``min_8bit_size`` and in 32 bits
absmax1, absmax2      4 * ceil(n / 256) each             the GPU, of paged states too; none beside fp32 states
qmap1, qmap2          4 * 256 each, one pair per         the GPU, from the first tensor with 8-bit states on;
                      optimizer                          on a CPU from the optimizer's construction on
====================  =================================  =========================================================

Lion has state1, absmax1 and qmap1 only. So 8-bit Adam takes 2 + 2 * 4 / 256 = 2.03 bytes per element of a large tensor
and 8 of a small one. On a CPU nothing is paged and the tables are both there, Lion's unused one too.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.managed_memory import ManagedMemory
from lab.analytic.optimizers import STATES, Optimizer, Shape
from lab.analytic.tape import FP32, Tape, Tensor
from lab.config import OptimizerConfig
from lab.config.limits import check_elements

BLOCK_SIZE = 256  # init_state, blocksize: not a setting
TABLE = 256  # entries of a code table
PAGED_FROM = 100_000  # elements; get_state_buffer: smaller tensors are not paged
UINT8 = 1


class BitsAndBytes(Optimizer):
    """adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, lion_8bit."""

    def __init__(self, tape: Tape, cfg: OptimizerConfig) -> None:
        super().__init__(tape, cfg)
        self.states_per_tensor = 1 if cfg.kind == "lion_8bit" else 2
        self.bits = 32 if cfg.kind == "paged_adamw_32bit" else 8
        self.paged = cfg.kind.startswith("paged_") and tape.trace.on_device_kernels
        self.tables: list[Tensor] = []
        self.managed = ManagedMemory()
        self.in_32_bits: frozenset[tuple[int, int]] = frozenset()  # GlobalOptimManager.index2config: (group, place)
        if self.bits == 8 and not tape.trace.on_device_kernels:
            self._make_tables(2)

    def _make_tables(self, count: int) -> None:
        """fill_qmap makes them on the host; init_state moves them to the parameter's device, once."""
        self.tables = [self.tape.new(TABLE, FP32, f"qmap{i + 1}", STATES) for i in range(count)]

    def step(self, params: Sequence[tuple[int, int]], shapes: Sequence[Shape] | None = None, group: int = 0) -> None:
        if group in self.made:
            return
        self.made.add(group)
        check_elements(self.cfg.kind, max((numel for numel, _ in params), default=0))
        for i, (numel, _) in enumerate(params):
            self._init_state(numel, 32 if (group, i) in self.in_32_bits else self.bits)

    def _init_state(self, numel: int, bits: int) -> None:
        count, managed = self.states_per_tensor, self.paged and numel >= PAGED_FROM
        eight = bits == 8 and numel >= self.cfg.min_8bit_size
        if eight and not self.tables:
            self._make_tables(count)
        size = UINT8 if eight else FP32
        if managed:
            for _ in range(count):
                self.managed.take(numel * size)
            self.managed_bytes, self.managed_device_bytes = self.managed.requested_bytes, self.managed.device_bytes
        else:
            self.states += [self.tape.new(numel, size, f"state{i + 1}", STATES) for i in range(count)]
        if eight:
            blocks = -(-numel // BLOCK_SIZE)
            self.states += [self.tape.new(blocks, FP32, f"absmax{i + 1}", STATES) for i in range(count)]
