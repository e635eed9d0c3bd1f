"""The oracle: slow, obvious, float64, and independent of the package's formulas."""

import torch
from torch import Tensor


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


def ddpm_factor(alphas_cumprod: Tensor) -> Tensor:
    """`(1 - alpha_t) / (sqrt(alpha_t) * sqrt(1 - abar_t))` of ancestral DDPM for epsilon; `(T,)` → `(T,)`."""
    alphas = alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return (1 - alphas) / (alphas.sqrt() * (1 - alphas_cumprod).sqrt())


def ddim_factor(abar: Tensor, abar_previous: Tensor, eta: float = 0.0) -> Tensor:
    """`|sqrt(1 - abar_s - sigma^2) - sqrt(abar_s (1 - abar_t) / abar_t)|` of DDIM for epsilon, step t → s.

    Args:
        abar, abar_previous (`Tensor`, same shape): cumulative products of alpha at t and at s.
        eta (`float`): 0 deterministic, 1 as noisy as DDPM.
    """
    variance = (1 - abar_previous) / (1 - abar) * (1 - abar / abar_previous) * eta**2
    direct = (1 - abar_previous - variance).clamp_min(0).sqrt()
    return (direct - (abar_previous * (1 - abar) / abar).sqrt()).abs()
