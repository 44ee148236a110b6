"""Trains configurations one after the other in this process; a JSON line each: how far the prediction is off.

Started as a process of its own, lines of overrides on stdin: bitsandbytes and peft take seconds to import, a tiny run
takes one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

from lab.train import main


def off_by(record: dict[str, object]) -> dict[str, int]:
    """'steady/backward/peak' -> measured less predicted bytes, where it is not zero; categories at phase ends too."""
    prediction, rank = record["prediction"], record["ranks"][0]  # type: ignore[index]
    found: dict[str, int] = {}
    for name, step in (("first_step", rank["steps"][0]), ("steady", rank["steps"][-1])):
        for phase, reading in step["phases"].items():
            moments = prediction[name]["phases"][phase]  # type: ignore[index]
            found[f"{name}/{phase}/end"] = reading["end_allocated_bytes"] - moments["end"]["total_bytes"]
            found[f"{name}/{phase}/peak"] = reading["peak_allocated_bytes"] - moments["peak"]["total_bytes"]
            found[f"{name}/{phase}/unattributed"] = reading["unattributed_bytes"] or 0
            for category in ("parameters", "quantization_state", "gradients", "optimizer_states"):
                measured = (reading["ledger"] or {}).get(category, 0)
                predicted = moments["end"]["categories"].get(category, 0)
                found[f"{name}/{phase}/{category}"] = measured - predicted
    return {moment: difference for moment, difference in found.items() if difference}


def run(folder: Path, overrides: list[str]) -> dict[str, object]:
    functional = sys.modules.get("bitsandbytes.functional")
    if functional is not None:  # its code table outlives a run; the next one's first double quantization makes it anew
        functional.name2qmap.clear()
    with contextlib.redirect_stdout(sys.stderr):
        code = main([*overrides, f"launch.output_dir={folder}"])
    newest = max(folder.glob("*/*/record.json"), key=os.path.getmtime)
    record = json.loads(newest.read_text(encoding="utf-8"))
    return {"code": code, "status": record["status"], "error": record.get("error"), "off": off_by(record)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(Path(sys.argv[1]), json.loads(line))), flush=True)
