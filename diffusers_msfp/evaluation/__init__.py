"""What quantization costs, in figures and pictures; what a checkpoint holds."""

from ..workflow.sampling import with_ddim
from .compare import compare_pipelines
from .describe import describe_checkpoint
from .pictures import image_grid
from .temporal import temporal_features

__all__ = ["compare_pipelines", "describe_checkpoint", "image_grid", "temporal_features", "with_ddim"]
