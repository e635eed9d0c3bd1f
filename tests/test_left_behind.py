"""A run of the tests leaves the temporary directory as it was, pytest's own folder aside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = "tests/plugin/test_talora.py::test_as_a_custom_pipeline"  # diffusers copies code for it


@pytest.mark.slow
def test_a_run_leaves_nothing_behind(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp_path))
    command = [sys.executable, "-m", "pytest", "-q", "-n1", "-p", "no:cacheprovider", RUN]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout
    assert [name for name in os.listdir(tmp_path) if not name.startswith("pytest-of-")] == []
