"""The doors to diffusers: config, quantizer, registration, and quantizing what is already in memory."""

from .config import MSFPConfig
from .in_memory import quantize_pipeline
from .quantizer import MSFPQuantizer
from .register import register

__all__ = ["MSFPConfig", "MSFPQuantizer", "quantize_pipeline", "register"]
