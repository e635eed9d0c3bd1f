"""Pictures for a page that loads nothing: PNG in data URIs."""

import base64
import io
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

SHOWN = 6
MAX_SIDE = 256
GAINS = (16, 8, 4, 2)
REFERENCE, QUANTIZED = "full precision", "quantized"


def picture_rows(images: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """The first pictures of each kind, and where there are two kinds their difference, grey where they agree.

    Args:
        images (`Mapping[str, Tensor]`): kind → `(N, channels, H, W)`, float in [0, 1].

    Returns:
        `list[dict[str, str]]`: for each sample kind → data URI.
    """
    kinds = {kind: pictures[:SHOWN].clamp(0, 1) for kind, pictures in images.items()}
    if len(kinds) == 2:
        before, after = kinds.values()
        difference = after - before
        gain = next((gain for gain in GAINS if gain * difference.abs().max() <= 1), 1)
        kinds[f"difference × {gain}" if gain > 1 else "difference"] = 0.5 + gain * difference / 2
    return [dict(zip(kinds, map(data_uri, sample), strict=True)) for sample in zip(*kinds.values(), strict=True)]


def data_uri(picture: Tensor) -> str:
    """`(1 or 3, H, W)` in [0, 1] as a PNG of at most 256 pixels a side."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
