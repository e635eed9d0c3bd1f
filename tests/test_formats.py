"""Every format of the registry against its own bit layout, and names that make no sense."""

import ml_dtypes
import numpy as np
import pytest
from reference import grid_of

from diffusers_msfp import FORMATS, FPFormat
from diffusers_msfp.errors import FormatError
from diffusers_msfp.formats import ALIASES

OUTSIDE = {"fp4_e2m1": "float4_e2m1fn", "fp6_e2m3": "float6_e2m3fn", "fp6_e3m2": "float6_e3m2fn"}


def test_registry_holds_every_split_of_4_6_and_8_bits():
    expected = {
        f"fp{bits}_{'u' * (not sign)}e{e}m{bits - sign - e}"
        for bits in (4, 6, 8)
        for sign in (0, 1)
        for e in range(1, 6)
        if bits - sign - e >= 0
    }
    assert set(FORMATS) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_values_follow_from_the_bit_layout(name):
    fmt = FORMATS[name]
    values = [q * fmt.step for q in fmt.code_values]
    assert values == grid_of(name)
    assert list(fmt.grid) == sorted(set(values))
    assert fmt.max == max(values)
    assert (1 if fmt.signed else 0) + fmt.exponent_bits + fmt.mantissa_bits == fmt.bits
    assert fmt.step == min(v for v in values if v > 0)


@pytest.mark.parametrize("name", OUTSIDE)
def test_equals_ml_dtypes(name):
    fmt = FORMATS[name]
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    outside = codes.view(getattr(ml_dtypes, OUTSIDE[name])).astype(float)
    assert outside.tolist() == grid_of(name)
    assert FORMATS[OUTSIDE[name]] is fmt


def test_8_bit_formats_equal_ml_dtypes_where_it_has_numbers():
    codes = np.arange(256, dtype=np.uint8)
    for name, outside in (("fp8_e3m4", "float8_e3m4"), ("fp8_e4m3", "float8_e4m3"), ("fp8_e5m2", "float8_e5m2")):
        values = codes.view(getattr(ml_dtypes, outside)).astype(float)
        finite = np.isfinite(values)
        assert finite.sum() >= 224
        assert np.array_equal(values[finite], np.array(grid_of(name))[finite])


def test_aliases_name_registered_formats():
    assert all(FORMATS[alias].name == name for alias, name in ALIASES.items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fp4_e2m9", "1 \\+ 2 \\+ 9 = 12 bits, but its name says 4"),
        ("fp4_ue2m1", "2 \\+ 1 = 3 bits"),
        ("fp4_e0m3", "1 to 5 exponent bits"),
        ("fp8_e6m1", "1 to 5 exponent bits"),
        ("fp5_e2m2", "4, 6, 8 bits"),
        ("e2m1", "must read"),
        ("", "must read"),
        (None, "must read"),
        (4, "must read"),
    ],
)
def test_nonsense_is_refused_with_the_reason(name, reason):
    with pytest.raises(FormatError, match=reason):
        FPFormat(name)
    with pytest.raises(FormatError, match=reason):
        FORMATS[name]
