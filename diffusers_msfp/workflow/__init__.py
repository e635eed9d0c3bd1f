"""Verbs on a whole model: convert its layers, calibrate and freeze their inputs, choose an engine, fine-tune."""

from .calibrate import calibrate
from .convert import Conversion, convert
from .denoising_factor import denoising_factors
from .engine import set_engine
from .finetune import Finetuner
from .finetune_config import FinetuneConfig
from .finetuning import finetune
from .reconstruct import learn_rounding
from .rounding_config import RoundingConfig
from .split import SplitConfig, split_shortcuts
from .state import calibration_state, freeze
from .temporal import TemporalConfig, maintain_temporal

__all__ = [
    "Conversion",
    "FinetuneConfig",
    "Finetuner",
    "RoundingConfig",
    "SplitConfig",
    "TemporalConfig",
    "calibrate",
    "calibration_state",
    "convert",
    "denoising_factors",
    "finetune",
    "freeze",
    "learn_rounding",
    "maintain_temporal",
    "set_engine",
    "split_shortcuts",
]
