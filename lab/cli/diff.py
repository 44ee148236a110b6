"""``lab diff RUN``: predicted against measured blocks at the peak of a run with measure=snapshot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lab.analytic.curve import memory_curve
from lab.analytic.explain import peak_blocks
from lab.block_diff import Leftover, diff_blocks, total_bytes
from lab.cli.arguments import Parser
from lab.config import ConfigError, run_config_from_json
from lab.curve import write_curve
from lab.history import blocks_at_peak, curve_of, read_snapshot
from lab.record import read_record
from lab.report.text import text_table
from lab.units import readable

HELP = """Blocks that are live at the peak, predicted against measured: equal sizes cancel, the rest is named.

  torchrun --standalone --nproc-per-node 1 -m lab.train measure=snapshot model=125m name=look
  lab diff outputs/look/RUN_ID
  lab diff outputs/look/RUN_ID --curve curve.csv        curve.predicted.csv and curve.measured.csv, event by event

Needs a GPU run with measure=snapshot (record.json and snapshot_rank_R.pickle in its folder).
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("diff", HELP)
    parser.add_argument("run", metavar="RUN", help="folder of one run")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose snapshot (default 0)")
    parser.add_argument("--most", type=int, default=30, metavar="N", help="rows at most (default 30)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--curve", metavar="FILE", help="write the step's memory curves, predicted and measured")
    arguments = parser.parse(argv)
    folder = Path(arguments.run)
    snapshot = folder / f"snapshot_rank_{arguments.rank}.pickle"
    if not snapshot.is_file():
        raise ConfigError("RUN", folder, f"a run folder with {snapshot.name}: train with measure=snapshot on a GPU")
    cfg = run_config_from_json(read_record(folder / "record.json").config)
    history = read_snapshot(snapshot)
    if arguments.curve:
        path = Path(arguments.curve)
        write_curve(path.with_suffix(f".predicted{path.suffix}"), memory_curve(cfg, arguments.rank))
        write_curve(path.with_suffix(f".measured{path.suffix}"), curve_of(history))
    predicted, measured = peak_blocks(cfg, arguments.rank), blocks_at_peak(history)
    left = diff_blocks(predicted, measured)
    if arguments.json:
        print(json.dumps([asdict(x) | {"total_bytes": x.total_bytes} for x in left[: arguments.most]], indent=1))
        return 0
    ours, theirs = sum(p.tensor_bytes for p in predicted), total_bytes(measured)
    print(f"predicted {readable(ours)} in {len(predicted)} blocks, measured {readable(theirs)} in {len(measured)}")
    print(f"difference {ours - theirs:+,} B; requests, not the blocks that served them")
    print(f"\n{diff_text(left[: arguments.most])}" if left else "every block cancels")
    return 0


def diff_text(left: Sequence[Leftover]) -> str:
    rows = [
        [x.side, f"{x.total_bytes:,}", f"{x.count} x {x.size_bytes:,}", x.category, "; ".join(x.names)] for x in left
    ]
    return text_table(["only", "bytes", "blocks", "category", "candidates"], rows)
