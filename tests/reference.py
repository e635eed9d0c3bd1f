"""The oracle: slow, obvious, float64, and independent of the package's formulas."""

import torch


def grid_of(name: str) -> list[float]:
    """All values of a format at scale 1, from the bit layout, code by code."""
    width, rest = name.split("_")
    bits = int(width[2:])
    signed = not rest.startswith("u")
    e_bits, m_bits = (int(n) for n in rest.lstrip("u")[1:].split("m"))
    bias = 2 ** (e_bits - 1) - 1
    values = []
    for code in range(2**bits):
        sign = -1.0 if signed and code >> (bits - 1) else 1.0
        exponent = (code >> m_bits) & (2**e_bits - 1)
        mantissa = code & (2**m_bits - 1)
        if exponent == 0:
            magnitude = mantissa / 2**m_bits * 2.0 ** (1 - bias)
        else:
            magnitude = (1 + mantissa / 2**m_bits) * 2.0 ** (exponent - bias)
        values.append(sign * magnitude)
    return values


def nearest(x: torch.Tensor, grid: list[float]) -> torch.Tensor:
    """Squared-error-nearest grid value by argmin over all values; ties to the smaller magnitude (not used on ties)."""
    table = torch.tensor(sorted(set(grid), key=abs), dtype=torch.float64)
    return table[(x.double()[..., None] - table).abs().argmin(-1)]


def squared_error(x: torch.Tensor, grid: list[float], scale: float, zero_point: float = 0.0) -> float:
    """Squared error of quantizing `x`, in float64."""
    rounded = nearest((x.double() - zero_point) / scale, grid) * scale + zero_point
    return (rounded - x.double()).square().sum().item()
