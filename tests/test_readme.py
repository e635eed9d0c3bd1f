"""The pages' examples run, their tables are generated, the README's commands are those of CI."""

import io
import re
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

from matrix import PIPELINES  # noqa: E402
from tables import PAGES, TABLES, filled  # noqa: E402

SHORTENED = (
    ("minutes=10", "train_steps=2, num_inference_steps=2, batch_size=2"),
    ("RoundingConfig()", "RoundingConfig(iterations=2, num_samples=8, num_inference_steps=2, batch_size=4)"),
    ("TemporalConfig(num_inference_steps=20)", "TemporalConfig(num_inference_steps=2, iterations=2)"),
    ("num_samples=16", "num_samples=2, num_inference_steps=2"),
    ('"stable-diffusion-v1-5/stable-diffusion-v1-5"', '"tiny-sd"'),
    (', "w4a8")', ', "w4a8", num_samples=1, num_inference_steps=2)'),
    (', "w4a4")', ', "w4a4", num_samples=1, num_inference_steps=2)'),
    (
        "split_shortcuts(pipe, teacher)",
        "split_shortcuts(pipe, teacher, SplitConfig(num_samples=1, num_inference_steps=2))",
    ),
    ("import quantize_pipeline, split_shortcuts", "import SplitConfig, quantize_pipeline, split_shortcuts"),
)
"""What the examples leave out when the tests run them."""


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_wheel_has_the_size_that_the_readme_says():
    said = float(re.search(r"The wheel is ([\d.]+) MB", README)[1])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in (ROOT / "diffusers_msfp").rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.name not in ("README.md", "API.md"):
                wheel.write(file)
    assert said == pytest.approx(packed.tell() / 1e6, rel=0.03)


def test_every_folder_has_a_page():
    for folder in {file.parent for file in (ROOT / "diffusers_msfp").rglob("*.py")}:
        assert (folder / "README.md").is_file(), folder


def test_the_examples_run(tmp_path, monkeypatch):
    pages = [ROOT / "README.md", *sorted((ROOT / "diffusers_msfp").rglob("README.md"))]
    examples = [code for page in pages for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len(examples) == 6
    monkeypatch.chdir(tmp_path)
    PIPELINES["Stable Diffusion"].make().save_pretrained("tiny-sd")
    for example in examples:
        assert 3 <= len([line for line in example.splitlines() if line.strip()]) <= 14
        for long, short in SHORTENED:
            example = example.replace(long, short)
        exec(compile(example, "README.md", "exec"), {})
    assert Path("fashion-w4a4-talora").is_dir()
    packed = tmp_path / "fashion-w4a4" / "diffusion_pytorch_model.safetensors"
    assert packed.stat().st_size < 1.1e6


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text
    assert not re.search(r"<!-- (\w+) -->\n<!-- /\1 -->", text)


def test_every_table_stands_somewhere():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"<!-- {name} -->\n|" in text for name in TABLES)


def test_ci_runs_the_readme_s_own_test_command():
    commands = re.findall(r"```sh\n(pip install .*?)\n```", README)
    assert len(commands) == 2
    assert all(command.startswith("pip install torch==2.13.0 && ") for command in commands)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for step in commands[1].split(" && "):
        assert step in script
    assert "ruff check" in script
    assert "ruff format --check" in script
    assert "\n    mypy " in script


def test_every_script_and_every_result_is_listed():
    benchmarks, results = ROOT / "tests" / "benchmarks", ROOT / "model_cards" / "results"
    scripts = (benchmarks / "README.md").read_text(encoding="utf-8")
    for file in sorted([*benchmarks.glob("*.py"), *benchmarks.glob("training/*.py")]):
        is_run = "__main__" in file.read_text(encoding="utf-8")
        assert not is_run or f"`{file.relative_to(benchmarks)}" in scripts, file
    index = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
    for file in sorted(results.glob("*.json")):
        assert f"`{file.name}`" in index, file


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
