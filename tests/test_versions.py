"""The oldest diffusers that is supported, each in an environment of its own; needs an index of packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.40.0", "0.41.0"])
def test_lifecycle_with_an_older_diffusers(version, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    for packages in (["torch==2.13.0"], [f"{ROOT}[test]", f"diffusers=={version}"]):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    tests = ["tests/integration", "tests/workflow", "tests/golden"]
    # diffusers 0.40 cannot offload groups from a CPU to a CPU, quantized or not
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not group_offload", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
