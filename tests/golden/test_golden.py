"""Format versions for good: a checkpoint from the past loads, gives the same result, and is written the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import equal_state
from diffusers import UNet2DModel
from safetensors.torch import load_file

from diffusers_msfp import cli

HERE = Path(__file__).parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


def parts(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file; the order of its metadata is not fixed."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


BOTH = torch.tensor([900, 100])
CHECKPOINTS = {"v1": torch.tensor(500), "v1-merged": BOTH, "v1-side": BOTH, "v2": BOTH}
METHODS = {"v2-temporal": BOTH, "v2-split": BOTH, "v2-observing": torch.tensor(100)}
CHECKPOINTS |= METHODS | {"v2-codes": BOTH}
EXPECTED = {name: "expected" if name[1] == "1" else "expected-v2" for name in CHECKPOINTS}
EXPECTED |= dict.fromkeys(METHODS, "expected-v2-methods") | {"v2-codes": "expected-v2-codes"}


@pytest.mark.parametrize(("name", "timesteps"), CHECKPOINTS.items(), ids=CHECKPOINTS)
def test_reads_and_computes_the_same(name, timesteps):
    unet = UNet2DModel.from_pretrained(HERE / name)
    expected = load_file(HERE / f"{EXPECTED[name]}.safetensors")
    with torch.no_grad():
        y = unet(expected["x"], timesteps).sample
    # float32 sums may differ in their last bits between machines, and a value on a border then moves a step
    assert (y - expected[name]).norm() < 0.05 * expected[name].norm()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_is_written_byte_by_byte_the_same(name, tmp_path):
    model = UNet2DModel.from_pretrained(HERE / name)
    assert model.config.quantization_config.format_version == int(name[1])
    model.save_pretrained(tmp_path)
    (header, data), (new_header, new_data) = (parts(folder / WEIGHTS) for folder in (HERE / name, tmp_path))
    assert header == new_header
    assert data == new_data
    records = [
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (HERE / name, tmp_path)
    ]
    assert records[0] == records[1]
    assert records[0]["format_version"] == int(name[1])
    assert ("digest" in records[0]) == (name[1] == "2")


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


@pytest.mark.parametrize(("name", "reads"), [("v1-side", "float"), ("v2", "float"), ("v2-codes", "codes")])
def test_what_adapters_beside_the_weights_read(name, reads):
    record = json.loads((HERE / name / "config.json").read_text())["quantization_config"]["adapters"]
    assert record.get("reads", "float") == reads
    assert ("conv_out.adapters.codes" in load_file(HERE / name / WEIGHTS)) == (reads == "codes")
    unet = UNet2DModel.from_pretrained(HERE / name)
    assert unet.timestep_router.plan.reads == reads
    assert unet.conv_out.adapters.reads_codes == (reads == "codes")


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name[1] == "1"])
def test_version_1_becomes_version_2_with_the_same_tensors(name, tmp_path):
    shutil.copytree(HERE / name, tmp_path / name)
    before = load_file(HERE / name / WEIGHTS)
    assert cli.convert_checkpoint(tmp_path / name).converted == ["."]
    after = load_file(tmp_path / name / WEIGHTS)
    assert {key for key in after.keys() - before.keys() if not key.endswith(".formats")} == set()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    left, right = UNet2DModel.from_pretrained(HERE / name), UNet2DModel.from_pretrained(tmp_path / name)
    assert equal_state(left, right)
    left.config.quantization_config.format_version = 2
    left.save_pretrained(tmp_path / "saved")
    assert parts(tmp_path / "saved" / WEIGHTS) == parts(tmp_path / name / WEIGHTS)
    records = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("saved", name)]
    assert records[0]["quantization_config"] == records[1]["quantization_config"]


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


@pytest.mark.parametrize(("name", "key"), [("v2-temporal", "temporal"), ("v2-split", "split"), ("v2-observing", None)])
def test_methods_have_their_place(name, key):
    record = json.loads((HERE / name / "config.json").read_text())["quantization_config"]
    tensors = {tensor.rpartition(".")[2] for tensor in load_file(HERE / name / WEIGHTS)}
    assert {"temporal", "split"} & record.keys() == ({key} if key else set())
    assert ("timesteps" in tensors, "features" in tensors) == (key == "temporal", key == "temporal")
    assert ({"observed_sample", "observed_count", "observed_range"} <= tensors) == (key is None)
    assert record["calibration"]["state"] == ("frozen" if key else "observing")
