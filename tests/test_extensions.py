"""The pages say how to add a format, an engine and a method: a copy of the package, changed by exactly these steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

PACKAGE = Path(__file__).parents[1] / "diffusers_msfp"
SECTIONS = {"numerics": "Add a format", "engines": "Add an engine", "methods": "Add a method"}
"""Room → title of the section in its page."""

OPTIONAL = ("gradio", "numba", "onnx", "openvino", "triton")

WITHOUT = f"""
import sys
sys.modules |= dict.fromkeys({OPTIONAL})
import diffusers_msfp.cli.app
from diffusers_msfp.engines.kernels import NAME
from diffusers_msfp.engines.triton import capability, device_codes, gemm
print(NAME)
"""

USE = """
import json, sys
import torch
from command_line import program
from diffusers import DiffusionPipeline
from diffusers_msfp import set_engine
from diffusers_msfp.engines.choose import engines_of
from diffusers_msfp.layers.convert import quant_layers

source, out = sys.argv[1:]
short = ("--num-samples", 1, "--num-inference-steps", 2, "--json")
done = program("quantize", source, "--scheme", "w5a8", "--recipe", "halved", "--out", out, *short)
assert done.returncode == 0, done.stderr
quantized = json.loads(done.stdout)
original, packed = map(DiffusionPipeline.from_pretrained, (source, out))
layers = dict(quant_layers(packed.unet))
set_engine(packed, "plain")
engines, errors = engines_of(packed.unet), []
for name, layer in layers.items():
    x = torch.rand(2, layer.in_channels, 5, 5) if layer.weight.ndim == 4 else torch.rand(2, layer.in_features)
    with torch.no_grad():
        made = layer(x)
        layer.use_engine(None)
        errors.append(float((made - layer(x)).norm() / made.norm()))
biases = [
    torch.equal(layer.bias, 0.5 * original.unet.get_submodule(name).bias)
    for name, layer in layers.items() if layer.bias is not None
]
bits = sorted({layer.weight_format.bits for layer in layers.values()})
found = {"quantize": quantized, "engines": engines, "error": max(errors), "halved": biases, "bits": bits}
print(json.dumps(found))
"""


def test_what_is_optional_is_not_needed():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch\n"


def blocks(room: str) -> list[tuple[str, str]]:
    """Kind and text of the section's code blocks."""
    page = (PACKAGE / room / "README.md").read_text(encoding="utf-8")
    section = page.partition(f"## {SECTIONS[room]}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)
    return [(kind, dedent(text)) for _, kind, text in found]


def apply(kind: str, text: str, package: Path) -> None:
    """Write a new file, or change lines of files: without lines to be replaced, new ones go to the end."""
    if kind == "py":
        place, _, code = text.removeprefix("# ").partition("\n")
        (package / place).parent.mkdir(exist_ok=True)
        (package / place).write_text(code, encoding="utf-8")
        return
    for change in re.split(r"^--- ", text, flags=re.MULTILINE)[1:]:
        place, *lines = change.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] == sign) for sign in "-+")
        source = (package / place).read_text(encoding="utf-8")
        assert not old or source.count(old) == 1, f"{place} must have once: {old}"
        changed = source.replace(old, new) if old else source + new
        (package / place).write_text(changed, encoding="utf-8")


@pytest.mark.parametrize("room", SECTIONS)
def test_the_steps_are_short(room):
    for kind, text in blocks(room):
        assert kind in ("py", "diff")
        assert len([line for line in text.splitlines() if line.strip()]) <= 16  # with the line that names the file


def test_a_format_an_engine_and_a_method_are_added_as_the_pages_say(tiny_dir, tmp_path):
    package = tmp_path / "diffusers_msfp"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for room in SECTIONS:
        for kind, text in blocks(room):
            apply(kind, text, package)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent / "tests")])}
    command = [sys.executable, "-c", USE, tiny_dir, tmp_path / "packed"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    made = used["quantize"]
    assert [stage["stage"] for stage in made["stages"]] == ["biases"]
    assert made["stages"][0]["figures"] == {"halved": len(used["halved"])}
    assert used["halved"]
    assert all(used["halved"])
    assert used["bits"] == [5, 8]
    assert used["engines"] == {"plain": made["layers"]}
    assert used["error"] < 1e-6
