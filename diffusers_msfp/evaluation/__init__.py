"""What quantization costs, in figures and pictures; what a checkpoint holds."""

from .compare import compare_pipelines, with_ddim
from .describe import describe_checkpoint
from .pictures import image_grid

__all__ = ["compare_pipelines", "describe_checkpoint", "image_grid", "with_ddim"]
