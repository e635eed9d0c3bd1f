"""Tensors in, tensors out: rounding, fake quantization, packing, selection. No modules, no state."""

from .codes import Codes
from .fake_quant import fake_quantize
from .packing import pack, packed_size, unpack
from .qparams import QParams
from .rounding import decode, encode
from .select import select

__all__ = ["Codes", "QParams", "decode", "encode", "fake_quantize", "pack", "packed_size", "select", "unpack"]
