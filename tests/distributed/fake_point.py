"""A run that behaves as its seed says, without torch: what the sweep driver must cope with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from lab.analytic import predict
from lab.config import load, to_json
from lab.record import PhaseReading, RankMeasurement, RunRecord, StepMeasurement, write_json_atomic
from lab.track import RunFolder, new_run_id
from lab.vocab import RunStatus, StepPhase

OK, EXIT_1_AFTER_RECORD, OOM, KILLED, RAISES, HANGS, LINGERS, SIGTERM_OF_A_PEER, WAITS = range(1, 10)


def main(overrides: list[str]) -> None:
    cfg = load(overrides)
    folder = RunFolder.create(cfg, new_run_id())
    prediction = predict(cfg)
    folder.write_prediction(prediction)
    steps = [
        StepMeasurement(i, 0.1, 1.0, {StepPhase.FORWARD: PhaseReading(end_allocated_bytes=4, peak_allocated_bytes=4)})
        for i in range(2)
    ]
    folder.append_step(0, steps[0])
    if cfg.seed == OOM:
        word = {"rank": 0, "phase": "forward", "step": 1, "allocated_bytes": 4, "error": "asked for 2 GiB"}
        write_json_atomic(folder.path / "oom_rank_0.json", word)
        sys.exit(1)
    if cfg.seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.seed == RAISES:
        logs = folder.logs_path / "0"
        logs.mkdir(parents=True)
        (logs / "stderr.log").write_text("Traceback\nValueError: on purpose\n")
        sys.exit(1)
    if cfg.seed == HANGS:
        # A worker in a session of its own, as torchrun starts them; both ignore SIGTERM.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder.path / "hangs").touch()
        time.sleep(600)
    while cfg.seed == WAITS and not list(folder.path.parent.glob("*/record.json")):
        time.sleep(0.05)  # for the end of another point, which only runs side by side
    ranks = [RankMeasurement(0, 0, "h", "cpu", "cpu_storage_tracker", steps=steps)]
    status = RunStatus.INTERRUPTED if cfg.seed == SIGTERM_OF_A_PEER else RunStatus.OK
    error = "SIGTERM" if cfg.seed == SIGTERM_OF_A_PEER else None
    record = RunRecord(folder.run_id, cfg.name, status, "", [], to_json(cfg), {}, prediction, error=error, ranks=ranks)
    folder.write_record(record)
    if cfg.seed == LINGERS:
        time.sleep(600)
    sys.exit(1 if cfg.seed in (EXIT_1_AFTER_RECORD, SIGTERM_OF_A_PEER) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
