"""Quantized layers: packed weights, exact scales, quantized inputs."""

from .kinds import QUANT_LAYERS, QuantConv1d, QuantConv2d, QuantLinear
from .quant_layer import QuantLayer
from .split import SplitLayer

__all__ = ["QUANT_LAYERS", "QuantConv1d", "QuantConv2d", "QuantLayer", "QuantLinear", "SplitLayer"]
