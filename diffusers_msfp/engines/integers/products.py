"""oneDNN's 8-bit products: called as layers need them, and asked whether they are exact here."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat.torch import has_bf16_instructions, int8_conv, int8_linear, pack_int8_conv, pack_int8_linear


@lru_cache
def writes(dtype: torch.dtype) -> bool:
    """Whether fast kernels write this dtype; AVX2's write bfloat16 a thousand times more slowly than float32."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16_instructions())


@lru_cache(maxsize=64)
def products_are_exact(largest_input: int, largest_weight: int) -> bool:
    """Whether the processor's kernels add the largest products without saturation; asked of the kernels themselves.

    Processors without VNNI add pairs of products in 16 bits: exact for 4-bit formats, not for 8-bit ones.
    """
    cpu = torch.device("cpu")  # whatever the default device is
    x = torch.full((2, 64, 3, 3), largest_input, dtype=torch.uint8, device=cpu)
    x = x.contiguous(memory_format=torch.channels_last)
    ones, geometry = torch.ones(16, dtype=torch.float32, device=cpu), ((1, 1), (1, 1), (1, 1), 1)
    for value in (largest_weight, -largest_weight):
        weight = torch.full((16, 64, 1, 1), value, dtype=torch.int8, device=cpu)
        packed = pack_int8_conv(F.pad(weight, (1, 1, 1, 1)), ones, *geometry, x.shape)
        convolved = convolution(x, 1.0, 0, packed, ones, None, *geometry)
        multiplied = linear(x[:, :, 0, 0].contiguous(), 1.0, 0, pack_int8_linear(weight[:, :, 0, 0]), ones, None)
        expected = float(64 * largest_input * value)
        if not bool((convolved == expected).all() and (multiplied == expected).all()):
            return False
    return True


@lru_cache(maxsize=256)
def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64, device="cpu")


def linear(
    x: Tensor,
    unit: float,
    zero: int,
    packed: Tensor,
    units: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `compat.torch.int8_linear`; the weight's zero points are 0."""
    return int8_linear(x, unit, zero, packed, units, _zeros(len(units)), bias, dtype)


def convolution(
    x: Tensor, unit: float, zero: int, packed: Tensor, units: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """See `compat.torch.int8_conv`; the weight's zero points are 0."""
    return int8_conv(x, unit, zero, packed, units, _zeros(len(units)), bias, stride, padding, dilation, groups, dtype)
