"""Make diffusers and transformers know the method `"msfp"`: one through its tables, the other by its decorators."""

from diffusers.quantizers import auto as diffusers_auto
from transformers.quantizers import auto as transformers_auto

from ..errors import ConfigError
from . import copies
from .config import MSFPConfig, MSFPMethod
from .quantizer import MSFPQuantizer
from .transformers_quantizer import MSFPTransformersQuantizer

METHOD = MSFPMethod.MSFP.value


def register() -> None:
    """Enter config and quantizers in both libraries; calling it again changes nothing.

    An entry of diffusers' own is left alone: it can only be a factory that imports this package when it is needed.

    Raises:
        ConfigError: something else is registered under this name; nothing is entered then.
    """
    quantizers = {diffusers_auto: MSFPQuantizer, transformers_auto: MSFPTransformersQuantizer}
    for library, quantizer in quantizers.items():
        for table, cls in _tables(library, quantizer):
            present = table.get(METHOD, cls)
            if present is not cls and not _own(library, present):
                taken = f"{present.__module__}.{present.__name__}"
                raise ConfigError(f"'msfp' must be free in {library.__name__.split('.')[0]}, but {taken} has it.")
    for table, cls in _tables(diffusers_auto, MSFPQuantizer):
        table.setdefault(METHOD, cls)
    copies.install()
    if METHOD not in transformers_auto.AUTO_QUANTIZER_MAPPING:
        transformers_auto.register_quantizer(METHOD)(MSFPTransformersQuantizer)
    if METHOD not in transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        transformers_auto.register_quantization_config(METHOD)(MSFPConfig)


def _tables(library, quantizer: type) -> tuple:
    return (library.AUTO_QUANTIZER_MAPPING, quantizer), (library.AUTO_QUANTIZATION_CONFIG_MAPPING, MSFPConfig)


def _own(library, entry: type) -> bool:
    return entry.__module__.startswith(f"{library.__name__.partition('.')[0]}.")
