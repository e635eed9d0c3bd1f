"""The doors to diffusers: config, quantizer, registration, in-memory quantization, the pipeline's verbs, LoRA files."""

from .config import MSFPConfig
from .exchange import export_adapter, import_adapter
from .in_memory import quantize_pipeline
from .pipeline import MSFPPipelineMixin
from .quantizer import MSFPQuantizer
from .register import register

__all__ = [
    "MSFPConfig",
    "MSFPPipelineMixin",
    "MSFPQuantizer",
    "export_adapter",
    "import_adapter",
    "quantize_pipeline",
    "register",
]
