"""What quantization costs, in figures and pictures; what a checkpoint holds."""

from ..checkpoint.describe import describe_checkpoint
from ..methods.temporal.features import temporal_features
from ..sampling.solvers import with_ddim
from .compare import Comparison, compare_pipelines
from .evaluate import Evaluation, evaluate_pipelines
from .images.features import FEATURES, Features
from .images.grid import image_grid, sample_images
from .layers import LayerError, layer_snr

__all__ = [
    "FEATURES",
    "Comparison",
    "Evaluation",
    "Features",
    "LayerError",
    "compare_pipelines",
    "describe_checkpoint",
    "evaluate_pipelines",
    "image_grid",
    "layer_snr",
    "sample_images",
    "temporal_features",
    "with_ddim",
]
