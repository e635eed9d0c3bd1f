"""`inspect`: what a quantized checkpoint holds."""

from pathlib import Path

from ..checkpoint.describe import describe_checkpoint
from .load import require_variant, variant_of


def inspect(source: str | Path, *, variant: str | None = None) -> dict:
    """Layers of a quantized checkpoint, with the weights of a variant where it has that; see `describe_checkpoint`."""
    require_variant(variant, source)
    return describe_checkpoint(source, variant_of(source, variant))
