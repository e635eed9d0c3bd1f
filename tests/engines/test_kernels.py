"""The CPU kernels, both sets, against the definition of the codes."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from diffusers_msfp.engines.grid import InputGrid, low_bits
from diffusers_msfp.engines.kernels import numba_kernels, torch_kernels
from diffusers_msfp.formats import FORMATS
from diffusers_msfp.numerics import QParams, pack
from diffusers_msfp.numerics.rounding import quantize_to_lattice

PACKAGE = Path(numba_kernels.__file__).parents[2]
KERNELS = {"numba": numba_kernels, "torch": torch_kernels}
BYTE_FORMATS = [name for name, fmt in FORMATS.items() if low_bits(fmt) <= 8]
SIZES = {"serial": 1, "parallel": 2_200_001}


@pytest.fixture(params=KERNELS)
def kernels(request):
    return KERNELS[request.param]


def qparams_of(name: str) -> QParams:
    fmt = FORMATS[name]
    scale = torch.tensor(0.137)
    return QParams(fmt, scale, torch.tensor(0.0 if fmt.signed else -2.0) * scale * fmt.step)


def awkward_values(qparams: QParams) -> torch.Tensor:
    """Ties, neighbours of ties, borders, zeros, subnormals and values far outside, besides random ones."""
    fmt, unit = qparams.format, qparams.unit
    halves = torch.arange(-2 * fmt.lattice_max - 4, 2 * fmt.lattice_max + 5) / 2 * unit
    near = torch.cat([halves, halves.nextafter(torch.tensor(9e9)), halves.nextafter(torch.tensor(-9e9))])
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
    return torch.cat([near, special, torch.randn(1000) * unit * fmt.lattice_max / 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BYTE_FORMATS)
def test_codes_equal_the_definition_bit_for_bit(kernels, name, dtype):
    qparams = qparams_of(name)
    x = awkward_values(qparams).to(dtype)
    x = x[torch.isfinite(x)]
    q, k = quantize_to_lattice(x, qparams)
    grid = InputGrid.of(qparams)
    planes, finite = kernels.quantize(x, grid)
    centred, _ = kernels.centre(x, grid, torch.float32)
    assert finite
    integers = sum(plane.int() << shift for plane, shift in zip(planes, (grid.low_bits, 0), strict=False))
    assert torch.equal(integers, (q + grid.offset).int())
    zero = sum((byte * unit for unit, byte in grid.planes))
    assert zero == pytest.approx(float(k + grid.offset) * grid.unit)
    assert torch.equal(centred, q - k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_is_not_finite_is_noticed(kernels, size, bad):
    grid = InputGrid.of(qparams_of("fp4_ue2m2"))
    x = torch.zeros(size)
    for dtype in (torch.float32, torch.bfloat16):
        assert kernels.quantize(x.to(dtype), grid)[1]
        broken = x.to(dtype).clone()
        broken[-1] = bad
        assert not kernels.quantize(broken, grid)[1]
        assert not kernels.centre(broken, grid, torch.float32)[1]


def test_large_tensors_in_any_memory_format(kernels):
    qparams = qparams_of("fp6_e2m3")
    grid = InputGrid.of(qparams)
    x = torch.randn(3, 64, 75, 57).contiguous(memory_format=torch.channels_last)
    for values in (x, x.contiguous(), x[0], x.transpose(0, 1)):
        (codes,), _ = kernels.quantize(values, grid)
        assert torch.equal(codes.float(), quantize_to_lattice(values, qparams)[0] + grid.offset)
        assert codes.stride() == values.stride()


def test_bfloat16_integers_are_exact(kernels):
    grid = InputGrid.of(qparams_of("fp8_ue1m7"))
    x = torch.randn(999) * 9
    wide, narrow = (kernels.centre(x, grid, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(narrow.float(), wide)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (1, 8, 1, 1), (3, 12, 40, 30), (2, 40, 64, 64)], ids=str)
def test_norm_agrees_with_torch(kernels, shape, silu):
    x = (torch.randn(shape) * 3 + 5).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    expected = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    expected = F.silu(expected) if silu else expected
    y, finite = kernels.norm(x, 4, weight, bias, 1e-5, silu, None)
    assert finite
    assert (y - expected).norm() <= 2e-6 * expected.norm()
    for name in ("fp4_ue2m2", "fp4_e2m1", "fp8_ue1m7"):
        grid = InputGrid.of(qparams_of(name))
        codes, _ = kernels.norm(x, 4, weight, bias, 1e-5, silu, grid)
        assert torch.equal(codes, kernels.quantize(y, grid)[0][0])
    half, _ = kernels.norm(x.bfloat16(), 4, weight, bias, 1e-5, silu, None)
    whole, _ = kernels.norm(x.bfloat16().float(), 4, weight, bias, 1e-5, silu, None)
    assert torch.equal(half, whole.bfloat16())


THREADED_SHAPES = [(40, 61, 77), (128, 32, 32), (4, 1, 40000)]


def several_threads() -> dict:
    """What kernels leave and give where there are three threads: torch's number of them, and by shape, whether a norm
    gives with two and three what it gives with one."""
    torch.set_num_threads(1)
    numba_kernels.softmax_numerators(torch.zeros(64, 64, dtype=torch.bfloat16))
    found = {"kernels": numba_kernels.numba.config.NUMBA_NUM_THREADS, "torch": torch.get_num_threads()}
    grid = InputGrid.of(qparams_of("fp8_ue1m7"))
    for batch, (channels, *size) in itertools.product((1, 2), THREADED_SHAPES):
        x = (torch.randn(batch, channels, *size) * 3 + 5).bfloat16().contiguous(memory_format=torch.channels_last)
        added = torch.randn(batch, channels)
        arguments = 4, torch.rand(channels), torch.randn(channels), 1e-5, True, grid, added
        norms = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            norms.append(numba_kernels.norm(x, *arguments)[0])
        found[f"{(batch, channels, *size)}"] = [torch.equal(each, norms[0]) for each in norms[1:]]
    return found


@pytest.fixture(scope="module")
def with_threads() -> dict:
    """Of a process of its own, as the tests' may have one thread each."""
    code = "import json, test_kernels; print(json.dumps(test_kernels.several_threads()))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = os.pathsep.join([str(Path(__file__).parent), str(PACKAGE.parent)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"NUMBA_NUM_THREADS": "3", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["kernels"] > 1
    return found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", THREADED_SHAPES, ids=str)
