"""What a device can run."""

import torch

from ...formats import FPFormat
from .device_codes import holds

_NEEDS = {  # kernel: (compute capability, why)
    "int_mm": ((7, 5), "int8 tensor cores"),
    "triton": ((8, 0), "what Triton compiles for"),
    "fp4": ((10, 0), "FP4 tensor cores"),
}
_NO_FP4 = (
    "FP4 tensor cores are there but not used: they know E2M1 alone, want a scale for every 16 or 32 values and have no "
    "zero point, so few layers of an MSFP model could run on them"
)


def limits(capability: tuple[int, int]) -> dict[str, str]:
    """Kernel → why a device of this compute capability cannot run it; empty where it can.

    Kernels are `int_mm` (linears by `gemm`), `triton` (everything written in Triton) and `fp4`.
    """
    actual = ".".join(map(str, capability))
    reasons = {"fp4": _NO_FP4}
    for kernel, ((major, minor), why) in _NEEDS.items():
        if capability < (major, minor):
            reasons[kernel] = f"compute capability {major}.{minor} is needed ({why}), but this is {actual}"
    return {kernel: reasons.get(kernel, "") for kernel in _NEEDS}


def code_dtypes(weight: FPFormat, activation: FPFormat, capability: tuple[int, int]) -> tuple[torch.dtype, ...]:
    """Dtypes for the codes of a layer that are exact on both sides and run on the device, the best first.

    int8 sums are exact and as fast as anything up to Hopper; bfloat16 holds every format. What float8 holds, bfloat16
    does too, with sums that are exact further than those of tensor cores for float8.
    """
    if limits(capability)["triton"]:
        return ()
    return tuple(dtype for dtype in (torch.int8, torch.bfloat16) if holds(dtype, weight) and holds(dtype, activation))
