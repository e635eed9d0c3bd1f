"""Quantizing an input in one pass: float in, codes out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import FPFormat
from .launch import on

_BLOCK = 1024


@triton.jit
def round_to_lattice(y, M: tl.constexpr):
    """Nearest lattice integer of float32 values in range, ties to even multiples of the local step; float32.

    Adding `1.5 * 2^23 * step` leaves no bit below `step`: the addition rounds, half to even, and -0 becomes 0.
    """
    exponent = ((y.to(tl.int32, bitcast=True) >> 23) & 0xFF) - (127 + M)
    border = (((tl.maximum(exponent, 0) + 150) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (y + border) - border


@triton.jit
def _quantize(
    x_ptr,
    out_ptr,
    inverse_ptr,
    k_ptr,
    bad_ptr,
    size,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    M: tl.constexpr,
    OFFSET: tl.constexpr,
    WATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < size, other=0.0).to(tl.float32)
    y = x * tl.load(inverse_ptr) + tl.load(k_ptr)
    y = tl.minimum(tl.maximum(y, LOW), HIGH)
    code = round_to_lattice(y, M) - OFFSET
    if out_ptr.dtype.element_ty.is_int():
        code = code.to(tl.int32)
    tl.store(out_ptr + at, code.to(out_ptr.dtype.element_ty), at < size)
    if WATCH:
        bits = x.to(tl.int32, bitcast=True) & 0x7F800000
        tl.store(bad_ptr + at * 0, 1, bits == 0x7F800000)


def quantize(
    x: Tensor,
    inverse: Tensor,
    k: Tensor,
    fmt: FPFormat,
    *,
    dtype: torch.dtype = torch.int8,
    offset: int = 0,
    bad: Tensor | None = None,
) -> Tensor:
    """Codes `c = q - offset` of an input; `q` is bit-equal to `numerics.rounding.quantize_to_lattice`.

    Args:
        x (`Tensor`, any shape, float32/bfloat16/float16): finite values; dense in memory, or it is copied.
        inverse (`Tensor`, `()`, float32): `1 / unit`, computed once.
        k (`Tensor`, `()`, float32): the zero point in lattice steps.
        fmt (`FPFormat`): its lattice, less `offset`, must fit `dtype`.
        dtype (`torch.dtype`): int8, uint8, bfloat16, …
        offset (`int`): taken from every lattice integer.
        bad (`Tensor`, `(1,)`, int32, *optional*): set to 1 if `x` holds NaN or infinity, else left alone. This spares
            a look at the values before every layer. The codes of NaN mean nothing.

    Returns:
        `Tensor`, shape and memory order of `x`, `dtype`.

    Fusing `x * inverse + k` into one rounding would change codes. `enable_fp_fusion=False` forbids it in Triton and in
    ptxas, whatever their defaults are.
    """
    codes = torch.empty_like(x, dtype=dtype)
    if codes.stride() != x.stride():  # not dense
        x = x.contiguous()
        codes = torch.empty_like(x, dtype=dtype)
    if x.numel():
        with on(x.device):
            _quantize[(triton.cdiv(x.numel(), _BLOCK),)](
                x,
                codes,
                inverse,
                k,
                inverse if bad is None else bad,
                x.numel(),
                LOW=float(fmt.lattice[0]),
                HIGH=float(fmt.lattice_max),
                M=fmt.mantissa_bits,
                OFFSET=offset,
                WATCH=bad is not None,
                BLOCK=_BLOCK,
                enable_fp_fusion=False,
            )
    return codes
