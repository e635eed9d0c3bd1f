"""Convolution of codes as an implicit GEMM, exact up to the final scaling; a linear is its 1×1 case."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ShapeError
from .device_codes import MAX_TERMS
from .launch import on, tile


@triton.jit
def _conv2d(
    x_ptr,
    w_ptr,
    out_ptr,
    sum_ptr,
    scale_ptr,
    unit_ptr,
    zero_ptr,
    bias_ptr,
    ROWS,  # B * OH * OW
    H,
    W,
    OH,
    OW,
    C,  # input channels of a group
    N,  # output channels of a group
    GROUPS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(1)
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    oh = m // OW % OH
    ow = m % OW
    image = (m // (OH * OW)).to(tl.int64) * H * W
    zero = tl.load(zero_ptr).to(ACC)
    w_row = w_ptr + (group * N + n).to(tl.int64) * (KH * KW * C)
    blocks = (C + BLOCK_K - 1) // BLOCK_K
    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for step in range(KH * KW * blocks):
        tap = step // blocks
        c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        h = oh * SH - PH + tap // KW * DH
        w = ow * SW - PW + tap % KW * DW
        real = (m < ROWS) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixel = (image + h * W + w) * (GROUPS * C) + group * C
        x = tl.load(x_ptr + pixel[:, None] + c[None, :], real[:, None] & (c < C)[None, :], other=zero)
        y = tl.load(w_row[None, :] + (tap * C + c)[:, None], (n < N)[None, :] & (c < C)[:, None], other=0.0)
        acc = tl.dot(x, y, acc, out_dtype=ACC)
    column = group * N + n
    total = tl.load(sum_ptr + column, n < N, other=0).to(ACC)
    y = (acc - (zero * total)[None, :]).to(tl.float32)
    y = y * (tl.load(scale_ptr + column, n < N, other=0.0) * tl.load(unit_ptr))[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * (GROUPS * N) + column[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), (m < ROWS)[:, None] & (n < N)[None, :])


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    weight_sum: Tensor,
    weight_unit: Tensor,
    unit: Tensor,
    zero: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`weight_unit[o] * unit * (Σ x * weight - zero * weight_sum[o]) + bias[o]`, padded with `zero`.

    Sums of int8 codes are int32 and exact. Others are float32: of bfloat16 codes the products are exact, and so are
    sums below 2^24.

    Args:
        x (`Tensor`, `(B, C, H, W)`, int8/bfloat16/float16): codes; channels_last, or it is copied.
        weight (`Tensor`, `(O, KH, KW, C / groups)`, dtype of `x`, contiguous): from `weight_codes`.
        bias (`Tensor`, `(O,)`, any float dtype): in the unit of the result.
        weight_sum (`Tensor`, `(O,)`, int32 for int8, else float32): sum of an output channel's lattice integers.
        weight_unit (`Tensor`, `(O,)`, float32): real size of a lattice step.
        unit (`Tensor`, `()`, float32): the same of the input.
        zero (`Tensor`, `()`, float32): code of the real 0.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor`, `(B, O, OH, OW)`, `dtype`, channels_last.

    Raises:
        ShapeError: more than `MAX_TERMS` int8 weights in an output channel.
    """
    whole = x.dtype == torch.int8
    if whole and weight[0].numel() > MAX_TERMS:
        raise ShapeError(
            f"An int8 sum may have {MAX_TERMS} terms, but an output channel has {weight[0].numel()} weights. "
            f"Give codes and weights as bfloat16."
        )
    batch, _, height, width = x.shape
    columns, kernel_height, kernel_width, channels = weight.shape
    out_height, out_width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip((height, width), padding, dilation, weight.shape[1:3], stride, strict=True)
    )
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty((batch, out_height, out_width, columns), dtype=dtype, device=x.device)
    rows, columns = batch * out_height * out_width, columns // groups
    if rows:
        block_m, block_n, warps = tile(rows, columns, x.device)
        block_bytes = 64 if channels * x.element_size() % 128 else 128
        with on(x.device):
            _conv2d[(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n), groups)](
                x,
                weight,
                out,
                weight_sum,
                weight_unit,
                unit,
                zero,
                weight_unit if bias is None else bias,
                rows,
                height,
                width,
                out_height,
                out_width,
                channels,
                columns,
                GROUPS=groups,
                KH=kernel_height,
                KW=kernel_width,
                SH=stride[0],
                SW=stride[1],
                PH=padding[0],
                PW=padding[1],
                DH=dilation[0],
                DW=dilation[1],
                HAS_BIAS=bias is not None,
                ACC=tl.int32 if whole else tl.float32,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=block_bytes // x.element_size(),
                num_warps=warps,
                num_stages=3 if block_bytes == 128 else 4,
                enable_fp_fusion=False,
            )
    return out.permute(0, 3, 1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, **arguments) -> Tensor:
    """`conv2d` for codes `(*, K)` and a weight `(N, K)`; the result is `(*, N)`, `arguments` are those of `conv2d`."""
    *batch, length = x.shape
    out = conv2d(x.reshape(-1, length, 1, 1), weight[:, None, None, :], bias, **arguments)
    return out.reshape(*batch, len(weight))
