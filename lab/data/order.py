"""Which sequence comes when: a pure function of the seed and of the position in the whole run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class SequenceOrder:
    """Endless order over ``num_sequences``: one permutation per epoch, drawn from (seed, epoch).

    Position p of the run is index p mod num_sequences of epoch p // num_sequences, whoever reads it; so a
    global batch holds the same sequences however it is split over ranks and micro-batches.
    """

    def __init__(self, num_sequences: int, seed: int) -> None:
        self.num_sequences = num_sequences
        self._seed = seed
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def sequence_at(self, position: int) -> int:
        """Index of the sequence at ``position`` (0, 1, ...) of the run."""
        epoch, index = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._permutation[index])
