"""The plugin for diffusers and transformers: config, quantizers, registration, the pipeline's verbs, LoRA files."""

from .adapters.exchange import export_adapter, import_adapter
from .adapters.fusing import fuse_lora
from .calibrate import calibrate
from .config import MSFPConfig
from .mixin import MSFPPipelineMixin
from .quantize import dequantize, quantize_pipeline
from .quantizer import MSFPQuantizer
from .register import register

__all__ = [
    "MSFPConfig",
    "MSFPPipelineMixin",
    "MSFPQuantizer",
    "calibrate",
    "dequantize",
    "export_adapter",
    "fuse_lora",
    "import_adapter",
    "quantize_pipeline",
    "register",
]
