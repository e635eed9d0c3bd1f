"""MSFP for diffusers: 4-bit floating-point weights and activations for diffusion models.

Importing this package registers the quantization method `"msfp"` with diffusers.
"""

from .calibration import search_qparams
from .errors import MSFPError
from .formats import FORMATS, FPFormat
from .integration import MSFPConfig, MSFPQuantizer, quantize_pipeline, register
from .numerics import QParams, decode, encode, fake_quantize
from .schemes import SCHEMES
from .workflow import calibrate, calibration_state, freeze

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "SCHEMES",
    "FPFormat",
    "MSFPConfig",
    "MSFPError",
    "MSFPQuantizer",
    "QParams",
    "calibrate",
    "calibration_state",
    "decode",
    "encode",
    "fake_quantize",
    "freeze",
    "quantize_pipeline",
    "search_qparams",
]

register()
