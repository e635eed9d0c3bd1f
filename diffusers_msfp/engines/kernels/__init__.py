"""What a CPU engine does besides multiplying: quantize inputs in one pass over memory, and expand packed weights.

Two interchangeable sets of the same functions: Numba's, where it is installed (`pip install diffusers-msfp[cpu]`), and
torch's. Each of the first three returns with its tensor whether all values were finite.

- `quantize(x, grid, several=None)`: any dense float32, bfloat16 or float16 tensor → a list of one or two uint8 tensors
  with the same strides, one for each of `grid.planes`; in several threads or one, by default by its size.
- `centre(x, grid, dtype)`: as before → `dtype`; lattice integers minus the zero point.
- `norm(x, groups, weight, bias, eps, silu, grid, added)`: group norm of `x + added`, SiLU if wanted, quantization;
  `(B, C, …)` channels last and `(B, C)`, parameters of any dtype → uint8, or the dtype of `x` without a grid.
  `norm_in_passes` is torch's, for Numba's gives an image to one thread.
- `expand(packed, bits, length, table)`: `(C, bytes)` uint8 → `(C, length)`, dtype of `table`; entries of packed codes.
- `columns(codes, size, stride, padding, dilation, zero)`: uint8 `(B, C, H, W)` channels last → `(B, H', W', size * C)`,
  a convolution's patches, with the byte `zero` as padding.
- `softmax_numerators(scores)`: `(…, n)` bfloat16, becomes softmax × factor → `(…, 1)` float32, factor.
"""

from functools import partial
from types import ModuleType

from . import torch_kernels

best: ModuleType = torch_kernels
try:
    import numba
except ImportError:
    pass
else:
    if not getattr(numba.config, "DISABLE_JIT", False):  # as Python, kernels would take hours
        from . import numba_kernels

        best = numba_kernels

SEVERAL_QUANTIZE: int = getattr(best, "SEVERAL_QUANTIZE", 0)
"""Values from which several threads quantize by default."""
NAME = best.__name__.rpartition(".")[2].removesuffix("_kernels")

quantize, centre, norm, expand = best.quantize, best.centre, best.norm, best.expand
columns, softmax_numerators = best.columns, best.softmax_numerators
norm_in_passes = partial(torch_kernels.norm, quantizer=quantize)

__all__ = ["NAME", "centre", "columns", "expand", "norm", "norm_in_passes", "quantize", "softmax_numerators"]
