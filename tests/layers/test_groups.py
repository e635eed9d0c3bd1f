"""Group scales in integers: the search is exact, layers store and decode them, engines and files keep them."""

import copy
import io

import pytest
import torch
from conftest import equal_state, make_unet, run
from diffusers import DDPMPipeline, DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from reference import grid_of
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_msfp import FORMATS, quantize_pipeline, set_engine
from diffusers_msfp.calibration import search_groups, search_weight
from diffusers_msfp.checkpoint.describe import describe_checkpoint
from diffusers_msfp.errors import CheckpointError, ConfigError, NonFiniteError
from diffusers_msfp.formats import largest_multiplier
from diffusers_msfp.layers import QUANT_LAYERS
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.numerics.groups import by_weight, multiply_groups_
from diffusers_msfp.schemes import SCHEMES, LayerScheme

SCHEME = SCHEMES["w4g16a16"].inner
MODULES = {
    "whole": nn.Conv2d(16, 24, 3, padding=1),
    "remainder": nn.Conv2d(5, 7, 3, bias=False),
    "one group": nn.Linear(9, 4),
    "linear": nn.Linear(64, 12),
}


def quantized(what: str, scheme: LayerScheme = SCHEME):
    module = MODULES[what]
    return module, QUANT_LAYERS[type(module)].from_float(module, "place", scheme)


def error_of(group: torch.Tensor, unit: float, multiplier: int, name: str) -> float:
    levels = torch.tensor(grid_of(name), dtype=torch.float64) / FORMATS[name].step * unit * multiplier
    return (group.double()[:, None] - levels).square().min(1).values.sum().item()


def test_the_largest_product_fits_a_byte():
    assert {name: largest_multiplier(FORMATS[name]) for name in ("fp4_e1m2", "fp4_e2m1", "fp4_e3m0", "fp8_e4m3")} == {
        "fp4_e1m2": 15,
        "fp4_e2m1": 10,
        "fp4_e3m0": 1,
        "fp8_e4m3": 0,
    }


@pytest.mark.parametrize("name", ["fp4_e1m2", "fp4_e2m1"])
@pytest.mark.parametrize("size", [8, 7])
def test_multipliers_are_the_best_for_their_unit(name, size):
    weight = torch.randn(4, 24) * torch.tensor([1e-4, 1.0, 30.0, 0.2])[:, None]
    found = search_groups(weight, [name], size)
    units = (found.qparams.scale * FORMATS[name].step).flatten().tolist()
    total = 0.0
    for row, unit, chosen in zip(weight, units, found.multipliers.tolist(), strict=True):
        for group, multiplier in zip(row.split(size), chosen, strict=True):
            errors = [error_of(group, unit, m, name) for m in range(1, largest_multiplier(FORMATS[name]) + 1)]
            assert errors[multiplier - 1] == pytest.approx(min(errors), rel=1e-4)
            total += min(errors)
    assert found.error.item() == pytest.approx(total / weight.double().square().sum().item(), rel=1e-4)


def test_groups_lower_the_error():
    weight = torch.randn(8, 256)
    errors = [search_groups(weight, SCHEME.weight, size).error for size in (16, 32, 64, 128)]
    assert errors == sorted(errors)
    assert errors[-1] < search_weight(weight, SCHEME.weight).error


def test_odd_weights():
    zeros = search_groups(torch.zeros(3, 20), SCHEME.weight, 16)
    assert zeros.error == 0
    assert (zeros.qparams.scale == 1).all()
    assert search_groups(torch.zeros(0, 4), SCHEME.weight, 16).multipliers.shape == (0, 1)
    tiny, huge = (search_groups(torch.randn(2, 32) * factor, SCHEME.weight, 16) for factor in (1e-38, 1e37))
    assert torch.isfinite(tiny.qparams.scale).all()
    assert huge.error < 0.02
    with pytest.raises(NonFiniteError):
        search_groups(torch.full((1, 4), torch.nan), SCHEME.weight, 16)
    with pytest.raises(ConfigError, match="signed formats whose integers fit a byte"):
        search_groups(torch.ones(1, 4), ["fp8_e4m3"], 16)
    with pytest.raises(ConfigError, match="2 weights or more, but got 1"):
        LayerScheme(("fp4_e2m1",), group_size=1)
    with pytest.raises(ConfigError, match="must fit 8 bits as integers, unlike `fp8_e4m3`"):
        LayerScheme(("fp8_e4m3",), group_size=16)


