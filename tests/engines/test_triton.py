"""Kernels against oracles in integers and float64: on a GPU where there is one, else under Triton's interpreter.

The interpreter must be on before the kernels are imported.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton")

from interpreter import bfloat16_dots  # noqa: F401 – a fixture

from diffusers_msfp import FORMATS, QParams
from diffusers_msfp.engines.triton import conv2d as conv
from diffusers_msfp.engines.triton import gemm, w4a16
from diffusers_msfp.engines.triton.capability import code_dtypes, limits
from diffusers_msfp.engines.triton.device_codes import code_offset, holds, weight_codes
from diffusers_msfp.engines.triton.input_codes import quantize
from diffusers_msfp.errors import ShapeError
from diffusers_msfp.layers.kinds import QuantConv2d, QuantLinear
from diffusers_msfp.numerics import decode, pack
from diffusers_msfp.numerics.rounding import quantize_to_lattice
from diffusers_msfp.schemes import LayerScheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, BF16, FP16, FP32 = torch.int8, torch.bfloat16, torch.float16, torch.float32
SIGNED = [name for name, fmt in FORMATS.items() if fmt.signed]
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
WEIGHTS_INT8 = [name for name in SIGNED if holds(INT8, FORMATS[name])]
INPUTS_INT8 = [name for name, fmt in FORMATS.items() if holds(INT8, fmt)]
FOUR_BITS = [name for name in SIGNED if FORMATS[name].bits == 4]

EXACT = {FP32: True, FP16: True, BF16: DEVICE == "cuda"}  # the interpreter truncates to bfloat16

pytestmark = pytest.mark.usefixtures("bfloat16_dots")


def integers(*shape: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape)


# ── quantizing ───────────────────────────────────────────────────────────────────────────────────────────────────


def adversarial(fmt, unit: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Lattice values, the ties between them, their neighbours, both zeros, subnormals, and what must saturate."""
    lattice = torch.tensor(fmt.lattice, dtype=torch.float64)
    points = torch.cat((lattice, (lattice[1:] + lattice[:-1]) / 2)) - k.double()
    points = (points * unit.double()).float()
    infinity = torch.tensor(torch.inf)
    near = torch.cat((points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)))
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 3.4e38, -3.4e38, 1e-6])
    return torch.cat((near, special, torch.randn(500) * fmt.lattice_max * unit, -unit * torch.rand(100)))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of the interpreter
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_bit_equal(name):
    fmt = FORMATS[name]
    magnitudes = fmt.magnitudes
    for scale in (1.0, 0.3, 1e-20, 7e-39, 1.7e5):
        for k in (0,) if fmt.signed else (0, magnitudes[1], magnitudes[len(magnitudes) // 2], magnitudes[-1]):
            unit = QParams(fmt, scale).unit
            qparams = QParams(fmt, scale, -k * unit)
            x = adversarial(fmt, unit, torch.tensor(float(k)))
            x = x[torch.isfinite(x)]
            q, k_found = quantize_to_lattice(x, qparams)
            assert k_found == k
            inputs = (x.to(DEVICE), (1 / unit).to(DEVICE), k_found.to(DEVICE), fmt)
            assert torch.equal(quantize(*inputs, dtype=FP32).view(torch.int32).cpu(), q.view(torch.int32))
    for dtype in (INT8, BF16):
        if holds(dtype, fmt):
            offset = code_offset(fmt, dtype)
            assert torch.equal(quantize(*inputs, dtype=dtype, offset=offset).float().cpu() + offset, q)
    if not fmt.signed and fmt.lattice_max <= 255:
        assert torch.equal(quantize(*inputs, dtype=torch.uint8).float().cpu(), q)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_inputs_are_widened_first(dtype):
    qparams = QParams("fp4_ue2m2", 0.11, -0.37)
    x = torch.randn(3000).to(dtype)
    q, k = quantize_to_lattice(x, qparams)
    codes = quantize(x.to(DEVICE), (1 / qparams.unit).to(DEVICE), k.to(DEVICE), qparams.format)
    assert torch.equal(codes.float().cpu(), q)


def test_quantizing_keeps_shape_and_memory_order():
    one, zero, fmt = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE), FORMATS["fp4_e2m1"]
    x = torch.arange(2 * 5 * 3 * 7, dtype=FP32, device=DEVICE).view(2, 5, 3, 7).remainder(9) - 4
    last = x.contiguous(memory_format=torch.channels_last)
    for view in (x, last, x.transpose(0, 3), x[:, ::2], x[:, :1].expand(2, 5, 3, 7), x[:0], x[0, 0, 0, 0]):
        codes = quantize(view, one, zero, fmt)
        want = quantize_to_lattice(view.cpu(), QParams(fmt, 1 / fmt.step))[0]
        assert codes.shape == view.shape
        assert torch.equal(codes.float().cpu(), want)
    assert quantize(last, one, zero, fmt).stride() == last.stride()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_are_reported(value):
    one, fmt = torch.ones((), device=DEVICE), FORMATS["fp4_e2m1"]
    x, bad = torch.full((1500,), 3e38, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    quantize(x, one, one, fmt, bad=bad)
    assert bad.item() == 0
    x[1400] = value
    quantize(x, one, one, fmt, bad=bad)
    assert bad.item() == 1


# ── convolutions ─────────────────────────────────────────────────────────────────────────────────────────────────

GEOMETRIES = {  # batch, channels, height, width, outputs, kernel, stride, padding, dilation, groups
    "3x3": (2, 8, 12, 12, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "several tiles": (2, 70, 9, 9, 150, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "many channels": (1, 131, 3, 2, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride": (1, 5, 7, 6, 4, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "dilation": (1, 3, 11, 9, 5, (3, 2), (2, 1), (1, 2), (2, 3), 1),
    "groups": (2, 12, 5, 4, 18, (3, 3), (1, 2), (1, 1), (1, 1), 3),
    "depthwise": (1, 6, 4, 4, 6, (3, 3), (1, 1), (2, 2), (1, 1), 6),
    "padding beyond": (1, 2, 2, 1, 3, (2, 2), (1, 1), (3, 2), (1, 1), 1),
    "one row": (2, 9, 1, 13, 4, (1, 3), (1, 2), (0, 1), (1, 1), 1),
    "empty batch": (0, 4, 5, 5, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def convolution(x, weight, bias, zero, dtype, geometry, weight_unit, unit, out=FP32):
    """What the kernel makes of integers `(B, C, H, W)` and `(O, C / groups, KH, KW)`, and the sums it must have."""
    stride, padding, dilation, groups = geometry
    got = conv.conv2d(
        x.to(FP32).to(dtype).to(DEVICE),
        weight.permute(0, 2, 3, 1).contiguous().to(FP32).to(dtype).to(DEVICE),
        None if bias is None else bias.to(DEVICE),
        weight_sum=weight.sum((1, 2, 3)).to(torch.int32 if dtype == INT8 else FP32).to(DEVICE),
        weight_unit=weight_unit.to(DEVICE),
        unit=unit.to(DEVICE),
        zero=torch.tensor(float(zero), device=DEVICE),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        dtype=out,
    )
    padded = F.pad((x - zero).double(), (padding[1], padding[1], padding[0], padding[0]))
    return got.cpu(), F.conv2d(padded, weight.double(), None, stride, 0, dilation, groups)


@pytest.mark.parametrize("dtype", [INT8, BF16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_is_exact(geometry, dtype):
    batch, channels, height, width, outputs, kernel, *rest = GEOMETRIES[geometry]
    low, high, zero, limit = (-128, 127, -100, 127) if dtype == INT8 else (0, 15, 6, 12)
    x = integers(batch, channels, height, width, low=low, high=high)
    weight = integers(outputs, channels // rest[-1], *kernel, low=-limit, high=limit)
    weight_unit, unit, bias = torch.rand(outputs) + 0.1, torch.tensor(0.37), torch.randn(outputs)
    got, sums = convolution(x, weight, bias, zero, dtype, rest, weight_unit, unit)
    want = sums.float() * (weight_unit * unit)[:, None, None] + bias[:, None, None]
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("out", [BF16, FP16], ids=str)
def test_convolution_gives_the_dtype_asked_for(out):
    x, weight = integers(1, 5, 4, 4, low=-9, high=9), integers(3, 5, 3, 3, low=-9, high=9)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    got, sums = convolution(x, weight, None, 2, INT8, geometry, torch.full((3,), 0.013), torch.tensor(0.5), out)
    want = (sums.float() * (0.013 * torch.tensor(0.5))).to(out)
    assert got.dtype == out
    torch.testing.assert_close(got, want, atol=0, rtol=0 if EXACT[out] else 2**-7)


def test_the_largest_sums_do_not_overflow(monkeypatch):
    monkeypatch.setattr(conv, "tile", lambda *_: (16, 16, 4))
    channels = conv.MAX_TERMS // 64
    x, weight = torch.full((1, channels, 8, 8), -128), torch.full((1, channels, 8, 8), 127)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    ones = torch.ones(1)
    for sign in (1, -1):
        got, sums = convolution(x, sign * weight, None, 127, INT8, geometry, ones, ones[0])
        assert got.item() == sums.item() == -sign * 255 * 127 * conv.MAX_TERMS
    with pytest.raises(ShapeError, match="may have 65536 terms"):
        convolution(x[..., :1], F.pad(weight, (0, 1)), None, 0, INT8, geometry, ones, ones[0])


@pytest.mark.parametrize("name", INPUTS_INT8)
def test_every_int8_pair_of_formats(name):
    fmt, geometry = FORMATS[name], ((1, 1), (1, 1), (1, 1), 1)
    offset = code_offset(fmt, INT8)
    lattice = torch.tensor(fmt.lattice)
    k = 0 if fmt.signed else fmt.magnitudes[len(fmt.magnitudes) // 2]
    for other in WEIGHTS_INT8:
        values = torch.tensor(FORMATS[other].lattice)
        x, weight = lattice[integers(1, 3, 3, 3, low=0, high=len(lattice) - 1)], values[-(torch.arange(54) % 9) - 1]
        weight = weight.view(2, 3, 3, 3)
        got, sums = convolution(x - offset, weight, None, k - offset, INT8, geometry, torch.ones(2), torch.ones(()))
        assert torch.equal(got, sums.float()), other


# ── linears ──────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = [(40, 32, 48), (1, 7, 5), (17, 33, 9), (16, 8, 8), (3, 1, 1), (0, 4, 6)]


@pytest.fixture
def shape_rules(monkeypatch):
    """Refuses what the GPU versions refuse: rows, multiples, memory order."""
    int_mm = torch._int_mm

    def checked(a, b):
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0 < a.shape[1]
        assert len(a) > 16
        return int_mm(a, b)

    monkeypatch.setattr(torch, "_int_mm", checked)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_on_codes(shape, shape_rules):
    rows, length, columns = shape
    x, weight = integers(rows, length, low=0, high=15), integers(columns, length, low=-12, high=12)
    weight_unit, unit, bias, zero = torch.rand(columns) + 0.1, torch.tensor(0.37), torch.randn(columns), 4
    sums = (x - zero) @ weight.T
    want = sums.float() * (weight_unit * unit) + bias
    codes, weights = (t.to(INT8).to(DEVICE) for t in (x, weight))
    arguments = {
        "weight_sum": weight.sum(1).to(torch.int32).to(DEVICE),
        "weight_unit": weight_unit.to(DEVICE),
        "unit": unit.to(DEVICE),
        "zero": torch.tensor(float(zero), device=DEVICE),
    }
    library = gemm.linear(codes, gemm.pad_weight(weights), bias.to(DEVICE), **arguments)
    assert torch.equal(library.cpu(), want)
    assert torch.equal(conv.linear(codes, weights, bias.to(DEVICE), **arguments).cpu(), want)
    deep = gemm.linear(codes.view(rows, 1, 1, length), gemm.pad_weight(weights), None, dtype=FP16, **arguments)
    assert torch.equal(deep.cpu(), (sums.float() * (weight_unit * unit)).to(FP16).view(rows, 1, 1, columns))
    same = conv.linear(codes.view(rows, 1, 1, length), weights, None, dtype=FP16, **arguments)
    assert torch.equal(same, deep)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_every_packed_code_is_decoded(name, dtype):
    fmt, length = FORMATS[name], 33
    codes = (torch.arange(16)[:, None] + torch.arange(length)) % 16
    weight_unit = 2.0 ** torch.arange(-8, 8)
    packed = pack(codes.to(torch.uint8), 4).to(DEVICE)
    eye = torch.eye(length, dtype=dtype, device=DEVICE)
    got = w4a16.linear(eye, packed, None, weight_unit=weight_unit.to(DEVICE), fmt=fmt).cpu()
    want = torch.tensor(fmt.code_values)[codes].T * weight_unit
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 5), (130, 33, 140), (1, 1, 1), (4, 200, 3), (0, 4, 6)], ids=str)
def test_linear_with_packed_weights(shape, dtype):
    rows, length, columns = shape
    fmt = FORMATS["fp4_e2m1"]
    codes = integers(columns, length, low=0, high=15)
    q = torch.tensor(fmt.code_values)[codes].double()
    weight_unit, bias = 2.0 ** integers(columns, low=-4, high=0).float(), integers(columns, low=-9, high=9).to(dtype)
    packed, whole = pack(codes.to(torch.uint8), 4).to(DEVICE), integers(rows, length, low=-8, high=8).to(dtype)
    arguments = {"weight_unit": weight_unit.to(DEVICE), "fmt": fmt}
    got = w4a16.linear(whole.to(DEVICE), packed, bias.to(DEVICE), **arguments).cpu()
    want = (whole.double() @ q.T * weight_unit + bias.double()).to(dtype)
    torch.testing.assert_close(got, want, atol=0, rtol=0 if EXACT[dtype] else 2**-7)
    x = torch.randn(rows, length).to(dtype)
    got = w4a16.linear(x.view(rows, 1, length).to(DEVICE), packed, None, **arguments).cpu()
    want = (x.double() @ q.T * weight_unit).view(rows, 1, columns)
    assert (got - want).norm() <= {FP32: 1e-6, FP16: 1e-3, BF16: 1e-2}[dtype] * want.norm()


# ── whole layers ─────────────────────────────────────────────────────────────────────────────────────────────────


def quantized(cls, module, weight: str, activation: tuple[str, ...], x):
    layer = cls.from_float(module, "layer", LayerScheme((weight,), activation))
    with torch.no_grad():
        layer(x)
    layer.freeze()
    return layer


def run_on_codes(layer, x, dtype, kernel, **geometry):
    """A layer as an engine computes it."""
    qparams = layer.input_qparams()
    fmt, unit = qparams.format, qparams.unit
    offset = code_offset(fmt, dtype)
    k = quantize_to_lattice(torch.zeros(()), qparams)[1]
    weight, total = weight_codes(layer.packed_bank(0), layer.weight_format, layer.logical_shape, dtype)
    x, inverse, k = x.to(DEVICE), (1 / unit).to(DEVICE), k.to(DEVICE)
    return kernel(
        quantize(x, inverse, k, fmt, dtype=dtype, offset=offset),
        weight.to(DEVICE),
        None if layer.bias is None else layer.bias.detach().to(DEVICE),
        weight_sum=total.to(DEVICE),
        weight_unit=layer.weight_qparams().unit.flatten().to(DEVICE),
        unit=unit.to(DEVICE),
        zero=k - offset,
        **geometry,
    ).cpu()


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("fp4_e2m1", "fp4_e2m1"),
        ("fp4_e3m0", "fp4_ue3m1"),
        ("fp4_e2m1", "fp8_ue1m7"),
        ("fp8_e1m6", "fp8_e1m6"),
        ("fp8_e4m3", "fp8_ue4m4"),
        ("fp6_e3m2", "fp6_e3m2"),
    ],
)
def test_layers_agree_with_the_reference(weight, activation):
    x = F.silu(torch.randn(2, 6, 5, 7)) if "u" in activation else torch.randn(2, 6, 5, 7)
    scheme = (activation,) if FORMATS[activation].signed else (activation, "fp4_e1m2")
    module = torch.nn.Conv2d(6, 9, 3, stride=2, padding=1)
    layer = quantized(QuantConv2d, module, weight, scheme, x)
    flat = quantized(QuantLinear, torch.nn.Linear(7, 9), weight, scheme, x)
    assert str(layer.input_format) == activation
    for dtype in code_dtypes(FORMATS[weight], FORMATS[activation], CAPABILITY):
        with torch.no_grad():
            want, want_flat = layer.double()(x.double()), flat.double()(x.double())
        got = run_on_codes(layer.float(), x, dtype, conv.conv2d, stride=(2, 2), padding=(1, 1))
        assert (got - want).norm() <= 1e-5 * want.norm(), dtype
        got = run_on_codes(flat.float(), x, dtype, conv.linear)
        assert (got - want_flat).norm() <= 1e-5 * want_flat.norm(), dtype


@pytest.mark.parametrize("name", SIGNED)
def test_weight_codes(name):
    fmt = FORMATS[name]
    codes = integers(5, 3 * 2 * 3, low=0, high=2**fmt.bits - 1).to(torch.uint8)
    want = decode(codes, QParams(fmt, 1 / fmt.step)).view(5, 3, 2, 3)
    for dtype in (INT8, BF16):
        if holds(dtype, fmt):
            weight, total = weight_codes(pack(codes, fmt.bits), fmt, (5, 3, 2, 3), dtype)
            assert torch.equal(weight.float(), want.permute(0, 2, 3, 1))
            assert weight.is_contiguous()
            assert torch.equal(total.double(), want.double().sum((1, 2, 3)).to(total.dtype).double())


# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FORMATS)
def test_holds_what_survives_the_dtype(name):
    fmt = FORMATS[name]
    for dtype in (INT8, BF16):
        values = torch.tensor(fmt.lattice, dtype=torch.float64) - code_offset(fmt, dtype)
        info = torch.iinfo(dtype) if dtype == INT8 else torch.finfo(dtype)
        there = values.clamp(info.min, info.max).to(FP32).to(dtype).to(torch.float64)
        assert holds(dtype, fmt) == torch.equal(there, values)


def test_what_devices_run():
    assert all(limits((7, 0)).values())
    assert not limits((7, 5))["int_mm"]
    assert "8.0" in limits((7, 5))["triton"]
    assert [name for name, reason in limits((8, 6)).items() if reason] == ["fp4"]
    assert "not used" in limits((10, 0))["fp4"]
    e2m1, e3m2, e4m3 = FORMATS["fp4_e2m1"], FORMATS["fp6_e3m2"], FORMATS["fp8_e4m3"]
    assert code_dtypes(e2m1, e2m1, (9, 0)) == (INT8, BF16)
    assert code_dtypes(e2m1, e2m1, (8, 0)) == (INT8, BF16)
    assert code_dtypes(e2m1, e3m2, (8, 9)) == (BF16,)
    assert code_dtypes(e2m1, e4m3, (12, 0)) == (BF16,)
    assert code_dtypes(e2m1, e2m1, (7, 5)) == ()


SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have


@pytest.mark.parametrize("target", [90, *(pytest.param(t, marks=pytest.mark.slow) for t in (80, 89, 100, 120))])
def test_kernels_compile_for_devices(target, tmp_path):
    """No GPU needed: tensor cores are used, shared memory suffices, and the quantizer's `x * inverse + k` is no FMA."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, script, str(target)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(run.stdout)
    assert len(kernels) == 5
    for name, kernel in kernels.items():
        assert kernel["shared"] <= SHARED[target] * 1024, name
        assert name.startswith("quantize") or re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", kernel["ptx"])
    assert re.search(r"(mma\S+s8\.s8|mma\S+kind::i8)", kernels["conv2d-int8"]["ptx"])
    rounding = kernels["quantize-float32"]["ptx"]
    assert "mul.rn.f32" in rounding
    assert "fma" not in rounding
    assert ".ftz" not in rounding
