"""What quantization costs, in figures and pictures; what a checkpoint holds."""

from ..checkpoint.describe import describe_checkpoint
from ..methods.temporal.features import temporal_features
from ..sampling.solvers import with_ddim
from .compare import compare_pipelines
from .evaluate import evaluate_pipelines
from .images.features import FEATURES, Features
from .images.grid import image_grid, sample_images
from .layers import layer_snr

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
