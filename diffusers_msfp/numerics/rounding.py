"""Rounding to the lattice, and codes: the definition that every engine reproduces bit for bit.

In float32: `y = x * (1/unit) + k`, clamped to the lattice's range; `step = 2^max(0, floor(log2|y|) - M)`;
`q = round_half_even(y / step) * step`. The result is a lattice integer; -0 becomes 0.
"""

import torch
from torch import Tensor

from ..compat.torch import assert_later
from ..errors import FormatError, NonFiniteError, ShapeError
from ..formats import FPFormat
from .qparams import QParams


def round_to_lattice(y: Tensor, fmt: FPFormat) -> Tensor:
    """Nearest lattice integer of values that already lie in the lattice's range; ties to the even multiple.

    Args:
        y (`Tensor`, any shape, float32): values in lattice steps, within the format's range.

    Returns:
        `Tensor`, float32, shape of `y`: whole numbers of `fmt.lattice`.
    """
    step, inverse = local_step(y, fmt)
    return torch.round(y * inverse) * step + 0.0  # + 0.0 turns -0 into 0


def round_in_place(y: Tensor, mantissa_bits: int) -> Tensor:
    """`round_to_lattice` of a float32 tensor, in place: adds and takes off `1.5 * 2**23` local steps."""
    bits = y.view(torch.int32).bitwise_and(0x7F800000).clamp_min_((127 + mantissa_bits) << 23)
    magic = bits.add_((23 - mantissa_bits) << 23).bitwise_or_(0x400000).view(torch.float32)
    return y.add_(magic).sub_(magic)


def local_step(y: Tensor, fmt: FPFormat) -> tuple[Tensor, Tensor]:
    """Distance of the grid's neighbours around each value, in lattice steps, and its reciprocal.

    Args:
        y (`Tensor`, any shape, float32): values in lattice steps, within the format's range.

    Returns:
        `tuple[Tensor, Tensor]`, float32, shape of `y`: `2^max(0, floor(log2|y|) - M)` and its inverse.
    """
    # The exponent field of a float32 is floor(log2|y|) + 127; powers of two are built from the field directly.
    exponent = ((y.view(torch.int32) >> 23) & 0xFF) - (127 + fmt.mantissa_bits)
    exponent = exponent.clamp_min(0)
    return ((exponent + 127) << 23).view(torch.float32), ((127 - exponent) << 23).view(torch.float32)


def lattice_range(fmt: FPFormat) -> tuple[float, float]:
    """Smallest and largest lattice integer."""
    return float(fmt.lattice[0]), float(fmt.lattice_max)


def zero_point_steps(qparams: QParams) -> Tensor:
    """The zero point as a lattice integer: `k` with `zero_point = -k * unit`; float32, shape of `zero_point`."""
    fmt = qparams.format
    if fmt.signed:
        return torch.zeros_like(qparams.zero_point)
    k = (-qparams.zero_point.detach() * (1 / qparams.unit.detach())).clamp(*lattice_range(fmt))
    return round_to_lattice(k, fmt)


def check_finite(x: Tensor, where: str) -> None:
    """Refuse NaN and infinity, naming where they were found; one pass over `x`."""
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x.detach())
    if not (torch.isfinite(low) and torch.isfinite(high)):
        kind = "NaN" if torch.isnan(low) else "infinity"
        raise NonFiniteError(
            f"{where} must be finite, but got {kind} (shape {tuple(x.shape)}, {x.dtype}). Look for an overflow before "
            f"this place; float16 overflows at 65504, bfloat16 and float32 do not."
        )


def require_finite(x: Tensor, where: str) -> Tensor:
    """`check_finite` within a model: its input, with infinity as NaN where nobody looks.

    A compiled model makes an assertion with a shorter message. To look at values that lie on another device the CPU
    would have to wait for it in every layer, so infinity, which rounding would take for a large number, becomes NaN
    there and reaches the output.
    """
    if torch.compiler.is_compiling():
        assert_later(torch.isfinite(x).all(), f"{where} must be finite.")
    elif x.device.type == "cpu":
        check_finite(x, where)
    else:
        return x + (x - x)
    return x


