"""What quantization costs, in figures and pictures; what a checkpoint holds."""

from ..workflow.solvers import with_ddim
from .compare import compare_pipelines
from .describe import describe_checkpoint
from .evaluate import evaluate_pipelines
from .features import FEATURES, Features
from .layers import layer_snr
from .pictures import image_grid, sample_images
from .temporal import temporal_features

__all__ = [
    "FEATURES",
    "Features",
    "compare_pipelines",
    "describe_checkpoint",
    "evaluate_pipelines",
    "image_grid",
    "layer_snr",
    "sample_images",
    "temporal_features",
    "with_ddim",
]
