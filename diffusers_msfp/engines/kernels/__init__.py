"""What a CPU engine does besides multiplying: quantize inputs in one pass over memory, and expand packed weights.

Two interchangeable sets of the same functions: Numba's, where it is installed (`pip install diffusers-msfp[cpu]`), and
torch's. Each of the first
three returns with its tensor whether all values were finite.

- `quantize(x, grid)`: any dense float32, bfloat16 or float16 tensor → uint8, same strides; the bytes of `InputGrid`.
- `centre(x, grid, dtype)`: as before → `dtype`; lattice integers minus the zero point.
- `norm(x, groups, weight, bias, eps, silu, grid)`: `(B, C, …)`, channels last → uint8, or float32 without a grid; group
  norm, SiLU if wanted, quantization.
- `expand(packed, bits, length, table)`: `(C, bytes)` uint8 → `(C, length)`, dtype of `table`; entries of packed codes.
"""

try:
    from . import numba_kernels as best

    NAME = "numba"
except ImportError:
    from . import torch_kernels as best

    NAME = "torch"

quantize, centre, norm, expand = best.quantize, best.centre, best.norm, best.expand

__all__ = ["NAME", "centre", "expand", "norm", "quantize"]
