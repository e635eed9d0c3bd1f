"""What quantization costs, in figures and pictures; what a checkpoint holds."""

from ..workflow.sampling import with_ddim
from .compare import compare_pipelines
from .describe import describe_checkpoint
from .pictures import image_grid, sample_images

__all__ = ["compare_pipelines", "describe_checkpoint", "image_grid", "sample_images", "with_ddim"]
