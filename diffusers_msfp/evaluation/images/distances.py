"""Distances between two sets of pictures from their features, with bootstrap intervals; float64 throughout.

An interval says how much a figure would vary with other pictures of the same number. Fréchet distance and classifier
score are biased at finite numbers (arXiv 1911.07023), and resampling with replacement adds about the same bias once
more. So their percentiles are shifted by the bootstrap's own estimate of it: the interval is one for the figure at this
number of pictures, not for infinitely many. `bias` is that estimate; `value - bias` comes near the limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...results import Result

NEIGHBOURS = 3
MIN_NEIGHBOURHOOD = 50
_ROWS = 1000


@dataclass(frozen=True)
class Estimate(Result):
    """A figure and its 95 % interval.

    Args:
        value (`float`): from the pictures as they are.
        low, high (`float`): 2.5 and 97.5 % of the resamples, less `bias`.
        bias (`float`): mean of the resamples less `value`; 0 for means, which have none.
    """

    value: float
    low: float
    high: float
    bias: float


def resamples_for(width: int) -> int:
    """How often to resample where each time costs the cube of the features' number."""
    return 400 if width <= 512 else 50


def bootstrap(
    statistic: Callable[..., float], sizes: Sequence[int], *, biased: bool, resamples: int = 400, seed: int = 0
) -> Estimate:
    """Percentile interval of a statistic of weighted pictures.

    Args:
        statistic (`Callable[..., float]`): of one tensor for each set: how often each picture counts, `(N,)`, float64.
        sizes (`Sequence[int]`): of the sets, which are resampled independently.
        biased (`bool`): whether the statistic depends on the number of pictures.
        resamples (`int`), seed (`int`): how often, and from which random numbers.

    Source:
        Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 10 (bias) and 13 (percentiles).
    """
    value = statistic(*(torch.ones(size, dtype=torch.float64) for size in sizes))
    generator = torch.Generator().manual_seed(seed)

    def resampled(size: int) -> Tensor:
        drawn = torch.randint(size, (size,), generator=generator, device="cpu")
        return torch.bincount(drawn, minlength=size).double()

    draws = torch.tensor([statistic(*map(resampled, sizes)) for _ in range(resamples)], dtype=torch.float64)
    bias = draws.mean().item() - value if biased else 0.0
    low, high = (torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)) - bias).tolist()
    return Estimate(value, min(low, value), max(high, value), bias)


def mean_of(values: Tensor, seed: int = 0) -> Estimate:
    """Mean of a figure that each picture has, `(N,)`."""
    values = values.double()
    return bootstrap(lambda n: (n @ values / n.sum()).item(), [len(values)], biased=False, seed=seed)


def _moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    number = counts.sum()
    mean = counts @ features / number
    centred = features - mean
    return mean, (centred * counts[:, None]).T @ centred / (number - 1)


def frechet_distance(a: Tensor, b: Tensor, counts_a: Tensor | None = None, counts_b: Tensor | None = None) -> float:
    """Fréchet distance of two normal distributions with the means and covariances of two sets of features.

    Computes `|μ_a - μ_b|² + tr Σ_a + tr Σ_b - 2 tr (Σ_a Σ_b)^½`; the last trace from symmetric eigenvalue problems
    alone, since the product is not symmetric and its eigenvalues lose digits.

    Args:
        a (`Tensor`, `(N, d)`), b (`Tensor`, `(M, d)`): float64; more than d rows each, or a covariance is singular.
        counts_a, counts_b (`Tensor`, *optional*): how often each row counts.

    Source:
        arXiv 1706.08500, equation (6).
    """
    mean_a, cov_a = _moments(a, a.new_ones(len(a)) if counts_a is None else counts_a)
    mean_b, cov_b = _moments(b, b.new_ones(len(b)) if counts_b is None else counts_b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp_min(0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).clamp_min(0).item()


def frechet_estimate(a: Tensor, b: Tensor, *, paired: bool = False, seed: int = 0) -> Estimate:
    """`frechet_distance` with its interval; see the module for what it means.

    Args:
        a (`Tensor`, `(N, d)`), b (`Tensor`, `(M, d)`): float64.
        paired (`bool`): row i of both comes from the same noise, so pairs are resampled.
    """

    def distance(counts_a: Tensor, counts_b: Tensor | None = None) -> float:
        return frechet_distance(a, b, counts_a, counts_a if counts_b is None else counts_b)

    sizes = [len(a)] if paired else [len(a), len(b)]
    found = bootstrap(distance, sizes, biased=True, resamples=resamples_for(a.shape[1]), seed=seed)
    return replace(found, low=max(0.0, found.low))


def classifier_score(logits: Tensor, seed: int = 0) -> Estimate:
    """`exp E KL(p(y|x) ‖ p(y))` of all pictures at once: the inception score, where the classifier is Inception.

    Args:
        logits (`Tensor`, `(N, classes)`): float64.

    Source:
        arXiv 1606.03498, section 4; without its splits.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    own = (p * log_p).sum(1)

    def score(counts: Tensor) -> float:
        mean = counts @ p / counts.sum()
        return (counts @ own / counts.sum() - torch.xlogy(mean, mean).sum()).exp().item()

    return bootstrap(score, [len(logits)], biased=True, seed=seed)


def within_manifold(points: Tensor, manifold: Tensor) -> Tensor:
    """Whether each point lies within the distance of some point of the manifold to its third-nearest neighbour.

    Args:
        points (`Tensor`, `(N, d)`), manifold (`Tensor`, `(M, d)`): float64.

    Returns:
        `Tensor`, `(N,)`, bool. Its mean is precision where `manifold` is real, recall where it is generated.

    Source:
        arXiv 1904.06991, equations (1) and (2), k = 3.
    """
    nearest = [torch.cdist(rows, manifold).topk(NEIGHBOURS + 1, largest=False).values for rows in manifold.split(_ROWS)]
    radii = torch.cat(nearest)[:, -1]  # the nearest is the point itself
    return torch.cat([(torch.cdist(rows, manifold) <= radii).any(1) for rows in points.split(_ROWS)])
