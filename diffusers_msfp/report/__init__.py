"""The quality report: one HTML page on what a quantized model is, what it lost, and where."""

from .collect import Report, collect_report
from .page import render_report

__all__ = ["Report", "collect_report", "render_report"]
