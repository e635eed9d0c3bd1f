"""Devices that are not at hand: a fake one and the meta device, on which whatever reads a value on the CPU fails."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import LAYERS, assert_close, quantized
from conftest import ONE_BLOCK, make_unet
from elsewhere import NoHostReads

from diffusers_msfp import set_engine
from diffusers_msfp.engines import ENGINES, auto, bf16
from diffusers_msfp.formats import FORMATS
from diffusers_msfp.layers.convert import Conversion, convert
from diffusers_msfp.numerics.rounding import _code_table_by_fields, code_table, require_finite
from diffusers_msfp.sampling.observation import freeze

SCHEMES = ("w4a4", "w4g16a8", "w6a6", "w8a8-wide")


def denoiser(scheme: str):
    model = make_unet(**ONE_BLOCK | {"down_block_types": ("AttnDownBlock2D",)})
    convert(model, Conversion.plan(model, scheme))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x, 10)
    freeze(model)
    set_engine(model, "reference")
    return model, x


def test_the_reference_reads_nothing_of_a_device():
    """UNets with and without text, each in a scheme of its own."""
    here = Path(__file__)
    path = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(here.with_name("elsewhere.py"))]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_models_run_on_the_meta_device(scheme):
    made, x = denoiser(scheme)
    for engine in ("reference", "auto"):
        model = copy.deepcopy(made).to("meta")
        set_engine(model, engine)
        y = model(x.to("meta"), torch.tensor(10, device="meta")).sample
        assert y.is_meta, engine
        assert y.shape == x.shape, engine


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
    prepared.weight(0, x.dtype), prepared.grid(0)
    monkeypatch.setattr(bf16, "is_on_cpu", lambda _: False)
    monkeypatch.setattr(bf16, "require_finite", lambda x, _: x)
    with NoHostReads():
        y = prepared(x)
    assert_close(y, expected, 1e-5)


def test_a_kind_of_device_that_was_never_measured_is_named_once(caplog, monkeypatch):
    auto._say_unmeasured.cache_clear()
    monkeypatch.setattr(auto, "kind_of", lambda _: "cpu of a museum")
    model, _ = denoiser("w4a4")
    with caplog.at_level(logging.WARNING, "diffusers_msfp"):
        set_engine(model, "auto")
        set_engine(model, "bf16")
    said = [record.getMessage() for record in caplog.records if "never measured" in record.getMessage()]
    assert len(said) == 1
    assert "cpu of a museum" in said[0]
    assert "diffusers-msfp doctor" in said[0]
    auto._say_unmeasured.cache_clear()
