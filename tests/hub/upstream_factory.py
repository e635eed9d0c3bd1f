"""What diffusers would need for the plain call, as it has it for SDNQ: `diffusers/quantizers/msfp/msfp_quantizer.py`.

A thin factory: it imports `diffusers_msfp` when a checkpoint or a user asks for the method, and returns that package's
objects. `install` does what a change of diffusers' two tables in `quantizers/auto.py` would do.
"""

import importlib.util

from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin


def _check_msfp_requirement() -> None:
    if importlib.util.find_spec("diffusers_msfp") is None:
        raise ImportError(
            "Loading or creating an MSFP quantized model requires the diffusers-msfp library: "
            "`pip install diffusers-msfp`"
        )


class MSFPConfig(QuantizationConfigMixin):
    r"""
    Configuration of MSFP (mixup-sign floating point).

    The `diffusers-msfp` library ships its own config; this class is a thin factory that defers to it.
    """

    def __new__(cls, *args, **kwargs):
        _check_msfp_requirement()
        from diffusers_msfp import MSFPConfig as MSFPLibConfig

        return MSFPLibConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        _check_msfp_requirement()
        from diffusers_msfp import MSFPConfig as MSFPLibConfig

        return MSFPLibConfig.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)


class MSFPQuantizer(DiffusersQuantizer):
    r"""
    Diffusers Quantizer for MSFP.

    The `diffusers-msfp` library ships its own `DiffusersQuantizer` subclass; this class is a thin factory that defers
    to it. It only exists so that `quant_method="msfp"` checkpoints load natively through `DiffusersAutoQuantizer`
    without requiring `import diffusers_msfp` beforehand. The library cannot be imported at module level because it
    imports `diffusers.quantizers.auto` at import time.
    """

    def __new__(cls, quantization_config, **kwargs):
        _check_msfp_requirement()
        from diffusers_msfp import MSFPQuantizer as MSFPLibQuantizer

        return MSFPLibQuantizer(quantization_config, **kwargs)


def install() -> None:
    from diffusers.quantizers import auto

    for cls in (MSFPConfig, MSFPQuantizer):
        cls.__module__ = "diffusers.quantizers.msfp.msfp_quantizer"
    auto.AUTO_QUANTIZER_MAPPING["msfp"] = MSFPQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["msfp"] = MSFPConfig