def test_norm_does_not_depend_on_threads(shape, batch, with_threads):
    assert with_threads[f"{(batch, *shape)}"] == [True, True]


def test_tensors_whose_address_does_not_say_all():
    """Negated views, those of `functionalize`, other devices, other types: right, or an error, and never a crash."""
    grid = InputGrid.of(qparams_of("fp4_e2m1"))
    x = torch.randn(4, 16)
    (expected,), _ = numba_kernels.quantize(-x, grid)
    assert torch.equal(numba_kernels.quantize(torch._neg_view(x), grid)[0][0], expected)
    functional = torch.func.functionalize(lambda each: numba_kernels.quantize(each, grid)[0][0])
    assert torch.equal(functional(-x), expected)
    images, affine = torch.randn(1, 4, 2, 2), (torch.ones(4), torch.zeros(4))
    codes = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    for broken in (torch.empty(4, 16, device="meta"), FakeTensorMode().from_tensor(x)):
        with pytest.raises(Exception, match=r"meta|data-dependent|DataDependent|aten"):
            numba_kernels.quantize(broken, grid)
    with torch.device("meta"):
        assert numba_kernels.norm(images, 2, *affine, 1e-5, True, grid)[0].device.type == "cpu"
        assert numba_kernels.columns(codes, *[(1, 1)] * 2, (0, 0), (1, 1), 0).device.type == "cpu"


