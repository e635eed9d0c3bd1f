"""Correction of a quantized model's output by timestep: the part of its error that is the same for all samples."""

from .table import CorrectionHook, CorrectionPlan, CorrectionTable

__all__ = ["CorrectionHook", "CorrectionPlan", "CorrectionTable"]