@pytest.mark.parametrize("what", MODULES)
def test_a_layer_decodes_what_was_found(what):
    module, layer = quantized(what)
    weight, length = module.weight.detach().flatten(1), layer.matrix_shape[1]
    found = search_groups(weight, SCHEME.weight, 16)
    assert torch.equal(layer.multipliers(), found.multipliers)
    fmt = found.qparams.format
    unit = found.qparams.scale * fmt.step * by_weight(found.multipliers, 16, length)
    levels = torch.tensor(fmt.lattice, dtype=torch.float32)
    nearest = levels[((weight / unit)[..., None] - levels).abs().argmin(-1)]
    assert torch.allclose(layer.dequantize_weight().flatten(1), nearest * unit, rtol=1e-6, atol=0)
    rows = multiply_groups_(nearest.to(torch.int8), found.multipliers, 16)
    assert torch.equal(rows, (nearest * by_weight(found.multipliers, 16, length)).to(torch.int8))
    before = layer.packed_weight.clone()
    layer.store_banks([layer.dequantize_weight()])
    assert torch.equal(layer.packed_weight, before)
    assert layer.weight_error == 0


@pytest.mark.parametrize("what", ["whole", "remainder"])
def test_copies_casts_and_states(what):
    module, layer = quantized(what)
    x = torch.randn(1, module.in_channels, 6, 6)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = QUANT_LAYERS[type(module)].from_float(module, "other", SCHEME)
    other.put_multipliers(torch.ones_like(other.multipliers()))
    other.load_state_dict(torch.load(buffer))
    for twin in (copy.deepcopy(layer), other):
        assert torch.equal(twin(x), expected)
    assert torch.equal(copy.deepcopy(layer).half().dequantize_weight(), layer.dequantize_weight())
    assert torch.equal(layer.to_float(torch.float32)(x), expected)
    coarser = QUANT_LAYERS[type(module)].from_float(module, "place", SCHEMES["w4g32a16"].inner)
    with pytest.raises(CheckpointError, match="in groups of 32.*in groups of 16"):
        coarser.load_state_dict(layer.state_dict())


@pytest.fixture(scope="module")
def _grouped() -> DDPMPipeline:
    return quantize_pipeline(DDPMPipeline(make_unet(), DDPMScheduler()), "w4g16a16")


@pytest.fixture
def grouped(_grouped) -> DDPMPipeline:
    return copy.deepcopy(_grouped)


def test_files(grouped, tmp_path, images):
    grouped.save_pretrained(tmp_path / "a")
    loaded = type(grouped).from_pretrained(tmp_path / "a")
    assert equal_state(loaded.unet, grouped.unet)
    assert torch.equal(run(loaded.unet, images), run(grouped.unet, images))
    sizes = {layer.group_size for _, layer in quant_layers(loaded.unet)}
    assert sizes == {None, 16}
    described = {layer.name: layer for layer in describe_checkpoint(tmp_path / "a").components["unet"].layers}
    for name, layer in quant_layers(loaded.unet):
        rows, length = layer.matrix_shape
        assert described[name].group_size == layer.group_size
        if layer.group_size:
            assert 8 * layer.packed_bytes / (rows * length) <= 4 + 4 / 16 + (32 + 4 + 7) / length
    grouped.unet.dequantize()
    assert run(grouped.unet, images).shape == images.shape


def edited(folder, change) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".group_scale"))
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, file, metadata={"format": "pt"})


HOSTILE = {
    "zero": (torch.zeros_like, "multipliers from 1 to"),
    "shape": (lambda scale: scale[:, :-1].contiguous(), "must have shape"),
    "dtype": (lambda scale: scale.float(), "must be torch.uint8"),
    "missing": (lambda _: None, "must hold"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(grouped, tmp_path, what, monkeypatch):
    change, reason = HOSTILE[what]
    grouped.save_pretrained(tmp_path)
    edited(tmp_path, change)
    digest = "must have the checksum .* that config.json records|the digest in config.json knows|A checkpoint must hold"
    with pytest.raises(CheckpointError, match=digest):
        type(grouped).from_pretrained(tmp_path)
    monkeypatch.setenv("MSFP_CHECK_DIGEST", "0")
    with pytest.raises(CheckpointError, match=reason):
        type(grouped).from_pretrained(tmp_path)


def test_a_multiplier_that_is_too_large_for_its_format():
    layer = quantized("linear", LayerScheme(("fp4_e2m1",), group_size=16))[1]
    layer.check_stored()
    layer.put_multipliers(torch.full_like(layer.multipliers(), 11))
    with pytest.raises(CheckpointError, match="multipliers from 1 to 10 for `fp4_e2m1`"):
        layer.check_stored()


def test_adapters_of_peft(grouped, images):
    before, weights = run(grouped.unet, images), dict(quant_layers(grouped.unet))
    config = LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    inject_adapter_in_model(config, grouped.unet)
    assert not torch.allclose(run(grouped.unet, images), before, atol=1e-3)
    assert dict(quant_layers(grouped.unet)) == weights


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_engines_serve_whole_models(grouped, images, memory):
    expected = run(grouped.unet, images)
    set_engine(grouped, "bf16", memory=memory)
    assert (run(grouped.unet, images) - expected).norm() < 0.05 * expected.norm()
