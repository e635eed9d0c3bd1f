"""The program's commands, one per file: a verb's arguments, and its result printed for people.

What a verb does is in the file of the same name one folder up. A new one gets a file in both places and a line in
`COMMANDS`.
"""

from .bench import bench, warmup
from .compare import compare
from .convert_checkpoint import convert_checkpoint
from .demo import demo
from .evaluate import evaluate
from .finetune import finetune
from .inspect import inspect
from .publish import publish
from .quantize import quantize
from .report import report
from .sample import sample
from .space import space

COMMANDS = (
    quantize,
    finetune,
    sample,
    compare,
    evaluate,
    bench,
    warmup,
    inspect,
    report,
    publish,
    convert_checkpoint,
    demo,
)
"""In the order of `--help`."""

GROUPS = (space,)
"""Verbs with verbs of their own."""
