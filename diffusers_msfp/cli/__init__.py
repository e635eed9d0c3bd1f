"""The command line: each verb is a plain Python function that returns what `--json` prints."""

from ..doctor import diagnose as doctor
from .bench import bench, warmup
from .checkpoints import convert_checkpoint, export, fuse, inspect
from .compare import compare
from .demo import demo
from .evaluate import evaluate
from .finetune import finetune
from .publish import publish
from .quantize import quantize
from .report import report
from .sample import sample
from .space import space_create, space_run

__all__ = [
    "bench",
    "compare",
    "convert_checkpoint",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "fuse",
    "inspect",
    "publish",
    "quantize",
    "report",
    "sample",
    "space_create",
    "space_run",
    "warmup",
]
