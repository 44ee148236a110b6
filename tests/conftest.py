"""What every test run needs."""

from __future__ import annotations

import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files of the processes that tests start go with the test run: torchrun leaves a folder per launch."""
    folder = tempfile.TemporaryDirectory(prefix="lab-tests-", ignore_cleanup_errors=True)
    os.environ["TMPDIR"] = folder.name
    config.add_cleanup(folder.cleanup)
