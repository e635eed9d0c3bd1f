"""Adapters that read codes: one weight with what they add, in every engine, and nothing of it in floats."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from cases import LAYERS, assert_close, quantized
from conftest import call_in_its_block, equal_state, inputs_of_layers, run
from diffusers import UNet2DModel
from torch import nn

from diffusers_msfp import FinetuneConfig, finetune, set_engine
from diffusers_msfp.engines import ENGINES
from diffusers_msfp.engines.cuda import CudaEngine
from diffusers_msfp.engines.fusion.norms import FusedGroupNorm
from diffusers_msfp.engines.int8 import Int8Engine
from diffusers_msfp.errors import CheckpointError
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.methods.talora import AdapterBank, RoutingTable, adapter_rank
from diffusers_msfp.numerics import Codes
from diffusers_msfp.plugin.adapters.talora_files import load_talora, save_talora

SCHEMES = ("w4a4", "w4a8-wide", "w8a8-int8", "w8a8-wide", "w4a16", "w4g16a4", "w4g32a8")
TABLE = torch.arange(3, dtype=torch.uint8)[None]
LOW, HIGH = 100, 900


def adapted(name: str, scheme: str, signed: bool = True):
    """A layer with three adapters beside its weight, each with a grid of its own, and an input."""
    module, shape = LAYERS[name]
    layer, x = quantized(module, scheme, shape, signed)
    rank = adapter_rank(layer.logical_shape, 3)
    bank = AdapterBank(layer.logical_shape, 3, rank, dtype=torch.float16, device="cpu", reads="codes")
    bank.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        bank.up.normal_(std=0.2)
    if layer.input_format is not None:
        factors = torch.tensor([1.0, 1.1, 0.9])
        bank.keep_input(layer.input_scale * factors, layer.input_zero_point * factors)
    layer.adapters = bank
    layer.route_by(RoutingTable(TABLE, 3))
    return layer, x


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "silu"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_engine_equals_the_reference(name, scheme, signed):
    layer, x = adapted(name, scheme, signed)
    routing = layer.routing
    routing.enabled = False
    plain = layer(x)
    routing.enabled = True
    for engine in (ENGINES[name](memory) for name in ENGINES for memory in ("fast", "low")):
        if engine.refusal(layer) is not None:
            continue
        for timestep in (0, 2):
            with routing.at(timestep):
                layer.use_engine(None)
                expected, rounded = layer(x), layer(x.bfloat16())
                layer.use_engine(engine)
                assert_close(layer(x), expected, 1e-5)
                assert_close(layer(x), expected, 1e-5)  # with what the first call has made
                assert_close(layer(x.bfloat16()), rounded, 8e-3)
                assert not x.numel() or not torch.allclose(expected, plain, atol=1e-3)
        routing.enabled = False
        assert_close(layer(x), plain, 1e-5)
        routing.enabled = True


@pytest.mark.parametrize("name", ["conv", "dilated-groups", "conv1d", "linear"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4g16a4", "w8a8-wide", "w4a16"])
@torch.no_grad()
def test_the_sum_is_the_weight_and_the_pair_on_the_quantized_input(name, scheme):
    """`W x + s B (A x)` up to the rounding to 8 bits; exactly the layer without them where they add nothing."""
    layer, x = adapted(name, scheme)
    layer.bias, routing = None, layer.routing
    with routing.at(1):
        read = layer.quantize_input(x, 1) if layer.input_format is not None else x
        alone = layer.compute(read, layer.dequantize_weight(), None)
        beside = layer.adapters(layer, read, 1)
        for routing.scale in (0.5, -1.0, 1.0):
            expected = alone + routing.scale * beside
            assert (layer(x) - expected).norm() < 0.02 * expected.norm()
        layer.adapters.up.zero_()
        if scheme != "w8a8-wide":  # formats of many binades do not fit 8-bit integers
            assert_close(layer(x), alone, 1e-6)


@torch.no_grad()
def test_what_was_made_ready_follows_changes_of_the_pairs_and_of_their_scale():
    layer, x = adapted("conv", "w4a4")
    engine = Int8Engine()
    kept, routing = engine.prepare(layer), layer.routing

    def agreed() -> torch.Tensor:
        with routing.at(1):
            layer.use_engine(None)
            expected = layer(x)
            vars(layer).update(engine=engine, prepared=kept)
            y = layer(x)
        assert layer.prepared is kept
        assert_close(y, expected, 1e-5)
        return y

    before = agreed()
    layer.adapters.up[1] *= 2
    assert not torch.allclose(agreed(), before, atol=1e-3)
    routing.scale = 0.25
    assert not torch.allclose(agreed(), before, atol=1e-3)
    routing.scale = 1.0
    layer.adapters.up[1] /= 2
    assert torch.equal(agreed(), before)
    layer.adapters.up.data.mul_(2)  # which torch does not count
    assert not torch.allclose(agreed(), before, atol=1e-3)
    layer.adapters.up = nn.Parameter(layer.adapters.up / 2, requires_grad=False)
    assert torch.equal(agreed(), before)
    assert {bank for bank, *_ in kept._weights} == {1}, "no sum of before is kept"


@pytest.fixture(scope="module")
def tuned(_packed) -> nn.Module:
    pipe = copy.deepcopy(_packed)
    teacher = copy.deepcopy(_packed)
    teacher.unet.dequantize()
    settings = {"train_steps": 2, "num_inference_steps": 3, "batch_size": 4, "rank": 4, "learning_rate": 2.0}
    finetune(pipe, teacher, FinetuneConfig(reads="codes", **settings))
    for _, layer in quant_layers(pipe.unet):
        with torch.no_grad():
            layer.adapters.up.normal_(std=0.05)
    pipe.unet.timestep_router.table[:, :500] = 0
    pipe.unet.timestep_router.table[:, 500:] = 1
    return pipe.unet


@torch.no_grad()
def test_norms_hand_codes_to_layers_with_adapters_and_nobody_makes_floats_of_them(tuned, images, monkeypatch):
    unet = copy.deepcopy(tuned)
    set_engine(unet, "int8")
    monkeypatch.setattr(AdapterBank, "forward", None)  # reads floats
    monkeypatch.setattr(Codes, "decoded", None)
    read = inputs_of_layers(monkeypatch)
    fed = [module.feeds.layer() for module in unet.modules() if type(module) is FusedGroupNorm]
    behind = {layer.module_name for layer in fed if layer.prepared is not None and layer.prepared.reads_codes}
    assert behind
    for timestep in (LOW, HIGH):
        read.clear()
        run(unet, images, timestep)
        assert behind <= {layer.module_name for layer, x in read if type(x) is Codes}
    mixed = run(unet, images, torch.tensor([LOW, HIGH]))  # adapters of its own for each sample: floats are passed
    assert torch.isfinite(mixed).all()


@pytest.mark.parametrize("memory", ["fast", "low"])
@torch.no_grad()
def test_adapters_switch_with_the_timestep_on_codes(tuned, memory):
    unet = copy.deepcopy(tuned)
    set_engine(unet, "int8", memory=memory)
    parent, x = unet.mid_block.resnets[0], torch.randn(2, 64, 4, 4)
    outputs = {}
    for timestep in (LOW, HIGH, LOW, HIGH):
        with unet.timestep_router.at(timestep):
            codes = call_in_its_block(parent.norm1, x)
            assert type(codes) is Codes
            assert codes.adapter == int(timestep == HIGH)
            y = parent.conv1(codes)
            assert_close(y, parent.conv1(codes.decoded()), 1e-6)
            reference = copy.copy(parent.conv1)
            reference.use_engine(None)
            assert_close(y, reference(codes.decoded()), 1e-5)
            assert torch.equal(outputs.setdefault(timestep, y), y)
    assert not torch.allclose(outputs[LOW], outputs[HIGH], atol=1e-3)
    assert (parent.conv1.prepared.kept_bytes > 0) == (memory == "fast")


@torch.no_grad()
def test_copies_have_adapters_of_their_own(tuned, images):
    unet = copy.deepcopy(tuned)
    set_engine(unet, "int8")
    expected = run(unet, images, LOW)
    other = copy.deepcopy(unet)
    assert torch.equal(run(other, images, LOW), expected)
    for _, layer in quant_layers(other):
        layer.adapters.up.zero_()
    assert not torch.equal(run(other, images, LOW), expected)
    assert torch.equal(run(unet, images, LOW), expected)


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_gradients_reach_the_input_and_pairs_that_somebody_trains(name):
    layer, x = adapted(name, "w4a16")
    layer.use_engine(ENGINES["bf16"]())
    routing = layer.routing
    with routing.at(1), torch.no_grad():
        layer(x)
    bank, x = layer.adapters.cast(torch.float32).requires_grad_(True), x.requires_grad_()
    down, up = (nn.Parameter(part[1].detach().clone()) for part in (bank.down, bank.up))
    with routing.at(1):
        y = layer(x)
        y.sum().backward()
    total = layer.dequantize_weight() + (up @ down.flatten(1)).view(layer.logical_shape)
    layer.compute(x.detach(), total, None).sum().backward()
    for got, want in ((bank.down.grad, down.grad), (bank.up.grad, up.grad)):
        assert torch.allclose(got[1], want, rtol=1e-4, atol=1e-4)
        assert got[0].abs().sum() == got[2].abs().sum() == 0
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(("reads", "version"), [("float", 1), ("codes", 2)])
def test_only_adapters_that_read_codes_raise_the_format_version(tuned, reads, version, tmp_path):
    unet = of_kind(tuned, reads)
    unet.config.quantization_config.format_version = 1
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == version
    assert config["adapters"].get("reads", "float") == reads
    assert equal_state(UNet2DModel.from_pretrained(tmp_path), unet)


@pytest.mark.parametrize("reads", ["float", "codes"])
def test_adapters_of_one_kind_are_not_loaded_as_the_other(tuned, packed_pipe, reads, tmp_path):
    save_talora(of_kind(tuned, reads), tmp_path)
    file = tmp_path / "talora_config.json"
    record = json.loads(file.read_text()) | {"digest": None, "reads": "codes" if reads == "float" else "float"}
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="must hold `codes`, but it is missing|record must say .* read codes"):
        load_talora(packed_pipe.unet, tmp_path)


def of_kind(tuned: nn.Module, reads: str) -> nn.Module:
    """The model, its adapters taken for another kind."""
    unet = copy.deepcopy(tuned)
    if reads == "float":
        routing = unet.timestep_router
        routing.plan = replace(routing.plan, reads="float")
        for _, layer in quant_layers(unet):
            layer.adapters.reads_codes = False
            del layer.adapters.codes
            layer.changed()
    return unet


def test_the_cuda_engine_refuses_them(monkeypatch):
    monkeypatch.setattr(CudaEngine, "capability", staticmethod(lambda _: (9, 0)))
    monkeypatch.setattr("diffusers_msfp.engines.cuda.find_spec", lambda _: True)
    layer, _ = adapted("linear", "w4a4")
    assert "adapters that read codes add to its weight" in CudaEngine().refusal(layer)
