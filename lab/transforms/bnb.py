"""The one place that imports bitsandbytes: five seconds, so only where a quantized layer or optimizer is made."""

from __future__ import annotations

import logging
from typing import Any


def import_bitsandbytes() -> Any:
    """The library, quiet: without a GPU it logs that its CUDA binary is missing, which a CPU run does not need."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from torch.utils._python_dispatch import _disable_current_modes

    # It makes two small tables on the host as it loads: the library's, not the run's, for the CPU's memory tracker.
    with _disable_current_modes():
        import bitsandbytes

    return bitsandbytes
