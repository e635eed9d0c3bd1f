"""What a device can run."""

import torch

from ...formats import FPFormat
from .codes import holds

_NEEDS = {  # kernel: (compute capability, why)
    "int_mm": ((7, 5), "int8 tensor cores"),
    "triton": ((8, 0), "what Triton compiles for"),
    "fp8": ((8, 9), "FP8 tensor cores"),
    "fp4": ((10, 0), "FP4 tensor cores"),
}
_NO_FP4 = (
    "FP4 tensor cores are there but not used: they know E2M1 alone, want a scale for every 16 or 32 values and have no "
    "zero point, so few layers of an MSFP model could run on them"
)


def limits(capability: tuple[int, int]) -> dict[str, str]:
    """Kernel → why a device of this compute capability cannot run it; empty where it can.

    Kernels are `int_mm` (linears by `gemm`), `triton` (everything written in Triton), `fp8` (float8 codes) and `fp4`.
    """
    actual = ".".join(map(str, capability))
    reasons = {"fp4": _NO_FP4}
    for kernel, ((major, minor), why) in _NEEDS.items():
        if capability < (major, minor):
            reasons[kernel] = f"compute capability {major}.{minor} is needed ({why}), but this is {actual}"
    return {kernel: reasons.get(kernel, "") for kernel in _NEEDS}


def code_dtypes(weight: FPFormat, activation: FPFormat, capability: tuple[int, int]) -> tuple[torch.dtype, ...]:
    """Dtypes for the codes of a layer that are exact on both sides and run on the device, the best first.

    int8 sums are exact and as fast as anything up to Hopper; bfloat16 holds every format; float8 comes last, since
    its sums are exact only as far as the tensor cores carry.
    """
    reasons = limits(capability)
    needs = {torch.int8: "triton", torch.bfloat16: "triton", torch.float8_e4m3fn: "fp8"}
    return tuple(
        dtype
        for dtype, kernel in needs.items()
        if not reasons[kernel] and holds(dtype, weight) and holds(dtype, activation)
    )
