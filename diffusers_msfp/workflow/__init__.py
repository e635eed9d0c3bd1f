"""Verbs on a whole model: convert its layers, calibrate and freeze their inputs, describe them for a checkpoint."""

from .calibrate import calibrate
from .convert import Conversion, convert
from .state import calibration_state, freeze

__all__ = ["Conversion", "calibrate", "calibration_state", "convert", "freeze"]
