"""Files from strangers: refused with a clear error, no code run; seeded damage of real checkpoints.

What integrity means here: a load that succeeds holds exactly the tensors of the file, all of the shapes and kinds that
config.json records, finite, none missing and none of ours left over. Bytes that decode to other valid numbers are told
by the digest in config.json (`tests/situations/test_integrity.py`), which is off here, so that the rest is seen.
"""

import json
import random
import shutil
from pathlib import Path

import mutations
import pytest
import torch
from conftest import run
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffusers_msfp.checkpoint.describe import describe_checkpoint
from diffusers_msfp.errors import CheckpointError, MSFPError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin import MSFPConfig
from diffusers_msfp.plugin.files.saving import tensors_to_save

FILE = mutations.FILE
PLAN = {"placement": "side", "num_adapters": 2, "num_timesteps": 9, "ranks": {}}
CLEAR = (MSFPError, ValueError, OSError, SafetensorError, RecursionError)


pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def folder(packed_dir, tmp_path) -> Path:
    return Path(shutil.copytree(Path(packed_dir) / "unet", tmp_path / "unet"))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("bomb", [True, False], ids=["code", "tensors"])
def test_pickles_are_refused(folder, bomb):
    content = {"a": Bomb()} if bomb else load_file(folder / FILE)
    torch.save(content, folder / "diffusion_pytorch_model.bin")
    (folder / FILE).unlink()
    with pytest.raises((CheckpointError, OSError), match="safetensors, but got .*bin|Unable to load weights"):
        UNet2DModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "..", "sub/a.safetensors"])
def test_an_index_may_not_lead_elsewhere(folder, name, tmp_path):
    shutil.copy(folder / FILE, tmp_path / "other.safetensors")
    weights = dict.fromkeys(load_file(folder / FILE), name)
    (folder / FILE).unlink()
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises((CheckpointError, ValueError), match="model's folder|not allowed|as safetensors, but"):
        UNet2DModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="must lie in the model's folder"):
        describe_checkpoint(folder)


def test_the_quantizer_itself_refuses_files_from_elsewhere(folder, tmp_path):
    """Older versions of diffusers do not look at the index."""
    from diffusers_msfp import MSFPQuantizer

    quantizer = MSFPQuantizer(MSFPConfig(), pre_quantized=True)
    for files in ([folder / FILE, tmp_path / "b.safetensors"], [tmp_path / "b.safetensors"]):
        with pytest.raises(CheckpointError, match="must lie in the model's folder, but its index names"):
            quantizer.maybe_update_loaded_keys([], [str(file) for file in files])
    assert quantizer.maybe_update_loaded_keys(["a"], [str(folder / FILE)]) == ["a"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"layers": 5}, "`layers` in config.json must be a list, but got int"),
        ({"layers": [[[[[[[[[[[]]]]]]]]]]]}, "at most 8 levels deep"),
        ({"calibration": {"state": "frozen", "last_timestep": "now"}}, "`calibration` in config.json must say"),
        ({"calibration": []}, "`calibration` in config.json must say"),
        ({"modules_to_not_convert": 5}, "must be a list of non-empty strings"),
        ({"scheme": ["w4a4"]}, "Unknown scheme"),
        ({"adapters": PLAN | {"ranks": {"9" * 9: []}}}, "`ranks` must map"),
        ({"adapters": PLAN | {"router_groups": 5}}, "`router_groups` must be a list of patterns"),
    ],
    ids=str,
)
def test_records_that_no_run_wrote(record, reason):
    with pytest.raises(MSFPError, match=reason):
        MSFPConfig.from_dict({"quant_method": "msfp", **record})


@pytest.mark.parametrize("modules", [[5], "conv_in", None], ids=str)
def test_layers_are_named_by_strings(folder, modules):
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["layers"][0]["modules"] = modules
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must have `weight`, `input` and `modules`"):
        UNet2DModel.from_pretrained(folder)


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / FILE) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / FILE, {"format": "pt"})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "must hold `conv_norm_out.bias`, but it does not"),
        (torch.full((32,), float("nan")), "`conv_norm_out.bias` must be finite"),
        (torch.full((32,), float("inf")), "`conv_norm_out.bias` must be finite"),
        (torch.zeros(32, dtype=torch.int64), "`conv_norm_out.bias` must hold floats, but got torch.int64"),
    ],
    ids=["missing", "nan", "infinite", "whole numbers"],
)
def test_damaged_floats(folder, value, reason):
    edit(folder, conv_norm_out__bias=value)
    with pytest.raises(CheckpointError, match=reason):
        UNet2DModel.from_pretrained(folder)


def check_faithful(folder: Path, model: UNet2DModel, images: torch.Tensor) -> None:
    """The model holds the file's tensors and what its config records, and computes numbers or says why not."""
    record = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, state = load_file(folder / FILE), tensors_to_save(model.state_dict(), model.config.quantization_config)
    assert state.keys() == stored.keys() or _is_another_model(folder)
    for name, tensor in state.items():
        assert not tensor.is_meta, name
        actual = stored[name]
        assert torch.equal(tensor, actual.to(tensor.dtype)), name
        assert tensor.dtype == actual.dtype or (tensor.is_floating_point() and actual.is_floating_point()), name
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    recorded = {name: group["weight"] for group in record["layers"] for name in group["modules"]}
    layers = {name: m.weight_format.name for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    assert layers == recorded
    try:
        run(model, images)
    except MSFPError:
        pass
    except Exception:
        if not _is_another_model(folder):
            raise


def _is_another_model(folder: Path) -> bool:
    """Whether diffusers' own part of the config differs from the original; what it then does is diffusers' affair."""
    own, original = (json.loads(file.read_text()) for file in (folder / "config.json", folder.parent / "original.json"))
    del own["quantization_config"], original["quantization_config"]
    return own != original


def damage_and_load(packed_dir: str, tmp_path: Path, images: torch.Tensor, seed: int) -> str:
    """One mutation; `"refused"` or `"loaded"`."""
    rng = random.Random(seed)
    folder = tmp_path / "unet"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(packed_dir) / "unet", folder)
    shutil.copy(folder / "config.json", tmp_path / "original.json")
    mutate = mutations.MUTATIONS[seed % len(mutations.MUTATIONS)]
    what = f"seed {seed}, {mutate.__name__}: {mutate(folder, rng)}"
    try:
        model = UNet2DModel.from_pretrained(folder)
    except CLEAR:
        return "refused"
    except Exception as error:  # noqa: BLE001
        if mutate in mutations.OURS:
            raise AssertionError(what) from error
        return "refused"
    try:
        if hasattr(model, "hf_quantizer"):
            check_faithful(folder, model, images)
    except Exception as error:
        raise AssertionError(what) from error
    return "loaded"


def test_damage_is_refused_or_loaded_faithfully(packed_dir, tmp_path, images):
    outcomes = [damage_and_load(packed_dir, tmp_path, images, seed) for seed in range(99)]
    assert 50 <= outcomes.count("refused") < 99


@pytest.mark.slow
def test_much_more_damage(packed_dir, tmp_path, images):
    for seed in range(99, 3000):
        damage_and_load(packed_dir, tmp_path, images, seed)
