"""Figures of sets of pictures, pair by pair; those that need more pictures than there are, are named instead."""

from collections.abc import Callable, Collection
from typing import cast

import torch
from torch import Tensor

from ...errors import SEE_DOCTOR, NonFiniteError, UnsupportedError
from ..compare import psnr_db
from .distances import MIN_NEIGHBOURHOOD, Estimate, classifier_score, frechet_estimate, mean_of, within_manifold
from .features import Features

PAIRS = (("candidate", "reference"), ("candidate", "real"), ("reference", "real"))
OF_FEATURES = ("frechet_distance", "spatial_frechet_distance", "precision", "recall")
_SSIM_WINDOW = 11
_PART = 100  # pictures in float32 at once, at most
_NUMBERS = 2**25  # in these


def by_parts(function: Callable[..., Tensor], *sets: Tensor) -> Tensor:
    """One value for each picture, or pair of pictures, of float16 sets."""
    size = max(1, min(_PART, _NUMBERS // max(1, sets[0][:1].numel())))
    parts = zip(*(images.split(size) for images in sets), strict=True)
    return torch.cat([function(*(part.float() for part in together)) for together in parts])


def require_finite_pictures(images: Tensor, name: str) -> Tensor:
    """The pictures, or an error that says how many hold NaN."""
    bad = int((~by_parts(lambda part: part.flatten(1).isfinite().all(1), images)).sum())
    if bad:
        raise NonFiniteError(
            f"Pictures must be finite, but {bad} of {len(images)} that the {name} made hold NaN or infinity. Sample "
            f"it in a wider dtype."
        )
    return images


def require_ssim() -> Callable[..., Tensor]:
    """SSIM of torchmetrics.

    Raises:
        UnsupportedError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise UnsupportedError(
            'An evaluation needs torchmetrics, which is not installed: `pip install "diffusers-msfp[eval]"`. '
            f"{SEE_DOCTOR}"
        ) from error
    return cast("Callable[..., Tensor]", structural_similarity_index_measure)


def compare_pictures(reference: Tensor, candidate: Tensor, seed: int) -> tuple[dict[str, Estimate], dict[str, str]]:
    """PSNR and SSIM of pictures of equal noise, `(N, channels, H, W)` in [0, 1]; and why one is missing."""
    ssim = require_ssim()
    figures = {"psnr_db": mean_of(by_parts(psnr_db, reference, candidate), seed)}
    shape = tuple(reference.shape[1:])
    if min(shape[1:]) < _SSIM_WINDOW:
        return figures, {"ssim": f"needs sides of {_SSIM_WINDOW} pixels, but got {shape}"}

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return ssim(b, a, data_range=1.0, reduction="none").reshape(-1)

    return figures | {"ssim": mean_of(by_parts(similarity, reference, candidate), seed)}, {}


def compare_sets(found: dict[str, Features], seed: int) -> tuple[dict[str, dict[str, Estimate]], dict[str, str]]:
    """Distances between the features of `reference`, `candidate` and, if it is there, `real`.

    Returns:
        `dict`, `dict`: pair or `classifier_score` → figures; figure → why it is missing.
    """
    figures: dict[str, dict[str, Estimate]] = {}
    omitted: dict[str, str] = {}
    for one, other in PAIRS:
        if other not in found:
            continue
        pair = f"{one}_to_{other}"
        paired = other == "reference"  # equal noise
        figures[pair], missing = _compare_two(found[one], found[other], paired, seed)
        omitted |= {f"{pair}.{name}": reason for name, reason in missing.items()}
    scores = {name: classifier_score(f.logits, seed) for name, f in found.items() if f.logits is not None}
    if scores:
        figures["classifier_score"] = scores
    else:
        omitted["classifier_score"] = "these features have no logits"
    return figures, omitted


def without_features(names: Collection[str], reason: str) -> tuple[dict[str, dict[str, Estimate]], dict[str, str]]:
    """As `compare_sets`, of sets that have no features.

    Args:
        names (`Collection[str]`): of the sets.
        reason (`str`): why there are none.
    """
    pairs = [f"{one}_to_{other}" for one, other in PAIRS if other in names]
    omitted = {f"{pair}.{figure}": reason for pair in pairs for figure in OF_FEATURES}
    return {"candidate_to_reference": {}}, omitted | {"classifier_score": reason}


def _compare_two(a: Features, b: Features, paired: bool, seed: int) -> tuple[dict[str, Estimate], dict[str, str]]:
    figures, omitted = {}, {}
    number = min(len(a.pooled), len(b.pooled))
    for name, left, right in (
        ("frechet_distance", a.pooled, b.pooled),
        ("spatial_frechet_distance", a.spatial, b.spatial),
    ):
        if left is None or right is None:
            omitted[name] = "these features have no spatial part"
        elif number <= left.shape[1]:
            omitted[name] = f"needs more than {left.shape[1]} pictures in each set, but got {number}"
        else:
            figures[name] = frechet_estimate(left, right, paired=paired, seed=seed)
    if number < MIN_NEIGHBOURHOOD:
        reason = f"needs {MIN_NEIGHBOURHOOD} pictures in each set for neighbourhoods, but got {number}"
        return figures, omitted | {"precision": reason, "recall": reason}
    left, right = _some(a.pooled, number, seed), _some(b.pooled, number, seed)
    # a bootstrap of the manifold's own points would repeat some, and shrink their neighbourhoods
    figures["precision"] = mean_of(within_manifold(left, right), seed)
    figures["recall"] = mean_of(within_manifold(right, left), seed)
    return figures, omitted


def _some(points: Tensor, number: int, seed: int) -> Tensor:
    """Equal numbers, since a manifold grows with its points; all in their order where there are no more."""
    if len(points) == number:
        return points
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed), device="cpu")[:number]]
