"""The command lines of all pages, each run on the embedded model with as little as it takes."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DModel
from loras import write_lora
from typer.testing import CliRunner

from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.cli.app import app
from diffusers_msfp.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "diffusers_msfp").rglob("README.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
TRAINED = sorted(file.parent for file in (ROOT / "model_cards").glob("*/model_index.json"))
"""The real models beside the embedded one."""
LITTLE = {
    "quantize": "--num-samples 2 --num-inference-steps 2",
    "compare": "--num-samples 2 --num-inference-steps 2",
    "report": "--num-samples 2 --num-inference-steps 2 --no-speed",
    "sample": "--num-samples 1 --num-inference-steps 2",
    "evaluate": "--num-samples 70 --num-inference-steps 2",
    "bench": "--repeats 2 --batch 1",
    "fuse": "--num-samples 2 --num-inference-steps 2",
    "doctor": "--no-timed",
    "finetune": "--batch-size 2 --num-inference-steps 2 --rank 2",
    "publish": "--num-samples 1 --num-inference-steps 1 --license mit --base-model org/base",
}
RECIPE = "temporal.iterations=2 rounding.iterations=2 rounding.num_samples=16 talora.train_steps=2"


def tour(text: str = TEXT) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("  #")[0].partition(" #")[0] for block in blocks for line in block.splitlines()]
    commands = [line.strip() for line in lines if line.startswith("diffusers-msfp ") and "demo" not in line]
    return [line.removeprefix("diffusers-msfp ") for line in dict.fromkeys(commands)]


def test_the_tour_goes_from_quantizing_to_the_page():
    verbs = [line.split()[0] for line in tour()]
    order = ["quantize", "inspect", "evaluate", "finetune", "publish", "space"]
    assert [verb for verb in dict.fromkeys(verbs) if verb in order] == order


def run(lines: list[str], source: Path) -> None:
    """Each command line with a model in place of SRC, in the working directory."""
    for line in lines:
        verb = line.split()[0]
        if line.startswith("space run") or (verb == "publish" and "--dry-run" not in line):
            continue  # a server, and the Hub: see tests/space and tests/hub
        words = shlex.split(line.replace("SRC", str(source)).replace("--minutes 10", "--train-steps 2"))
        words += shlex.split(LITTLE.get(verb, ""))
        stages = {stage.name for stage in RECIPES[words[words.index("--recipe") + 1]]} if "--recipe" in words else set()
        for setting in RECIPE.split():
            words += ["--set", setting] if setting.partition(".")[0] in stages else []
        if verb == "publish" and Path("DIR-publish").exists():
            continue
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output, result.exception)


def write_pictures(*shape: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (200, *shape)).astype(np.uint8)
    np.savez("fashion_mnist.npz", x_test=images, y_test=np.zeros(200))


@pytest.mark.slow
def test_every_command_line_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedded = UNet2DModel.from_pretrained(EMBEDDED_MODEL, subfolder="unet")
    write_lora(embedded, ["to_k", "conv2"], tmp_path / "lora.safetensors", std=0.01)
    write_pictures(28, 28)
    run(tour(), EMBEDDED_MODEL)
    for made in ("DIR", "FULL", "TUNED", "FUSED", "SPACE", "DIR-publish", "report.html", "grid.png", "denoiser.pt2"):
        assert Path(made).exists(), made


@pytest.mark.slow
@pytest.mark.parametrize("model", TRAINED, ids=lambda folder: folder.name)
def test_the_readmes_command_lines_run_on_every_trained_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(32, 32, 3)
    readme = PAGES[0].read_text(encoding="utf-8")
    run([*tour(readme), "space create DIR --reference SRC --out SPACE"], model)
    for made in ("DIR", "FULL", "TUNED", "SPACE", "DIR-publish", "report.html", "grid.png"):
        assert Path(made).exists(), made
