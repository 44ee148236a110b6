"""What the tests of ZeRO's rules share."""

from __future__ import annotations

from lab.analytic.step import Replay
from lab.analytic.timeline import phases
from lab.config import RunConfig
from lab.record import PhasePrediction
from lab.vocab import StepPhase

# One layer: embedding and head 257 * 8, three norms of 8, four projections of 64, three of 8 * 24: 4968 parameters.
SMALL = [
    *("model.num_layers=1", "model.hidden_size=8", "model.intermediate_size=24", "model.num_heads=2"),
    *("model.vocab_size=257", "model.max_seq_len=16", "data.tokenizer_vocab_size=257", "train.seq_len=16"),
]
# A model with everything that the default one has not.
OTHER_MODEL = [
    *("model.norm=layernorm", "model.mlp=gelu", "model.position=learned", "model.bias=true"),
    "model.tied_head=true",
]
GB = 10**9  # the ZeRO paper's


def blocks(num_bytes: int) -> int:
    """What the caching allocator counts for a small tensor: multiples of 512 B."""
    return -(-num_bytes // 512) * 512


def second_step_by_rank(cfg: RunConfig) -> list[dict[StepPhase, PhasePrediction]]:
    """Every rank's second step, each replayed for itself."""
    found = []
    for rank in range(cfg.world_size):
        replay = Replay(cfg, rank)
        replay.build()
        replay.step()
        replay.step()
        found.append(phases(replay.trace.events, 1))
    return found
