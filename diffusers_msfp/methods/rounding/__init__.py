"""Learned rounding: for every weight, which of its two neighbours on the floating-point grid it becomes."""

from .soft import SoftRounding, annealed_exponent

__all__ = ["SoftRounding", "annealed_exponent"]
