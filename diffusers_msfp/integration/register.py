"""Make diffusers know the method `"msfp"`."""

from diffusers.quantizers import auto

from ..errors import ConfigError
from .config import MSFPConfig, MSFPMethod
from .quantizer import MSFPQuantizer


def register() -> None:
    """Enter config and quantizer in diffusers' two tables; calling it again changes nothing.

    An entry of diffusers' own is left alone: it can only be a factory that imports this package when it is needed.

    Raises:
        ConfigError: something else is registered under this name.
    """
    tables = ((auto.AUTO_QUANTIZER_MAPPING, MSFPQuantizer), (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, MSFPConfig))
    for table, cls in tables:
        present = table.setdefault(MSFPMethod.MSFP.value, cls)
        if present is not cls and not present.__module__.startswith("diffusers."):
            raise ConfigError(f"'msfp' must be free in diffusers, but {present.__module__}.{present.__name__} has it.")
