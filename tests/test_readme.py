"""The README's example runs, its tables are generated, its commands are those of CI."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

from tables import PAGES, filled  # noqa: E402


def test_the_examples_run(tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in examples:
        assert 6 <= len([line for line in example.splitlines() if line.strip()]) <= 14
        exec(compile(example.replace("minutes=10", "train_steps=2"), "README.md", "exec"), names)
    assert names["pipe"].talora_summary()["num_adapters"] == 2
    packed = tmp_path / "fashion-w4a4" / "unet" / "diffusion_pytorch_model.safetensors"
    assert packed.stat().st_size < 1.1e6


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text
    assert "<!-- schemes -->\n|" in text


def test_ci_runs_the_readme_s_own_test_command():
    commands = re.findall(r"```sh\n(pip install .*?)\n```", README)
    assert len(commands) == 2
    assert all(command.startswith("pip install torch==2.13.0 && ") for command in commands)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for step in commands[1].split(" && "):
        assert step in script
    assert "ruff check" in script
    assert "ruff format --check" in script


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
