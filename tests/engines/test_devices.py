"""Devices that are not at hand: fake ones, on which whatever reads a value on the CPU fails."""

import logging

import pytest
import torch
from cases import LAYERS, assert_close, quantized
from conftest import make_condition_unet, make_unet
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_msfp import set_engine
from diffusers_msfp.engines import ENGINES, auto, bf16
from diffusers_msfp.formats import FORMATS
from diffusers_msfp.layers.convert import Conversion, convert
from diffusers_msfp.numerics.rounding import _code_table_by_fields, code_table, require_finite
from diffusers_msfp.sampling.observation import freeze

SCHEMES = ("w4a4", "w4g16a8", "w6a6", "w8a8-wide")
HOST_READS = ("aten._local_scalar_dense", "aten.item", "aten.equal")


class NoHostReads(TorchDispatchMode):
    """Fails where a value is read, or a tensor is brought from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        assert not name.startswith(HOST_READS), f"{name} waits for the device"
        made = func(*args, **kwargs)
        if name.startswith("aten._to_copy"):
            assert made.device == args[0].device, f"{name} from {args[0].device} to {made.device}"
        return made


def on_fake_device(model: torch.nn.Module, mode: FakeTensorMode, device: str) -> torch.nn.Module:
    """The model with tensors on a device that need not exist."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor, mode, device)
    return model


def fake(tensor: torch.Tensor, mode: FakeTensorMode, device: str) -> torch.Tensor:
    made = FakeTensor(mode, tensor.detach().to("meta"), torch.device(device))
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made


def denoiser(make, scheme: str, *conditions: torch.Tensor):
    model = make()
    convert(model, Conversion.plan(model, scheme))
    x = torch.randn(2, model.config.in_channels, 8, 8)
    with torch.no_grad():
        model(x, 10, *conditions)
    freeze(model)
    set_engine(model, "reference")
    return model, x


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_reference_reads_nothing_of_a_device(scheme):
    device, text = "cuda:0", torch.randn(2, 5, 16)
    for make, conditions in ((make_unet, ()), (make_condition_unet, (text,))):
        model, x = denoiser(make, scheme, *conditions)
        mode = FakeTensorMode()
        other = on_fake_device(model, mode, device)
        given = [fake(each, mode, device) for each in (x, torch.tensor(10), *conditions)]
        with mode, NoHostReads():
            y = other(*given).sample
        assert y.device == torch.device(device)
        assert y.shape == x.shape


@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_models_run_on_the_meta_device(engine, scheme):
    model, x = denoiser(make_unet, scheme)
    model = model.to("meta")
    set_engine(model, engine)
    y = model(x.to("meta"), torch.tensor(10, device="meta")).sample
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("name", FORMATS)
def test_tables_that_a_device_makes_itself_are_those_of_the_cpu(name):
    fmt, cpu = FORMATS[name], torch.device("cpu")
    assert torch.equal(_code_table_by_fields(fmt, cpu), code_table(fmt, cpu))


def test_infinity_reaches_the_output_where_nobody_looks():
    x = torch.tensor([1.0, -2.0, float("inf"), float("nan")])
    assert require_finite(x.to("meta"), "x").shape == x.shape
    poisoned = x + (x - x)  # what it does there
    assert torch.equal(poisoned.isnan(), ~x.isfinite())
    assert torch.equal(poisoned[:2], x[:2])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["conv", "linear", "circular"])
@torch.no_grad()
def test_bf16_elsewhere_equals_the_reference_and_reads_nothing(name, scheme, monkeypatch):
    layer, x = quantized(*LAYERS[name][:1], scheme, LAYERS[name][1], signed=name == "conv")
    expected = layer(x)
    prepared = ENGINES["bf16"]().prepare(layer)
    prepared.weight(0), prepared.grid(0)
    monkeypatch.setattr(bf16, "is_on_cpu", lambda _: False)
    monkeypatch.setattr(bf16, "require_finite", lambda x, _: x)
    with NoHostReads():
        y = prepared(x)
    assert_close(y, expected, 1e-5)


def test_a_kind_of_device_that_was_never_measured_is_named_once(caplog, monkeypatch):
    auto._say_unmeasured.cache_clear()
    monkeypatch.setattr(auto, "kind_of", lambda _: "cpu of a museum")
    model, _ = denoiser(make_unet, "w4a4")
    with caplog.at_level(logging.WARNING, "diffusers_msfp"):
        set_engine(model, "auto")
        set_engine(model, "bf16")
    said = [record.getMessage() for record in caplog.records if "never measured" in record.getMessage()]
    assert len(said) == 1
    assert "cpu of a museum" in said[0]
    assert "diffusers-msfp doctor" in said[0]
    auto._say_unmeasured.cache_clear()
