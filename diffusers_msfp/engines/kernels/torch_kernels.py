"""The CPU kernels as torch operations: for machines without Numba. Same results, several passes over memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...numerics.rounding import round_in_place
from ..grid import InputGrid, output_size

_BLOCK = 2**15  # values worked on at once: the passes stay in the cache, and in one thread, which needs no waking


def lattice_integers(x: Tensor, grid: InputGrid) -> Tensor:
    """Lattice integers, float32, of values of any float dtype; see `numerics.rounding.round_to_lattice`."""
    y = x.to(torch.float32).mul(grid.inverse).add_(float(grid.zero)).clamp_(grid.low, grid.high)
    return round_in_place(y, grid.mantissa_bits)


def _is_finite(x: Tensor) -> bool:
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _dense(x: Tensor) -> Tensor:
    """The values in the order in which they lie in memory, `(n,)`."""
    return x.as_strided((x.numel(),), (1,))


def quantize(x: Tensor, grid: InputGrid, several: bool | None = None) -> tuple[list[Tensor], bool]:  # noqa: ARG001
    """See `kernels.quantize`."""
    planes = [torch.empty_like(x, dtype=torch.uint8) for _ in grid.planes]
    flat, outs = _dense(x), [_dense(plane) for plane in planes]
    for start in range(0, flat.numel(), _BLOCK):
        part = slice(start, start + _BLOCK)
        q = lattice_integers(flat[part], grid).add_(grid.offset)
        if grid.low_bits:
            q = q.to(torch.int32)
            outs[1][part] = q & (2**grid.low_bits - 1)
            q >>= grid.low_bits
        outs[0][part] = q
    return planes, _is_finite(x)


def centre(x: Tensor, grid: InputGrid, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """See `kernels.centre`."""
    return lattice_integers(x, grid).sub_(grid.zero).to(dtype), _is_finite(x)


def norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    grid: InputGrid | None,
    added: Tensor | None = None,
    quantizer: Callable[[Tensor, InputGrid], tuple[list[Tensor], bool]] = quantize,
) -> tuple[Tensor, bool]:
    """See `kernels.norm`; `quantizer` is one of the `quantize`, which all give the same codes."""
    y = x.to(torch.float32)
    if added is not None:
        y = y + added.to(torch.float32).view(*added.shape, *[1] * (x.ndim - 2))
    y = F.group_norm(y, groups, weight.detach().to(torch.float32), bias.detach().to(torch.float32), eps)
    y = F.silu(y) if silu else y
    if grid is None:
        return y.to(x.dtype), _is_finite(y)
    (codes,), finite = quantizer(y, grid)
    return codes, finite


def expand(packed: Tensor, bits: int, length: int, table: Tensor) -> Tensor:
    """See `kernels.expand`."""
    from ...numerics import unpack

    return table[unpack(packed, bits, length).to(torch.int32)]


def columns(
    codes: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    zero: int,
) -> Tensor:
    """See `kernels.columns`."""
    rows, width = output_size(codes.shape[2:], size, stride, padding, dilation)
    x = F.pad(codes.permute(0, 2, 3, 1), (0, 0, *[padding[1]] * 2, *[padding[0]] * 2), value=zero)
    batch, (b, h, w, _), channels = x.shape[0], x.stride(), x.shape[3]
    strides = b, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], 1
    return x.as_strided((batch, rows, width, *size, channels), strides).reshape(batch, rows, width, -1)


def softmax_numerators(scores: Tensor) -> Tensor:
    """See `kernels.softmax_numerators`."""
    scores.copy_(torch.softmax(scores, dim=-1))
    return scores.new_ones(*scores.shape[:-1], 1, dtype=torch.float32)
