"""What norms hand to quantized layers: told by its type, right whatever has happened since, and nothing else taken."""

import copy

import pytest
import torch
from conftest import call_in_its_block, inputs_of_layers
from torch import nn

from diffusers_msfp import set_engine
from diffusers_msfp.engines import ENGINES
from diffusers_msfp.engines.fusion.norms import FusedGroupNorm
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.layers import QUANT_LAYERS, QuantLayer
from diffusers_msfp.layers.convert import layers_by_name
from diffusers_msfp.layers.split import split_layer
from diffusers_msfp.numerics import Codes
from diffusers_msfp.schemes import SCHEMES


def quantized(module: nn.Module, x: torch.Tensor) -> QuantLayer:
    layer = QUANT_LAYERS[type(module)].from_float(module, "place", SCHEMES["w4a4"].inner)
    with torch.no_grad():
        layer(x)
    layer.freeze()
    return layer


def linear() -> QuantLayer:
    return quantized(nn.Linear(8, 4), torch.randn(16, 8))


@pytest.fixture
def block(packed_pipe):
    """A residual block whose first norm hands codes to its first convolution, and an input for it."""
    set_engine(packed_pipe, "int8")
    block = packed_pipe.unet.mid_block.resnets[0]
    return block, torch.randn(2, 64, 4, 4)


REFUSED = r"Layer `place` reads floating-point inputs, but got torch.uint8. Cast the input to the model's dtype"


@pytest.mark.parametrize("engine", [None, "int8", "bf16", "reference"])
@pytest.mark.parametrize("observing", [True, False])
@torch.no_grad()
def test_a_stray_tensor_of_bytes_is_refused(engine, observing):
    stray = torch.randint(0, 15, (2, 8), dtype=torch.uint8)
    layer = linear()
    if observing:
        layer.start_observing(("fp4_e2m1",))
    layer.use_engine(engine and ENGINES[engine]())
    with pytest.raises(UnsupportedError, match=REFUSED):
        layer(stray)
    assert not observing or int(layer.observation.count) == 0


@torch.no_grad()
def test_a_stray_tensor_of_bytes_is_refused_by_parts_and_compiled():
    stray = torch.randint(0, 15, (2, 8), dtype=torch.uint8)
    whole = split_layer(nn.Linear(8, 4), (3, 5), "place")
    for name, part in list(whole.named_children()):
        whole.add_module(name, quantized(nn.Linear(part.in_features, 4), torch.randn(16, part.in_features)))
    with pytest.raises(UnsupportedError, match=REFUSED):
        whole(stray)
    layer = linear()
    layer.use_engine(ENGINES["int8"]())
    layer.prepare()
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match="reads floating-point inputs"):
        torch.compile(layer, backend="eager")(stray)


@torch.no_grad()
def test_a_fused_norm_takes_no_bytes(block):
    parent, x = block
    stray = x.clamp(0, 9).to(torch.uint8)
    for norm in (parent.norm1, nn.GroupNorm(8, 64)):
        with pytest.raises(RuntimeError):
            norm(stray)


@torch.no_grad()
def test_norms_write_nothing_on_other_modules(packed_pipe, images):
    unet = packed_pipe.unet
    set_engine(unet, "int8")
    unet(images, 10)
    before = {name: set(vars(module)) for name, module in unet.named_modules()}
    handed = []
    for norm in [module for module in unet.modules() if type(module) is FusedGroupNorm]:
        codes = call_in_its_block(norm, torch.randn(2, norm.num_channels, 4, 4))
        if type(codes) is Codes:
            handed.append(codes)
            assert codes.reader is norm.feeds.layer()
    assert handed
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == before


def change_range(layer: QuantLayer) -> None:
    layer.store_input(layer.input_scale * 2, layer.input_zero_point * 2)


def change_engine(layer: QuantLayer) -> None:
    layer.use_engine(ENGINES["bf16"]())
    layer.prepare()


def change_range_and_prepare(layer: QuantLayer) -> None:
    change_range(layer)
    layer.prepare()


def drop_engine(layer: QuantLayer) -> None:
    layer.use_engine(None)


@pytest.mark.parametrize("change", [change_range, change_range_and_prepare, change_engine, drop_engine])
@torch.no_grad()
def test_codes_made_before_a_change_mean_what_they_meant(block, change):
    parent, x = block
    codes = call_in_its_block(parent.norm1, x)
    assert type(codes) is Codes
    floats = codes.decoded()
    change(parent.conv1)
    torch.testing.assert_close(parent.conv1(codes), parent.conv1(floats))


@torch.no_grad()
def test_copies_of_a_model_do_not_take_each_other_s_codes(block):
    parent, x = block
    other = copy.deepcopy(parent)
    codes = call_in_its_block(parent.norm1, x)
    assert call_in_its_block(other.norm1, x).reader is other.conv1
    change_range(other.conv1)
    torch.testing.assert_close(other.conv1(codes), other.conv1(codes.decoded()))


@torch.no_grad()
def test_only_the_layer_behind_the_norm_sees_codes(packed_pipe, images, monkeypatch):
    unet = packed_pipe.unet
    set_engine(unet, "int8")
    behind = {m.feeds.layer() for m in unet.modules() if type(m) is FusedGroupNorm}
    read = inputs_of_layers(monkeypatch)
    unet(images, 10)
    layers = layers_by_name(unet)
    names = {layer: name for name, layer in layers.items()}
    seen = {names[layer]: type(x) for layer, x in read}
    assert {name for name, kind in seen.items() if kind is Codes} <= {
        n for n, layer in layers.items() if layer in behind
    }
    assert any(kind is Codes for kind in seen.values())
    assert all(issubclass(kind, torch.Tensor) for kind in seen.values())
