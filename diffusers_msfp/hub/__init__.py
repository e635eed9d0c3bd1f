"""Quantized checkpoints on the Hub: what a repository holds, its card, and how it gets there."""

from .card import check_card, render_card
from .publish import publish

__all__ = ["check_card", "publish", "render_card"]
