"""Schemes, patterns and which layer gets what."""

import re

import pytest
from conftest import make_unet
from torch import nn

from diffusers_msfp import FORMATS, SCHEMES
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.layers.convert import Conversion
from diffusers_msfp.schemes import LayerScheme, input_bits, matches, resolve, scheme_of, weights_only


@pytest.mark.parametrize("name", SCHEMES)
def test_widths_are_what_the_name_says(name):
    scheme = SCHEMES[name]
    pattern = r"(?:int-)?w(\d)(?:g(\d+))?a(\d+)(?:-signed|-int8|-pure|-wide)*"
    weight, group_size, activation = (part and int(part) for part in re.fullmatch(pattern, name).groups())
    assert scheme.inner.group_size == group_size
    assert scheme.edge.group_size is scheme.input.group_size is None
    assert {FORMATS[f].bits for f in scheme.inner.weight} == {weight}
    assert {FORMATS[f].bits for f in scheme.inner.activation} == ({activation} if activation != 16 else set())
    assert {FORMATS[f].bits for f in scheme.edge.weight + scheme.input.weight} == {8}
    assert scheme.input.activation == ()
    assert input_bits(name) == (None if activation == 16 else activation)
    residual = activation < 8 and "-pure" not in name
    assert {FORMATS[f].bits for f in scheme.inner.residual} == ({8} if residual else set())
    assert scheme.edge.residual == scheme.input.residual == ()
    eight = [f for f in scheme.inner.activation + scheme.inner.residual + scheme.edge.activation if f[2] == "8"]
    assert all(FORMATS[name].fits_byte for name in eight) != ("-wide" in name)


def test_one_byte_holds_what_fits_it():
    for fmt in FORMATS.values():
        byte = range(-128, 128) if fmt.signed else range(256)
        assert fmt.fits_byte == all(q in byte for q in fmt.lattice)
    assert {name for name, fmt in FORMATS.items() if fmt.fits_byte and fmt.bits == 8} == {"fp8_e1m6", "fp8_ue1m7"}
    assert all(FORMATS[name].fits_byte for name in ("fp4_e3m0", "fp4_ue3m1", "fp6_e2m3", "fp6_ue2m4"))


def test_version_1_means_what_it_meant():
    assert scheme_of("w4a4", 1).inner.residual == ()
    assert "fp8_e4m3" in scheme_of("w4a8", 1).inner.activation
    assert "fp8_e4m3" not in scheme_of("w4a8", 2).inner.activation
    assert scheme_of("w4a8-int8", 1).inner.activation == ("fp8_e1m6", "fp8_ue1m7")


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_a_weights_only_counterpart(name):
    counterpart = SCHEMES[weights_only(name)]
    assert counterpart.inner.group_size == SCHEMES[name].inner.group_size
    assert counterpart.inner.activation == counterpart.edge.activation == ()
    assert set(SCHEMES[name].inner.weight) <= set(counterpart.inner.weight)


def test_edges_of_a_unet():
    plan = Conversion.plan(make_unet(), "w4a4")
    scheme = SCHEMES["w4a4"]
    assert plan.layers["conv_in"] == scheme.input
    for name in ("conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        assert plan.layers[name] == scheme.edge
    assert plan.layers["down_blocks.0.resnets.0.conv1"] == scheme.inner
    assert not plan.skipped


def test_patterns():
    assert matches("conv1", "down.0.conv1")
    assert not matches("conv1*", "down.0.conv1")
    assert matches("*.conv1", "down.0.conv1")
    overrides = {"down*": "w8a8", "down.0.conv1": "w6a6"}
    assert resolve("down.0.conv1", "w4a4", overrides) == SCHEMES["w6a6"].inner
    assert resolve("down.0.conv2", "w4a4", overrides) == SCHEMES["w8a8"].inner
    assert resolve("conv_in", "w4a4", {"conv_in": "w8a8"}).activation == SCHEMES["w8a8"].inner.activation


def test_kept_and_unsupported_modules_are_reported_with_the_reason(caplog):
    unet = make_unet()
    unet.odd = nn.Conv3d(1, 1, 1)
    plan = Conversion.plan(unet, "w4a4", keep=["conv_out"])
    assert plan.skipped == {
        "conv_out": "matches 'conv_out' in modules_to_not_convert",
        "odd": "no quantized counterpart for Conv3d",
    }
    plan.report(unet)
    assert "2 layers stay float: conv_out: matches" in caplog.text


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match="Unknown scheme 'w3a3'. Known: w4a4, "):
        SCHEMES["w3a3"]
    with pytest.raises(ConfigError, match="`fp4_ue2m2` is unsigned"):
        LayerScheme(("fp4_ue2m2",))
    with pytest.raises(ConfigError, match="at least one weight format"):
        LayerScheme(())
    with pytest.raises(ConfigError, match="at least one signed format"):
        LayerScheme(("fp4_e2m1",), ("fp4_ue2m2",))
    with pytest.raises(ConfigError, match="'convout' matches none"):
        Conversion.plan(make_unet(), "w4a4", keep=["convout"])
    with pytest.raises(ConfigError, match="`scheme_overrides` must match a layer"):
        Conversion.plan(make_unet(), "w4a4", overrides={"nothing": "w8a8"})
    with pytest.raises(ConfigError, match="must have a layer to quantize"):
        Conversion.plan(nn.ReLU(), "w4a4")
