"""Ways to quantize an input to lattice bytes: the package's kernels, torch.compile and C, beside a plain copy.

    python tests/benchmarks/bench_quantizer.py

All take turns in one process. Each but the last two must give the bytes of the definition, and says by the way whether
its input was finite. `uniform` is torch's own quantizer, which knows no floating-point lattice; `copy` is
`Tensor.clone`. Caches of compilers are empty at the start, so the first call's seconds are those of a new installation.
Writes `model_cards/results/quantizer.json`.
"""

import ctypes
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

_SCRATCH = tempfile.TemporaryDirectory()
os.environ |= dict.fromkeys(("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), _SCRATCH.name)  # before the imports

import torch  # noqa: E402
import typer  # noqa: E402
from harness import write_results  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from diffusers_msfp.engines.grid import InputGrid  # noqa: E402
from diffusers_msfp.evaluation.timing.speed import take_turns  # noqa: E402
from diffusers_msfp.numerics import QParams  # noqa: E402
from diffusers_msfp.numerics.rounding import quantize_to_lattice, round_to_lattice  # noqa: E402

SHAPES = ((8, 128, 32, 32), (2, 320, 64, 64))
DTYPES = (torch.float32, torch.bfloat16)
QPARAMS = QParams("fp4_ue2m2", 0.55, -0.278)
GRID = InputGrid.of(QPARAMS)
EXPONENT = 0x7F800000
C_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
C_SOURCE = """
#include <stdint.h>
typedef union { float real; int32_t bits; } word;
static inline word widen(TYPE v) { word w; WIDEN; return w; }
int32_t quantize(const TYPE *x, uint8_t *out, int64_t n, float inverse, float zero, float low, float high,
                 int32_t mantissa, int32_t offset, int threads) {
    int32_t largest = 0, least = (127 + mantissa) << 23, shift = (23 - mantissa) << 23;
    #pragma omp parallel for simd schedule(static) reduction(max:largest) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        word w = widen(x[i]), magic;
        int32_t exponent = w.bits & 0x7F800000;
        largest = exponent > largest ? exponent : largest;
        w.real = w.real * inverse + zero;
        w.real = w.real < low ? low : w.real;
        w.real = w.real > high ? high : w.real;
        exponent = w.bits & 0x7F800000;
        magic.bits = ((exponent < least ? least : exponent) + shift) | 0x400000;
        out[i] = (uint8_t)((int32_t)((w.real + magic.real) - magic.real) + offset);
    }
    return largest;
}
"""
C_TYPES = {
    torch.float32: ("-DTYPE=float", "-DWIDEN=w.real = v"),
    torch.bfloat16: ("-DTYPE=uint16_t", "-DWIDEN=w.bits = (int32_t)((uint32_t)v << 16)"),
}
Call = Callable[[], tuple[Tensor, object]]


def with_numba(x: Tensor) -> Call:
    """The package's kernel where Numba is installed."""
    from diffusers_msfp.engines.kernels import numba_kernels

    return lambda: _first_plane(*numba_kernels.quantize(x, GRID))


def with_torch(x: Tensor) -> Call:
    """The package's fallback."""
    from diffusers_msfp.engines.kernels import torch_kernels

    return lambda: _first_plane(*torch_kernels.quantize(x, GRID))


def _first_plane(planes: list[Tensor], finite: bool) -> tuple[Tensor, bool]:
    return planes[0], finite


def with_inductor(x: Tensor) -> Call:
    """The definition's formula through torch.compile."""

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.float32)
        y = (wide * GRID.inverse + float(GRID.zero)).clamp(GRID.low, GRID.high)
        codes = (round_to_lattice(y, QPARAMS.format) + GRID.offset).to(torch.uint8)
        return codes, wide.abs().max()

    compiled = torch.compile(formula, dynamic=False, fullgraph=True)

    def call() -> tuple[Tensor, bool]:
        codes, largest = compiled(x)
        return codes, math.isfinite(largest.item())

    return call


def with_c(x: Tensor) -> Call:
    """A loop in C with OpenMP."""
    library = Path(_SCRATCH.name) / f"{x.dtype}-{time.monotonic_ns()}.so"
    command = ["gcc", *C_FLAGS, *C_TYPES[x.dtype], "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=C_SOURCE, text=True, check=True, capture_output=True)
    quantize = ctypes.CDLL(str(library)).quantize
    quantize.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_float] * 4 + [ctypes.c_int32] * 3

    def call() -> tuple[Tensor, bool]:
        out = torch.empty_like(x, dtype=torch.uint8)
        numbers = GRID.inverse, GRID.zero, GRID.low, GRID.high, GRID.mantissa_bits, GRID.offset
        largest = quantize(x.data_ptr(), out.data_ptr(), x.numel(), *numbers, torch.get_num_threads())
        return out, largest < EXPONENT

    return call


def uniform(x: Tensor) -> Call:
    """torch's quantizer to equal steps; it reads float32 only."""
    arguments = GRID.unit, GRID.zero, torch.quint8
    return lambda: (torch.quantize_per_tensor(x.to(torch.float32), *arguments).int_repr(), True)


def copy(x: Tensor) -> Call:
    """What moving the input takes."""
    return lambda: (x.clone(), True)


EXACT = {"numba": with_numba, "torch": with_torch, "inductor": with_inductor, "c": with_c}
SCALE = {"uniform": uniform, "copy": copy}
NEEDS = {"inductor": ("g++", "clang++"), "c": ("gcc",)}


def first_calls(x: Tensor) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """Calls that gave the definition's bytes, seconds of the first ones, and why others are left out."""
    expected = (quantize_to_lattice(x, QPARAMS)[0] + GRID.offset).to(torch.uint8)
    calls, seconds, skipped = {}, {}, {}
    for name, make in (EXACT | SCALE).items():
        if name in NEEDS and not any(map(shutil.which, NEEDS[name])):
            skipped[name] = f"no {' or '.join(NEEDS[name])} here"
            continue
        start = time.perf_counter()
        try:
            call = make(x)
            codes, finite = call()
        except ImportError as error:
            skipped[name] = str(error)
            continue
        seconds[name] = time.perf_counter() - start
        if name in EXACT and not (finite and torch.equal(codes, expected)):
            skipped[name] = f"{(codes != expected).float().mean():.2%} of its bytes are not the definition's"
            continue
        calls[name] = call
    return calls, seconds, skipped


def main(repeats: int = 101) -> None:
    """Time them, write rows."""
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            x = F.silu(2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
            about = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            calls, first, skipped = first_calls(x)
            for name, times in take_turns(calls, repeats).items():
                low, _, high = (1e3 * value for value in quantiles(times, n=4))
                figures = {"ms": 1e3 * median(times), "ms_low": low, "ms_high": high, "first_call_s": first[name]}
                rows.append(about | {"provider": name} | {key: float(f"{v:.4g}") for key, v in figures.items()})
                typer.echo(json.dumps(rows[-1]), err=True)
            for name, reason in skipped.items():
                rows.append(about | {"provider": name, "skipped": reason})
                typer.echo(json.dumps(rows[-1]), err=True)
    write_results("quantizer", "python tests/benchmarks/bench_quantizer.py", rows)


if __name__ == "__main__":
    typer.run(main)
