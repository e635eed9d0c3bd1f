"""Quantized checkpoints on the Hub: what a repository holds, its card, and how it gets there."""

from .card import check_card, render_card
from .publish import Published, publish

__all__ = ["Published", "check_card", "publish", "render_card"]
