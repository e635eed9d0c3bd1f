"""cuda: lattice integers on an NVIDIA GPU's tensor cores, by kernels written in Triton.

Codes are int8 where both formats fit, with exact int32 sums, else bfloat16 with float32 sums. Linears with packed
4-bit weights and a float input decode the weight inside the product.

**Inputs that are not finite** are found by the kernel that quantizes them, and layers do not wait for it: each has a
flag on the device, and `check_inputs`, a forward hook of the model, reads all of them together: one wait for a call of
the model. Layers that are called alone leave it to the next call of the model, or to who calls `check_inputs`.
"""

import logging
from functools import lru_cache
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..formats import FORMATS
from ..layers import QuantLayer
from .engine import Engine, PreparedLayer
from .triton.capability import code_dtypes, limits
from .triton.device_codes import MAX_TERMS

logger = logging.getLogger(__name__)


class CudaEngine(Engine):
    """Tensor cores of an NVIDIA GPU."""

    name = "cuda"

    def __init__(self, memory: str = "fast") -> None:
        super().__init__(memory)
        self._flags: dict[torch.device, dict[str, Tensor]] = {}

    @staticmethod
    def capability(device: torch.device) -> tuple[int, int] | None:
        """Compute capability of a device; None if it is no NVIDIA GPU."""
        nvidia = device.type == "cuda" and torch.version.hip is None
        return torch.cuda.get_device_capability(device) if nvidia else None

    def refusal(self, layer: QuantLayer) -> str | None:
        """See `Engine.refusal`."""
        device = layer.packed_weight.device
        capability = self.capability(device)
        if capability is None:
            return f"its weight is on {device.type}, not on an NVIDIA GPU"
        if find_spec("triton") is None:
            return "Triton is not installed"
        if limits(capability)["triton"]:
            return limits(capability)["triton"]
        if layer.group_size is not None:
            return "its weight has group scales, which the kernels do not read"
        if layer.adapters is not None and layer.adapters.reads_codes:
            return "adapters that read codes add to its weight, which the kernels read packed"
        if layer.input_format is None:
            if not isinstance(layer, nn.Linear) or layer.weight_format.bits != 4:
                return "its input is not quantized, and it is no linear with 4-bit weights"
        elif self.code_dtype(layer) is None:
            return f"no codes hold both {layer.weight_format} and {layer.input_format}"
        return launch_failure(device)

    def code_dtype(self, layer: QuantLayer) -> torch.dtype | None:
        """The best dtype for the codes of a layer; None if none is exact."""
        capability = self.capability(layer.packed_weight.device)
        if layer.input_format is None or capability is None:
            return None
        dtypes = code_dtypes(layer.weight_format, layer.input_format, capability)
        many = layer.matrix_shape[1] > MAX_TERMS
        return next((dtype for dtype in dtypes if not (many and dtype == torch.int8)), None)

    def prepare(self, layer: QuantLayer) -> PreparedLayer:
        """See `Engine.prepare`."""
        from .cuda_layers import CudaConv, CudaLinear, FloatLinear

        device, keep = layer.packed_weight.device, self.memory == "fast"
        _say_what_is_left_out(self.capability(device))
        if layer.input_format is None:
            return FloatLinear(layer, keep)
        dtype = cast(torch.dtype, self.code_dtype(layer))  # `refusal` has looked
        flags = self._flags.setdefault(device, {})
        flag = flags.setdefault(layer.module_name, torch.zeros(1, dtype=torch.int32, device=device))
        return (CudaLinear if isinstance(layer, nn.Linear) else CudaConv)(layer, keep, dtype, flag)

    def check_inputs(self, *_call: object) -> None:
        """See `Engine.check_inputs`."""
        for flags in self._flags.values():
            raised = torch.cat(list(flags.values())).tolist()
            if any(raised):
                with torch.inference_mode():  # where they may have been made
                    for flag in flags.values():
                        flag.zero_()
                module_name = next(module_name for module_name, bad in zip(flags, raised, strict=True) if bad)
                raise NonFiniteError(
                    f"The input of layer `{module_name}` must be finite, but got NaN or infinity. Look for an overflow "
                    f"before this place; float16 overflows at 65504, bfloat16 and float32 do not."
                )


@lru_cache(maxsize=16)
def launch_failure(device: torch.device) -> str | None:
    """Why Triton cannot make and launch a kernel, e.g. for lack of a C compiler; None if it can."""
    try:
        from .triton.input_codes import quantize

        one = torch.ones((), dtype=torch.float32, device=device)
        quantize(one, one, one, FORMATS["fp4_e2m1"])
    except Exception as error:  # noqa: BLE001 – a compiler can fail in any way
        return f"Triton fails here ({error})"
    return None


@lru_cache(maxsize=16)
def _say_what_is_left_out(capability: tuple[int, int]) -> None:
    if capability >= (10, 0):
        logger.warning("%s.", limits(capability)["fp4"])
