"""``lab.train`` whose rank 1 does something bad in the forward pass of its third step: argv[1] says what."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from lab.parallel.replicated import ReplicatedEngine
from lab.train import main

FAULT = sys.argv[1]


class FaultyEngine(ReplicatedEngine):
    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._step == 2 and os.environ["RANK"] == "1":
            if FAULT == "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has ...")
            if FAULT == "error":
                raise ValueError("on purpose")
            if FAULT == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if FAULT == "hang":
                time.sleep(600)
        return super().forward(tokens, targets)


if __name__ == "__main__":
    from lab.parallel import replicated

    replicated.ReplicatedEngine = FaultyEngine  # what lab.parallel.build_engine looks up
    sys.exit(main(sys.argv[2:]))
