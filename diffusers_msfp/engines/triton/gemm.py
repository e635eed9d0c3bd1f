"""Linear layers on int8 codes through torch's own matrix product; needs no Triton.

`_int_mm` refuses shapes that are no multiples of 8, and fewer than 17 rows. Weights are padded once (`pad_weight`),
inputs at each call where they must be; zeros add nothing to the sums.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat.torch import int8_matmul

_MULTIPLE = 16
_MIN_ROWS = 32  # 17 would do, but makes an awkward matrix


def _missing(size: int) -> int:
    return -size % _MULTIPLE


def pad_weight(weight: Tensor) -> Tensor:
    """`(N, K)` → both sizes raised to multiples of 16 with zeros."""
    return F.pad(weight, (0, _missing(weight.shape[1]), 0, _missing(weight.shape[0]))).contiguous()


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Sums `Σ_k x[m, k] * weight[n, k]` of codes.

    Args:
        x (`Tensor`, `(M, K)`, int8): codes; `K` may lack the padding of the weight.
        weight (`Tensor`, `(N, K)`, int8): from `pad_weight`.

    Returns:
        `Tensor`, `(M, N)`, int32: exact.
    """
    rows = len(x)
    extra = max(0, _MIN_ROWS - rows)
    if extra or x.shape[1] != weight.shape[1]:
        x = F.pad(x, (0, weight.shape[1] - x.shape[1], 0, extra))
    return int8_matmul(x.contiguous(), weight.t())[:rows]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    weight_sum: Tensor,
    weight_unit: Tensor,
    unit: Tensor,
    zero: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`weight_unit[n] * unit * (Σ x * weight - zero * weight_sum[n]) + bias[n]`.

    Args:
        x (`Tensor`, `(*, K)`, int8): codes.
        weight (`Tensor`, int8): `(N, K)` from `weight_codes`, after `pad_weight`.
        bias (`Tensor`, `(N,)`, any float dtype): in the unit of the result.
        weight_sum (`Tensor`, `(N,)`, int32): sum of an output channel's lattice integers.
        weight_unit (`Tensor`, `(N,)`, float32): real size of a lattice step.
        unit (`Tensor`, `()`, float32): the same of the input.
        zero (`Tensor`, `()`, float32): code of the real 0.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor`, `(*, N)`, `dtype`.
    """
    *batch, length = x.shape
    columns = len(weight_unit)
    if x.numel() == 0:
        return torch.empty((*batch, columns), dtype=dtype, device=x.device)
    total = matmul(x.reshape(-1, length), weight)[:, :columns]
    y = (total - zero.to(total.dtype) * weight_sum).to(torch.float32) * (weight_unit * unit)
    y = y if bias is None else y + bias.to(torch.float32)
    return y.to(dtype).view(*batch, columns)
