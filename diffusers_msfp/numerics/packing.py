"""Codes as a little-endian bit stream: the first code of a row in the lowest bits of its first byte.

4-bit codes go two to a byte, 6-bit codes four to three bytes, 8-bit codes one to a byte. Each row ends with zero bits
up to a whole byte, so rows can be read alone.
"""

from functools import reduce
from math import gcd

import torch
from torch import Tensor

from ..errors import ShapeError


def _group(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest whole group: 2 and 1 for 4 bits, 4 and 3 for 6."""
    shared = gcd(bits, 8)
    return 8 // shared, bits // shared


def packed_size(length: int, bits: int) -> int:
    """Bytes of a row of `length` codes."""
    return (length * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes row by row.

    Args:
        codes (`Tensor`, `(rows, length)`, uint8): codes below `2**bits`.
        bits (`int`): 1 to 8.

    Returns:
        `Tensor`, `(rows, packed_size(length, bits))`, uint8.

    Raises:
        ShapeError: `codes` is not two-dimensional or holds a code that does not fit.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=4).tolist()
        [[33, 3]]
    """
    if codes.ndim != 2:
        raise ShapeError(f"Codes must have shape (rows, length), but got {tuple(codes.shape)}.")
    if not codes.is_meta and codes.numel() and int(codes.max()) >= 2**bits:
        raise ShapeError(f"Codes must be below {2**bits} for {bits} bits, but got {int(codes.max())}.")
    length = codes.shape[1]
    num_codes, num_bytes = _group(bits)
    groups = _groups(codes, num_codes, bits)
    word = reduce(torch.add, [groups[..., i] << (i * bits) for i in range(num_codes)])  # (rows, groups)
    parts = [(word >> (8 * i)) & 0xFF for i in range(num_bytes)]
    packed = torch.stack(parts, dim=-1).to(torch.uint8).flatten(1)
    return packed[:, : packed_size(length, bits)].contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed (`Tensor`, `(rows, packed_size(length, bits))`, uint8).
        bits (`int`): 1 to 8.
        length (`int`): codes per row.

    Returns:
        `Tensor`, `(rows, length)`, uint8.

    Raises:
        ShapeError: the number of bytes does not fit `length`.
    """
    if packed.ndim != 2 or packed.shape[1] != packed_size(length, bits):
        raise ShapeError(
            f"{length} codes of {bits} bits take rows of {packed_size(length, bits)} bytes, but got "
            f"{tuple(packed.shape)}."
        )
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :length]
    num_codes, num_bytes = _group(bits)
    groups = _groups(packed, num_bytes, bits)
    word = reduce(torch.add, [groups[..., i] << (8 * i) for i in range(num_bytes)])
    parts = [(word >> (i * bits)) & (2**bits - 1) for i in range(num_codes)]
    return torch.stack(parts, dim=-1).to(torch.uint8).flatten(1)[:, :length]


def _groups(rows: Tensor, size: int, bits: int) -> Tensor:
    """`(R, n)` uint8 → `(R, ceil(n / size), size)`, padded with zeros, in integers that hold a group of `_group`."""
    number = -(-rows.shape[1] // size)
    padded = torch.nn.functional.pad(rows, (0, number * size - rows.shape[1]))
    return padded.view(rows.shape[0], number, size).to(torch.int64 if bits % 2 else torch.int32)
