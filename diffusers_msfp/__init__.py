"""MSFP for diffusers: 4-bit floating-point weights and activations for diffusion models.

Importing this package registers the quantization method `"msfp"` with diffusers.
"""

from .calibration import search_qparams
from .errors import MSFPError
from .formats import FORMATS, FPFormat
from .hub import publish
from .integration import (
    MSFPConfig,
    MSFPPipelineMixin,
    MSFPQuantizer,
    export_adapter,
    import_adapter,
    quantize_pipeline,
    register,
)
from .numerics import QParams, decode, encode, fake_quantize
from .schemes import SCHEMES
from .workflow import (
    FinetuneConfig,
    RoundingConfig,
    SplitConfig,
    TemporalConfig,
    calibrate,
    calibration_state,
    denoising_factors,
    finetune,
    freeze,
    learn_rounding,
    maintain_temporal,
    set_engine,
    split_shortcuts,
)

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "SCHEMES",
    "FPFormat",
    "FinetuneConfig",
    "MSFPConfig",
    "MSFPError",
    "MSFPPipelineMixin",
    "MSFPQuantizer",
    "QParams",
    "RoundingConfig",
    "SplitConfig",
    "TemporalConfig",
    "calibrate",
    "calibration_state",
    "decode",
    "denoising_factors",
    "encode",
    "export_adapter",
    "fake_quantize",
    "finetune",
    "freeze",
    "import_adapter",
    "learn_rounding",
    "maintain_temporal",
    "publish",
    "quantize_pipeline",
    "search_qparams",
    "set_engine",
    "split_shortcuts",
]

register()
