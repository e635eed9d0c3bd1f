"""Waiting for what another process does."""

import subprocess
import time
from collections.abc import Callable

TIMEOUT = 300


def wait_until(happened: Callable[[], object], process: subprocess.Popen) -> None:
    """Look until something has happened. It fails when the process ends before, and after `TIMEOUT` seconds."""
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
