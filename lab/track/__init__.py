"""What a run leaves on disk and shows elsewhere: the run folder, environment, W&B, bundles of records.

Nothing here imports torch; ``wandb`` is imported in ``wandb_tracker`` only.
"""

from lab.track.environment import environment
from lab.track.folder import RunFolder, new_run_id
from lab.track.recover import fault_of, recover_record
from lab.track.wandb_tracker import Tracker, make_tracker

__all__ = ["RunFolder", "Tracker", "environment", "fault_of", "make_tracker", "new_run_id", "recover_record"]
