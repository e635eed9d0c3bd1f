"""MSFP for diffusers: 4-bit floating-point weights and activations for diffusion models.

Importing this package registers the quantization method `"msfp"` with diffusers.
"""

from .budget import BudgetPlan, plan_budget
from .calibration import search_qparams
from .engines.choose import set_engine
from .errors import MSFPError, StateError
from .exports import export
from .formats import FORMATS, FPFormat
from .hub import publish
from .methods.correction.attach import uncorrect_output
from .methods.correction.fit import CorrectionConfig, correct_output
from .methods.rounding.config import RoundingConfig
from .methods.rounding.learn import learn_rounding
from .methods.split.shortcuts import SplitConfig, split_shortcuts
from .methods.talora.config import FinetuneConfig
from .methods.talora.finetune import finetune
from .methods.temporal.maintain import TemporalConfig, maintain_temporal
from .numerics import QParams, decode, encode, fake_quantize
from .plugin import (
    MSFPConfig,
    MSFPPipelineMixin,
    MSFPQuantizer,
    calibrate,
    dequantize,
    export_adapter,
    fuse_lora,
    import_adapter,
    quantize_pipeline,
    register,
)
from .sampling.denoising_factor import denoising_factors
from .sampling.observation import calibration_state, freeze
from .schemes import SCHEMES

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "SCHEMES",
    "BudgetPlan",
    "CorrectionConfig",
    "FPFormat",
    "FinetuneConfig",
    "MSFPConfig",
    "MSFPError",
    "MSFPPipelineMixin",
    "MSFPQuantizer",
    "QParams",
    "RoundingConfig",
    "SplitConfig",
    "StateError",
    "TemporalConfig",
    "calibrate",
    "calibration_state",
    "correct_output",
    "decode",
    "denoising_factors",
    "dequantize",
    "encode",
    "export",
    "export_adapter",
    "fake_quantize",
    "finetune",
    "freeze",
    "fuse_lora",
    "import_adapter",
    "learn_rounding",
    "maintain_temporal",
    "plan_budget",
    "publish",
    "quantize_pipeline",
    "search_qparams",
    "set_engine",
    "split_shortcuts",
    "uncorrect_output",
]

register()
