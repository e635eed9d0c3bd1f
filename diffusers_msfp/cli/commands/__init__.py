"""The program's commands: a verb's arguments, and its result printed for people.

What a verb does is in the file of the same name one folder up, of `doctor` in the room of that name. A new one gets a
file in both places and a line in `COMMANDS`.
"""

from .bench import bench, warmup
from .checkpoints import convert_checkpoint, export, fuse, inspect
from .compare import compare
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .finetune import finetune
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
    fuse,
    export,
    convert_checkpoint,
    demo,
    doctor,
)
"""In the order of `--help`."""

GROUPS = (space,)
"""Verbs with verbs of their own."""