def test_norm_of_a_sum(kernels):
    x, added = torch.randn(2, 12, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(2, 12) * 3
    weight, bias = torch.rand(12), torch.randn(12)
    arguments = 4, weight, bias, 1e-5, True, None
    y, _ = kernels.norm(x, *arguments, added)
    expected, _ = kernels.norm(x + added[:, :, None, None], *arguments)
    assert (y - expected).norm() <= 1e-6 * expected.norm()


def test_norm_survives_extreme_inputs(kernels):
    x = torch.full((1, 4, 4, 4), 2.0).contiguous(memory_format=torch.channels_last)
    y, finite = kernels.norm(x, 2, torch.ones(4), torch.tensor([-200.0, 200.0, 0.0, 1.0]), 1e-5, True, None)
    assert finite
    assert torch.allclose(y[0, :, 0, 0], F.silu(torch.tensor([-200.0, 200.0, 0.0, 1.0])), atol=1e-5)
    x[0, 0, 0, 0] = float("nan")
    assert not kernels.norm(x, 2, torch.ones(4), torch.zeros(4), 1e-5, True, None)[1]


@pytest.mark.parametrize("length", [1, 6, 45])
@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp8_e1m6"])
def test_expanding_packed_codes(kernels, name, length):
    fmt = FORMATS[name]
    codes = torch.randint(0, 2**fmt.bits, (7, length), dtype=torch.uint8)
    table = torch.tensor(fmt.code_values, dtype=torch.int8)
    assert torch.equal(kernels.expand(pack(codes, fmt.bits), fmt.bits, length, table), table[codes.int()])


def test_patches_multiply_like_a_convolution(kernels):
    codes = torch.randint(0, 16, (2, 3, 7, 6), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(5, 3, 3, 2, dtype=torch.float64)
    geometry = (2, 1), (1, 2), (1, 2)
    patches = kernels.columns(codes, (3, 2), *geometry, 7)
    y = (patches.double() - 7) @ weight.permute(0, 2, 3, 1).flatten(1).T
    assert torch.allclose(y.permute(0, 3, 1, 2), F.conv2d(codes.double() - 7, weight, None, *geometry))


def test_torch_keeps_its_number_of_threads(with_threads):
    assert with_threads["torch"] == 1


def printed_by(code: str, package: Path, **environment: str) -> str:
    """What a process of its own prints, which imports a copy of the package."""
    run = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={**os.environ, "PYTHONPATH": str(package.parent), **environment},
        capture_output=True,
        text=True,
        cwd=package.parents[1],
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("place", ["default", *(pytest.param(each, marks=SLOW) for each in ("chosen", "unwritable"))])
def test_compiled_kernels_are_never_kept_beside_the_package(tmp_path, place):
    """What lies there outlives an uninstallation, and hides the installation after it as a namespace package."""
    package = tmp_path / "site" / "diffusers_msfp"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = {file for file in package.rglob("*") if file.is_file()}
    blocked = tmp_path / "file"
    blocked.touch()
    environment = {
        "default": {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        "chosen": {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        "unwritable": {"XDG_CACHE_HOME": str(blocked)},
    }[place]
    code = (
        "import torch; from diffusers_msfp.engines import kernels; from diffusers_msfp.engines.grid import InputGrid;"
        "print(kernels.__file__); kernels.softmax_numerators(torch.randn(2, 8, dtype=torch.bfloat16))"
    )
    assert Path(printed_by(code, package, **{"NUMBA_CACHE_DIR": "", **environment})).is_relative_to(package)
    assert {file for file in package.rglob("*") if file.is_file()} == before
    kept = sorted((tmp_path / "cache").rglob("*.nbi"))
    assert bool(kept) == (place != "unwritable"), kept


def test_kernels_are_compiled_anew_when_what_they_call_has_changed(tmp_path):
    package = tmp_path / "site" / "diffusers_msfp"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    rows = package / "engines" / "kernels" / "numba_rows.py"
    assert "(y + magic) - magic" in rows.read_text(encoding="utf-8")
    code = """
import importlib
from pathlib import Path
from diffusers_msfp.engines.kernels import numba_kernels, numba_rows
print(numba_kernels._quantize.stats.cache_path)
rows = Path(numba_rows.__file__)
rows.write_text(rows.read_text(encoding="utf-8").replace("(y + magic) - magic", "y"), encoding="utf-8")
importlib.reload(numba_rows)
print(importlib.reload(numba_kernels)._quantize.stats.cache_path)
"""
    first, second = printed_by(code, package, NUMBA_CACHE_DIR=str(tmp_path / "cache")).splitlines()
    assert "(y + magic) - magic" not in rows.read_text(encoding="utf-8")
    assert first != second
