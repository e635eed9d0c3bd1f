"""Make diffusers and transformers know the method `"msfp"`: one through its tables, the other by its decorators."""

from ..compat import diffusers as diffusers_tables
from ..compat import transformers as transformers_tables
from ..errors import ConfigError
from . import copies, overrides
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
    ours = {diffusers_tables: (MSFPQuantizer, MSFPConfig), transformers_tables: (MSFPTransformersQuantizer, MSFPConfig)}
    for library, classes in ours.items():
        name = library.__name__.rpartition(".")[2]
        for table, cls in zip(library.quantization_tables(), classes, strict=True):
            present = table.get(METHOD, cls)
            if present is not cls and present.__module__.partition(".")[0] != name:
                taken = f"{present.__module__}.{present.__name__}"
                raise ConfigError(f"'msfp' must be free in {name}, but {taken} has it.")
    for table, cls in zip(diffusers_tables.quantization_tables(), ours[diffusers_tables], strict=True):
        table.setdefault(METHOD, cls)
    transformers_tables.register(METHOD, *ours[transformers_tables])
    copies.install()
    overrides.install_on_classes()
