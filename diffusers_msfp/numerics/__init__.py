"""Tensors in, tensors out: rounding, fake quantization, packing. No modules, no state."""

from .fake_quant import fake_quantize
from .packing import pack, packed_size, unpack
from .qparams import QParams
from .rounding import decode, encode

__all__ = ["QParams", "decode", "encode", "fake_quantize", "pack", "packed_size", "unpack"]