def quantize_to_lattice(x: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """Lattice integers `q` of `x` and the zero point `k`, both float32; `x ≈ (q - k) * unit`."""
    check_broadcast(x, qparams)
    k = zero_point_steps(qparams)
    y = x.to(torch.float32) * (1 / qparams.unit) + k
    return round_to_lattice(y.clamp(*lattice_range(qparams.format)), qparams.format), k


def encode(x: Tensor, qparams: QParams) -> Tensor:
    """Codes of the nearest representable values; values outside the range are saturated.

    Args:
        x (`Tensor`, any shape, float32/bfloat16/float16): finite values.
        qparams (`QParams`): broadcastable to `x`.

    Returns:
        `Tensor`, uint8, shape of `x`: sign, exponent and mantissa bits from the top; -0 is written as code 0.

    Raises:
        NonFiniteError: `x` holds NaN or infinity.
        ShapeError: `qparams` does not broadcast to `x`.

    Example:
        >>> encode(torch.tensor([0.3, -9.0]), QParams("fp4_e2m1", scale=1.0)).tolist()
        [1, 15]
    """
    fmt = qparams.format
    check_finite(x, "Values to encode")
    q, _ = quantize_to_lattice(x, qparams)
    magnitude = q.abs()
    # index = exponent field * 2^M + mantissa: subtract from the float's own exponent, keep its top M mantissa bits.
    bits = magnitude.view(torch.int32)
    m = fmt.mantissa_bits
    normal = (bits >> (23 - m)) - ((127 + m - 1) << m)
    code = torch.where(magnitude < 2**m, magnitude.to(torch.int32), normal)
    if fmt.signed:
        code = code + ((q < 0).to(torch.int32) << (fmt.bits - 1))
    return code.to(torch.uint8)


def decode(codes: Tensor, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Real values of codes: `(q - k) * unit` in float32, cast to `dtype`.

    Args:
        codes (`Tensor`, any shape, uint8): each below `2**bits`.
        qparams (`QParams`): broadcastable to `codes`.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor`, shape of `codes`.

    Raises:
        FormatError: numbers of another type.
        ShapeError: `qparams` does not broadcast to `codes`.

    Example:
        >>> import torch
        >>> from diffusers_msfp import FORMATS, encode
        >>> qparams = QParams(FORMATS["fp4_e2m1"], torch.tensor(1.0))
        >>> decode(encode(torch.tensor([0.6, -5.0]), qparams), qparams).tolist()
        [0.5, -4.0]
    """
    if codes.dtype != torch.uint8:
        raise FormatError(f"Codes must be torch.uint8, as `encode` gives them, but got {codes.dtype}.")
    check_broadcast(codes, qparams)
    q = code_table(qparams.format, codes.device)[codes.to(torch.int32)]
    return ((q - zero_point_steps(qparams)) * qparams.unit).to(dtype)


def code_table(fmt: FPFormat, device: torch.device) -> Tensor:
    """The lattice integer of each code, `(2**bits,)` float32; made where it is used, nothing is sent there."""
    if device.type == "cpu":
        return torch.tensor(fmt.code_values, dtype=torch.float32, device=device)
    return _code_table_by_fields(fmt, device)


def _code_table_by_fields(fmt: FPFormat, device: torch.device) -> Tensor:
    m, codes = fmt.mantissa_bits, torch.arange(2**fmt.bits, dtype=torch.int32, device=device)
    exponent = (codes >> m) & (2**fmt.exponent_bits - 1)
    mantissa = (codes & (2**m - 1)) + (exponent.clamp(max=1) << m)  # with the leading 1 of normal numbers
    power = ((exponent.clamp_min(1) + 126) << 23).view(torch.float32)
    sign = 1 - 2 * (codes >> (fmt.bits - 1)) if fmt.signed else torch.ones_like(codes)
    return mantissa * power * sign + 0.0


def check_broadcast(x: Tensor, qparams: QParams) -> None:
    """Refuse a scale that would change the shape of `x`."""
    if qparams.scale.ndim == 0 and qparams.zero_point.ndim == 0:
        return
    try:
        shape = torch.broadcast_shapes(x.shape, qparams.scale.shape, qparams.zero_point.shape)
    except RuntimeError:
        shape = None
    if shape != x.shape:
        raise ShapeError(
            f"`scale` must broadcast to the tensor, but got scale {tuple(qparams.scale.shape)} with a tensor of shape "
            f"{tuple(x.shape)}. Per output channel of a convolution it is (C, 1, 1, 1)."
        )
