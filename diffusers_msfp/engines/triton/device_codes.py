"""How codes travel: which dtypes hold them, and weights as the kernels want them."""

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ...formats import INT8_MAX, FPFormat
from ...numerics import unpack

MAX_TERMS = 2**16
"""Terms of an int8 sum that cannot overflow int32: `(q - k) w` is below 255 * 127."""


def code_offset(fmt: FPFormat, dtype: torch.dtype) -> int:
    """What is taken from lattice integers so that they fit `dtype`: 128 for large unsigned formats in int8."""
    return 128 if dtype == torch.int8 and not fmt.signed and fmt.lattice_max > INT8_MAX else 0


def holds(dtype: torch.dtype, fmt: FPFormat) -> bool:
    """Whether every lattice integer, less `code_offset`, is exact in int8 or bfloat16."""
    if dtype == torch.int8:
        return fmt.fits_byte
    return fmt.mantissa_bits + 1 <= 8


@lru_cache(maxsize=64)
def _code_values(fmt: FPFormat, device: torch.device) -> Tensor:
    """Lattice integers by code, float32; kept, since a copy to a device waits for it."""
    return torch.tensor(fmt.code_values, dtype=torch.float32, device=device)


def weight_codes(
    packed: Tensor, fmt: FPFormat, shape: tuple[int, ...], dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Lattice integers of a packed weight, input channels last, and their sums.

    Args:
        packed (`Tensor`, `(O, bytes)`, uint8): as `numerics.pack` makes it.
        fmt (`FPFormat`): of the codes.
        shape (`tuple[int, ...]`): `(O, C)` or `(O, C, *kernel)`, that of the float weight.
        dtype (`torch.dtype`): one that `holds` the format.

    Returns:
        `tuple[Tensor, Tensor]`: `(O, *kernel, C)`, `dtype`; and `(O,)`, int32 for int8, else float32.
    """
    integers = _code_values(fmt, packed.device)[unpack(packed, fmt.bits, prod(shape[1:])).to(torch.int32)]
    total = integers.sum(1, dtype=torch.float64).to(torch.int32 if dtype == torch.int8 else torch.float32)
    return integers.view(shape).movedim(1, -1).contiguous().to(dtype), total
