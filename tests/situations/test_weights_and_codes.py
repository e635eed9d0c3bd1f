"""What foreign code reads of a quantized layer, and what it puts between a norm and the layer behind it."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from conftest import ONE_BLOCK, WAYS, call_in_its_block, change_scale, make_condition_unet, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from pipelines import make_small_pipe
from torch import nn

from diffusers_msfp import MSFPConfig, quantize_pipeline, set_engine
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.numerics import Codes
from diffusers_msfp.plugin.quantize import quantize_model


def twin(model: nn.Module) -> nn.Module:
    """The float model with the decoded weights."""
    return copy.deepcopy(model).dequantize()


@pytest.fixture(scope="module")
def _with_codes() -> DDPMPipeline:
    return quantize_pipeline(DDPMPipeline(make_unet(), DDIMScheduler()), "w4a8", num_samples=2, num_inference_steps=3)


@pytest.fixture
def pipe(_with_codes) -> DDPMPipeline:
    """Calibrated, w4a8."""
    return copy.deepcopy(_with_codes)


def first_layer(model: nn.Module, kind: type) -> QuantLayer:
    return next(m for m in model.modules() if isinstance(m, QuantLayer) and isinstance(m, kind))


@pytest.mark.situation("an attention processor casts hidden states to `layer.weight.dtype`", "right")
def test_processor_that_casts_to_the_weights_dtype():
    model = make_condition_unet()
    quantize_model(model, MSFPConfig("w4a16"))
    reference = twin(model)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    for each in (model, reference):
        each.set_attn_processor(CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False))
    with torch.no_grad():
        expected = reference(x, 10, encoder_hidden_states=context).sample
        torch.testing.assert_close(model(x, 10, encoder_hidden_states=context).sample, expected)


@pytest.mark.situation("a tensor of integers reaches a quantized layer", "refused")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_integers_are_not_taken_for_codes(packed_pipe, dtype, engine):
    set_engine(packed_pipe, engine)
    for kind, shape in ((nn.Linear, lambda m: (2, m.in_features)), (nn.Conv2d, lambda m: (2, m.in_channels, 4, 4))):
        layer = first_layer(packed_pipe.unet, kind)
        with pytest.raises(UnsupportedError, match=f"reads floating-point inputs, but got {dtype}. Cast the input"):
            layer(torch.ones(shape(layer)).to(dtype))


@pytest.mark.situation("foreign code reads shape, dtype, device and numbers of `layer.weight`", "right")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_is_the_float_weight(dtype):
    model = make_unet().to(dtype)
    sizes = {name: module.weight.shape for name, module in model.named_modules() if type(module) is nn.Conv2d}
    quantize_model(model, MSFPConfig("w4a8"))
    reference = twin(model)
    for name, shape in sizes.items():
        layer, module = model.get_submodule(name), reference.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (shape, dtype, torch.device("cpu"))
        assert (weight.ndim, weight.numel(), len(weight), weight.size(0)) == (4, module.weight.numel(), *[shape[0]] * 2)
        assert torch.equal(weight, module.weight)
        norms = torch.linalg.norm(weight.flatten(1).float(), dim=1)
        assert torch.equal(norms, module.weight.flatten(1).float().norm(dim=1))
        assert weight.tolist() == module.weight.tolist()
        parts = (lambda w: w[0], lambda w: w[:, 1:], lambda w: w.transpose(0, 1), lambda w: w.view(-1).chunk(2)[1])
        for part in parts:
            assert part(weight).stride() == part(module.weight).stride()
            assert torch.equal(part(weight), part(module.weight))
            assert torch.equal(part(weight) * 2, part(module.weight) * 2)
            assert torch.equal(part(weight).detach().reshape(-1), part(module.weight).detach().reshape(-1))
        with torch.inference_mode():
            assert torch.equal(weight.to(torch.float64).mul_(2), module.weight.to(torch.float64).mul_(2))
        assert type(copy.deepcopy(weight)) is torch.Tensor
        assert not weight.requires_grad
    scale = torch.ones((), requires_grad=True)
    (layer.weight.float() * scale).sum().backward()
    assert scale.grad == module.weight.float().sum()


@pytest.mark.situation(
    "foreign code writes into (a part of) `layer.weight`, assigns to it or to its `.data`", "refused"
)
def test_weight_cannot_be_written(packed_pipe):
    layer = first_layer(packed_pipe.unet, nn.Conv2d)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    delta = torch.ones(layer.logical_shape)

    def assign_data():
        layer.weight.data = delta

    def assign():
        layer.weight = nn.Parameter(delta)

    def add_to_data():
        layer.weight.data += delta

    def initialise():
        nn.init.zeros_(layer.weight)

    def assign_to_a_part():
        layer.weight[:, 0] = 0

    def scale_a_part():
        layer.weight.data[0] *= 2

    writes = (lambda: layer.weight.add_(delta), lambda: layer.weight.copy_(delta), initialise, assign, assign_data)
    parts = (lambda: layer.weight[0].zero_(), lambda: layer.weight.view(-1).mul_(2), assign_to_a_part, scale_a_part)
    parts += (lambda: layer.weight[:, 1:].transpose(0, 1).copy_(delta[:, 1:].transpose(0, 1)),)
    others = (lambda: torch.mul(delta, 2, out=layer.weight), lambda: torch._foreach_mul_([layer.weight], 2))
    for write in (*writes, *parts, *others, add_to_data):
        with pytest.raises(UnsupportedError, match="is packed and cannot be written.*dequantize"):
            write()
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.situation("a hook between a norm and a quantized layer reads or changes what passes", "right")
def test_hooks_see_floats(packed_pipe, images):
    expected = run(packed_pipe.unet, images)
    seen = []

    def look(_module, args):
        seen.append(args[0].float().abs().mean().item())

    def change(_module, args):
        return (args[0] * 1.0,)

    block = packed_pipe.unet.down_blocks[0].resnets[0]
    for hook in (look, change):
        for module in (block.conv1, block.conv2, block.nonlinearity, block.dropout):
            handle = module.register_forward_pre_hook(hook)
            error = (run(packed_pipe.unet, images) - expected).norm() / expected.norm()
            handle.remove()
            assert error < 0.05  # a value on a border may be rounded elsewhere
    assert len(seen) == 6  # three times the activation, which the time embedding shares
    assert all(0 < value < 10 for value in seen)


@pytest.mark.situation("somebody exchanges the activation or the forward of a residual block", "right")
def test_exchanged_activation_and_forward(packed_pipe, images):
    def blocks_forward(block):
        def forward(x, temb, *_):
            y = block.conv1(nn.functional.relu(block.norm1(x)))
            y = y + block.time_emb_proj(nn.functional.silu(temb))[:, :, None, None]
            y = block.conv2(nn.functional.relu(block.norm2(y)))
            return y + (x if block.conv_shortcut is None else block.conv_shortcut(x))

        return forward

    def exchange(unet):
        first, second = unet.down_blocks[0].resnets[0], unet.mid_block.resnets[0]
        first.nonlinearity = nn.ReLU()
        second.forward = blocks_forward(second)

    results = {}
    for engine in ("auto", "reference"):
        unet = copy.deepcopy(packed_pipe.unet)
        set_engine(unet, engine)
        exchange(unet)
        results[engine] = run(unet, images)
    assert (results["auto"] - results["reference"]).norm() < 0.05 * results["reference"].norm()


@pytest.mark.situation("codes that were made for one layer reach another", "right")
def test_codes_of_another_layer(packed_pipe):
    set_engine(packed_pipe, "int8")
    block = packed_pipe.unet.mid_block.resnets[0]
    x = torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        codes = call_in_its_block(block.norm1, x)
        assert isinstance(codes, Codes)
        assert codes.dtype == torch.float32
        torch.testing.assert_close(block.conv2(codes), block.conv2(codes.decoded()))
        torch.testing.assert_close(block.conv1(codes), block.conv1(codes.decoded()))


@pytest.mark.situation("`train()` on a model with dropout, without gradients", "right")
def test_dropout_in_train_mode(images, monkeypatch):
    def drop(x, p, training, inplace=False):  # torch draws other values for other memory layouts
        return x * (torch.arange(x.shape[1]) % 2).view(-1, 1, 1) * 2 if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    pipe = DDPMPipeline(make_unet(dropout=0.5), DDIMScheduler())
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    unet = pipe.unet.train()
    results = {}
    for engine in ("auto", "reference"):
        set_engine(pipe, engine)
        results[engine] = run(unet, images)
    error = (results["auto"] - results["reference"]).norm() / results["reference"].norm()
    assert error < 0.05
    assert (run(unet.eval(), images) - results["reference"]).norm() > 0.1 * results["reference"].norm()  # it was active


@pytest.mark.situation("layers are called with the keyword of `nn.Linear` and `nn.Conv2d`: `layer(input=x)`", "right")
def test_keyword_of_the_float_layer(packed_pipe):
    for kind, shape in ((nn.Linear, lambda m: (2, m.in_features)), (nn.Conv2d, lambda m: (2, m.in_channels, 4, 4))):
        layer = first_layer(packed_pipe.unet, kind)
        x = torch.randn(shape(layer))
        assert torch.equal(layer(input=x), layer(x))


@pytest.mark.situation("a state dict with the names that files have is loaded with `load_state_dict`", "right")
def test_names_of_files_in_a_state_dict(packed_pipe):
    state = {key.replace("packed_weight", "weight"): value for key, value in packed_pipe.unet.state_dict().items()}
    other = copy.deepcopy(packed_pipe.unet)
    for module in other.modules():
        if isinstance(module, QuantLayer):
            module.packed_weight.zero_()
    other.load_state_dict(state)
    assert all(torch.equal(value, packed_pipe.unet.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.situation("T5 and other code casts to `self.wo.weight.dtype` before it calls the layer", "right")
def test_text_pipeline_keeps_its_dtype():
    pipe = make_small_pipe().to(torch.bfloat16)
    quantize_pipeline(pipe, "w4a8", num_samples=1, num_inference_steps=2)
    assert {layer.weight.dtype for layer in pipe.unet.modules() if isinstance(layer, QuantLayer)} == {torch.bfloat16}


def test_a_state_dict_keeps_no_model():
    unet = make_unet(**ONE_BLOCK)
    quantize_model(unet, MSFPConfig("w4a16"))
    state, known = unet.state_dict(), weakref.ref(unet)
    assert state["conv_in.weight"].shape == unet.conv_in.weight.shape
    del unet
    gc.collect()
    assert known() is None
    assert state["conv_in.packed_weight"].dtype == torch.uint8
    with pytest.raises(KeyError):
        state["conv_in.weight"]


@pytest.mark.situation("tensors of a quantized model that has run are written to, or exchanged, one by one", "right")
@pytest.mark.parametrize("way", WAYS)
def test_tensors_that_are_written_to_reach_the_engine(packed_pipe, images, way):
    fresh = copy.deepcopy(packed_pipe.unet)  # without what an engine made ready
    before = run(packed_pipe.unet, images)
    for unet in (fresh, packed_pipe.unet):
        for _, layer in quant_layers(unet):
            change_scale(layer, way)
    found = run(packed_pipe.unet, images)
    assert torch.equal(found, run(fresh, images))
    assert not torch.equal(found, before)


@pytest.mark.situation("somebody's own block around the norms and layers of a residual block", "right")
@pytest.mark.parametrize("way", ["module", "class", "wraps"])
def test_blocks_of_ones_own(pipe, images, way, monkeypatch):
    def forward(block, x, temb, *_, **__):
        y = block.conv1(nn.functional.relu(block.norm1(x)))
        y = y + block.time_emb_proj(nn.functional.silu(temb))[:, :, None, None]
        y = block.conv2(nn.functional.relu(block.norm2(y)))
        return y + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    class Own(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.__dict__.update(vars(block))

    Own.forward = forward
    run(pipe.unet, images)
    if way == "module":
        pipe.unet.mid_block.resnets[0] = Own(pipe.unet.mid_block.resnets[0])
    elif way == "class":
        monkeypatch.setattr(ResnetBlock2D, "forward", forward)
    else:  # which takes over the name of the original's module
        monkeypatch.setattr(ResnetBlock2D, "forward", functools.wraps(ResnetBlock2D.forward)(forward))
    found = run(pipe.unet, images)
    set_engine(pipe, "reference")
    expected = run(pipe.unet, images)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.situation("a hook writes into what a quantized layer reads, in place", "right")
@pytest.mark.parametrize("name", ["conv1", "conv2", "dropout"])
def test_hooks_that_write_in_place(pipe, images, name):
    def write(_module, args):
        args[0].data[0] *= 0.5
        args[0][:, 1] = 0

    before, found = run(pipe.unet, images), {}
    for engine in ("auto", "reference"):
        set_engine(pipe, engine)
        handle = getattr(pipe.unet.mid_block.resnets[0], name).register_forward_pre_hook(write)
        found[engine] = run(pipe.unet, images)
        handle.remove()
    assert (found["auto"] - found["reference"]).norm() < 0.02 * found["reference"].norm()
    assert (found["auto"] - before).norm() > 0.02 * before.norm()
