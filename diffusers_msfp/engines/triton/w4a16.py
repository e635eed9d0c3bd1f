"""Linear layers with packed 4-bit weights and float inputs: the weight is decoded inside the GEMM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import FPFormat
from .launch import on, tile


@triton.jit
def lattice_integer(code, MANTISSA: tl.constexpr):
    """Signed 4-bit codes → lattice integers, float32: `m` for exponent 0, else `(2^M + m) << (e - 1)`."""
    code = code.to(tl.int32)
    exponent = (code & 7) >> MANTISSA
    significand = (code & ((1 << MANTISSA) - 1)) | (tl.minimum(exponent, 1) << MANTISSA)
    magnitude = significand << tl.maximum(exponent - 1, 0)
    return tl.where(code > 7, -magnitude, magnitude).to(tl.float32)


@triton.jit
def _w4a16(
    x_ptr,
    w_ptr,
    out_ptr,
    scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    BYTES,
    MANTISSA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = (N + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64) * K
    w_row = w_ptr + n.to(tl.int64) * BYTES
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        x = tl.load(x_row[:, None] + k[None, :], (m < M)[:, None] & (k < K)[None, :], other=0.0)
        pairs = tl.load(w_row[:, None] + byte[None, :], (n < N)[:, None] & (byte < BYTES)[None, :], other=0)
        codes = tl.reshape(tl.join(pairs & 0xF, pairs >> 4), (BLOCK_N, BLOCK_K))
        w = lattice_integer(codes, MANTISSA).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="tf32x3")
    y = acc * tl.load(scale_ptr + n, n < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, *, weight_unit: Tensor, fmt: FPFormat) -> Tensor:
    """`weight_unit[n] * Σ x * q[n] + bias[n]` with the lattice integers `q` of the packed codes; float32 sums.

    Lattice integers of 4-bit formats are exact in every dtype that `x` may have. float32 inputs are split into two
    TF32 numbers (`tf32x3`), which leaves them 22 bits.

    Args:
        x (`Tensor`, `(*, K)`, bfloat16/float16/float32).
        packed (`Tensor`, `(N, ceil(K / 2))`, uint8, contiguous): as `numerics.pack` makes it.
        bias (`Tensor`, `(N,)`, any float dtype): in the unit of the result.
        weight_unit (`Tensor`, `(N,)`, float32): real size of a lattice step.
        fmt (`FPFormat`): signed, 4 bits.

    Returns:
        `Tensor`, `(*, N)`, dtype of `x`.
    """
    *batch, length = x.shape
    x = x.reshape(-1, length).contiguous()
    rows, columns = len(x), len(packed)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if rows:
        block_m, block_n, warps = tile(rows, columns, x.device)
        with on(x.device):
            _w4a16[(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)](
                x,
                packed,
                out,
                weight_unit,
                weight_unit if bias is None else bias,
                rows,
                columns,
                length,
                packed.shape[1],
                MANTISSA=fmt.mantissa_bits,
                HAS_BIAS=bias is not None,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=128 // x.element_size(),
                num_warps=warps,
                num_stages=3,
                enable_fp_fusion=False,
            )
    return out.view(*batch, columns)
