"""What improves a quantized model with its float original: a folder for each method, and what all of them need."""

from .correction.method import CORRECTION_METHOD
from .method import METHODS
from .rounding.method import ROUNDING
from .split.method import SPLIT
from .talora.method import TALORA
from .temporal.method import TEMPORAL

for _method in (SPLIT, TEMPORAL, ROUNDING, TALORA, CORRECTION_METHOD):
    METHODS.add(_method.name, _method)

__all__ = ["METHODS"]
