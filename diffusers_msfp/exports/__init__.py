"""Exports: a quantized denoiser as a graph of integers in a file that runs without this package."""

from .export import TARGETS, ExportedGraph, check_export, export
from .target import Target

__all__ = ["TARGETS", "ExportedGraph", "Target", "check_export", "export"]
