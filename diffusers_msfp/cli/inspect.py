"""`inspect`: what a quantized checkpoint holds."""

from pathlib import Path

from ..evaluation import describe_checkpoint


def inspect(source: str | Path) -> dict:
    """Layers of a quantized checkpoint; see `describe_checkpoint`."""
    return describe_checkpoint(source)
