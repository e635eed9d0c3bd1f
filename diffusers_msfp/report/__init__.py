"""The quality report: one HTML page on what a quantized model is, what it lost, and where."""

from .collect import collect_report
from .page import render_report

__all__ = ["collect_report", "render_report"]
