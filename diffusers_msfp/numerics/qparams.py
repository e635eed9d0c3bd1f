"""What turns real numbers into codes and back: a format, a scale and a zero point.

Notation used throughout: `unit = scale * format.step` is the real size of one lattice step, and the zero point is
`-k * unit` with a lattice integer `k`, so a code worth the lattice integer `q` stands for `(q - k) * unit`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError, NonFiniteError, ShapeError
from ..formats import FORMATS, FPFormat

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, init=False)
class QParams:
    """Format, scale and zero point of a tensor: `x ≈ grid value * scale + zero_point`.

    Args:
        format (`FPFormat` or `str`): the number format.
        scale (`Tensor` or `float`, float32): units of x per grid unit, finite and > 0; shape `()` per tensor, or
            broadcastable to x, e.g. `(C, 1, 1, 1)` per output channel.
        zero_point (`Tensor` or `float`, float32): real-valued, units of x, shape as `scale`; 0 for signed formats,
            ≤ 0 for unsigned ones. It is used as `-k * unit` with the nearest lattice integer `k` that is itself on
            the grid, so that the real 0 always has a code.

    Raises:
        FormatError: a signed format with a zero point, or a positive zero point.
        NonFiniteError: a scale that is not finite and > 0, or a zero point that is not finite.
        ShapeError: `zero_point` does not broadcast with `scale`.

    Source:
        arXiv 2505.21591 (unsigned formats with zero point), as reconstructed; the lattice zero point is our choice.

    Example:
        >>> import torch
        >>> from diffusers_msfp import FORMATS
        >>> QParams(FORMATS["fp4_e2m1"], torch.tensor(0.5)).scale.item()
        0.5
    """

    format: FPFormat
    scale: Tensor
    zero_point: Tensor

    def __init__(self, format: FPFormat | str, scale: Tensor | float, zero_point: Tensor | float = 0.0) -> None:
        object.__setattr__(self, "format", FORMATS[format] if isinstance(format, str) else format)
        for name, given in (("scale", scale), ("zero_point", zero_point)):
            value = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
            object.__setattr__(self, name, value if value.dtype == torch.float32 else value.to(torch.float32))
        self._check()

    @classmethod
    def unchecked(cls, fmt: FPFormat, scale: Tensor, zero_point: Tensor) -> "QParams":
        """The same record without looking at values, for tensors that were checked when they were made or loaded."""
        qparams = object.__new__(cls)
        for name, value in (("format", fmt), ("scale", scale), ("zero_point", zero_point)):
            object.__setattr__(qparams, name, value)
        return qparams

    def _check(self) -> None:
        scale, zero_point = self.scale.detach(), self.zero_point.detach()
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            bad = scale.flatten()[~(torch.isfinite(scale) & (scale > 0)).flatten()][0].item()
            raise NonFiniteError(f"A scale must be finite and > 0 in float32, but got {bad} for `{self.format}`.")
        if not torch.isfinite(zero_point).all():
            raise NonFiniteError(f"A zero point must be finite in float32, but got NaN or infinity ({self.format}).")
        if self.format.signed and (zero_point != 0).any():
            raise FormatError(f"A signed format has no zero point, but got {zero_point.min().item()} ({self.format}).")
        if (zero_point > 0).any():
            raise FormatError(f"A zero point must be ≤ 0 so that 0 has a code, but got {zero_point.max().item()}.")
        try:
            torch.broadcast_shapes(scale.shape, zero_point.shape)
        except RuntimeError as error:
            shapes = f"{tuple(scale.shape)} and {tuple(zero_point.shape)}"
            raise ShapeError(f"`scale` and `zero_point` must broadcast, but got {shapes}.") from error

    @property
    def unit(self) -> Tensor:
        """`Tensor`, float32, shape of `scale`: real size of one lattice step; never subnormal."""
        return (self.scale * self.format.step).clamp_min(TINY)

    @property
    def maxval(self) -> Tensor:
        """`Tensor`, float32, shape of `scale`: largest representable magnitude, before the zero point is added."""
        return self.scale * self.format.max
