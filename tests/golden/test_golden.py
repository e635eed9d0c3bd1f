"""Format version 1 for good: a checkpoint from the past loads, gives the same result, and is written the same."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

import diffusers_msfp  # noqa: F401

HERE = Path(__file__).parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


def parts(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file; the order of its metadata is not fixed."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


CHECKPOINTS = {"v1": torch.tensor(500), "v1-merged": torch.tensor([900, 100]), "v1-side": torch.tensor([900, 100])}


@pytest.mark.parametrize(("name", "timesteps"), CHECKPOINTS.items(), ids=CHECKPOINTS)
def test_reads_and_computes_the_same(name, timesteps):
    unet = UNet2DModel.from_pretrained(HERE / name)
    expected = load_file(HERE / "expected.safetensors")
    with torch.no_grad():
        y = unet(expected["x"], timesteps).sample
    # float32 sums may differ in their last bits between machines, and a value on a border then moves a step
    assert (y - expected[name]).norm() < 0.05 * expected[name].norm()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_is_written_byte_by_byte_the_same(name, tmp_path):
    UNet2DModel.from_pretrained(HERE / name).save_pretrained(tmp_path)
    (header, data), (new_header, new_data) = (parts(folder / WEIGHTS) for folder in (HERE / name, tmp_path))
    assert header == new_header
    assert data == new_data
    records = [
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (HERE / name, tmp_path)
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("placement", ["merged", "side"])
def test_adapters_have_their_place(placement):
    record = json.loads((HERE / f"v1-{placement}" / "config.json").read_text())["quantization_config"]
    tensors = load_file(HERE / f"v1-{placement}" / WEIGHTS)
    base = load_file(HERE / "v1" / WEIGHTS)
    assert record["format_version"] == 1
    assert record["adapters"]["placement"] == placement
    assert tensors["timestep_router.table"].shape == (2, 1000)
    adapters = {name.rpartition(".")[2] for name in tensors if ".adapters." in name}
    banks = tensors["conv_out.weight"].shape[0] // base["conv_out.weight"].shape[0]
    assert (adapters, banks) == (
        (set(), 2) if placement == "merged" else ({"down", "up", "input_scale", "input_zero_point"}, 1)
    )


def test_holds_every_kind_of_tensor():
    tensors = load_file(HERE / "v1" / WEIGHTS)
    kinds = {name.rpartition(".")[2] for name in tensors}
    assert kinds == {
        "weight",
        "bias",
        "weight_scale",
        "weight_error",
        "input_scale",
        "input_zero_point",
        "input_error",
    }
    formats = {
        name
        for group in json.loads((HERE / "v1" / "config.json").read_text())["quantization_config"]["layers"]
        for name in (group["weight"], group["input"])
    }
    assert {name.split("_")[0] for name in formats if name} == {"fp4", "fp6", "fp8"}
    assert any(name and "_u" in name for name in formats)
