"""What this machine can do for quantized models, and what it lacks."""

from .caches import Cache
from .diagnose import Diagnosis, diagnose
from .engines import EngineTrial
from .machine import Device, Processor
from .packages import Package

__all__ = ["Cache", "Device", "Diagnosis", "EngineTrial", "Package", "Processor", "diagnose"]
