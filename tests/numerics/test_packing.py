"""Packing is exact for every length, and its bytes are fixed for good."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_msfp.errors import ShapeError
from diffusers_msfp.numerics import pack, packed_size, unpack


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([4, 6, 8]), st.integers(0, 5), st.integers(0, 23))
def test_comes_back_exact(bits, rows, length):
    codes = torch.randint(2**bits, (rows, length), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_size(length, bits))
    assert torch.equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_is_a_little_endian_bit_stream(bits):
    codes = torch.randint(2**bits, (3, 11), dtype=torch.uint8)
    for row, packed in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert packed == list(stream.to_bytes(packed_size(11, bits), "little"))


def test_bad_shapes_are_refused():
    with pytest.raises(ShapeError, match="shape \\(rows, length\\)"):
        pack(torch.zeros(3, dtype=torch.uint8), 4)
    with pytest.raises(ShapeError, match="below 16 for 4 bits, but got 16"):
        pack(torch.full((1, 2), 16, dtype=torch.uint8), 4)
    with pytest.raises(ShapeError, match="rows of 2 bytes"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 4, 4)
