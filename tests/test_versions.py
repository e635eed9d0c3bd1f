"""The oldest supported libraries, in environments of their own; needs an index of packages."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DECLARED = dict(re.findall(r'"([\w.-]+)>=([\d.]+),<', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
OLDEST = [f"{name}=={version}" for name, version in DECLARED.items() if name not in ("torch", "playwright")]
SETS = {"oldest": OLDEST, "diffusers 0.41": ["diffusers==0.41.0"]}


def test_every_dependency_has_a_range():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([^"]+)"', text[text.index("dependencies = [") : text.index("[project.scripts]")])
    bare = [entry for entry in listed if not re.match(r"[\w.-]+>=[\d.]+,<[\d.]+", entry)]
    assert all(entry.startswith("diffusers-msfp[") for entry in bare), bare


def test_what_diffusers_0_40_cannot_do_says_so_in_its_name():
    """`-k` leaves these out there, a function of tests and of what their parameters are alike."""
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            attributes = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
            if isinstance(node, ast.FunctionDef) and "enable_group_offload" in attributes:
                assert "group_offload" in node.name, f"{file.name}: {node.name}"


@pytest.mark.slow
@pytest.mark.parametrize("pins", SETS)
def test_lifecycle_with_older_libraries(pins, tmp_path):
    """`.ci/run` runs this for the oldest."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    for packages in (["torch==2.13.0"], ["-e", f"{ROOT}[test]", *SETS[pins]]):  # a build would leave its folder here
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    tests = ["tests/plugin", "tests/golden", "tests/compat", "tests/methods", "tests/cli"]
    # diffusers 0.40 cannot offload groups from a CPU to a CPU, quantized or not
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not group_offload", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
