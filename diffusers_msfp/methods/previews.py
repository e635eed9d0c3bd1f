"""What pipelines show: the pictures in their outputs, and those of a model that is being trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import UnsupportedError
from ..sampling.calls import quiet

PREVIEWS = 8


def pictures_tensor(output: Any) -> Tensor:
    """The pictures, or videos, that a pipeline puts out for `pt`, or for `np` where it knows no other.

    Args:
        output (`BaseOutput` or `tuple`): `images`, `frames`, or else the first field.

    Returns:
        `Tensor`, `(N, channels, H, W)` or `(N, frames, channels, H, W)`, float32.

    Raises:
        UnsupportedError: sound, or something else that is no picture.
    """
    named = (getattr(output, name, None) for name in ("images", "frames"))
    images = next((images for images in named if images is not None), None)
    images = output[0] if images is None else images
    if hasattr(output, "audios") or (hasattr(images, "ndim") and images.ndim not in (4, 5)):
        raise UnsupportedError(
            f"Pictures and videos can be compared, but the pipeline's {type(output).__name__} holds something else, "
            f"such as sound. Compare its denoiser's outputs by your own calls."
        )
    if isinstance(images, Tensor):
        return images.float().cpu()
    return torch.from_numpy(np.asarray(images, dtype=np.float32)).movedim(-1, -3)


@torch.no_grad()
def preview(pipe: DiffusionPipeline, make_arguments: Callable, size: int, seed: int) -> np.ndarray:
    """Pictures for equal noise, of videos the first frames, `(PREVIEWS, H, W, C)` in [0, 1].

    Args:
        pipe (`DiffusionPipeline`): not changed.
        make_arguments (`Callable`): see `call_arguments`.
        size (`int`): samples of a call: as many as in training, since arguments may have a row for each.
        seed (`int`): sample i is drawn with seed + i.

    Raises:
        UnsupportedError: see `pictures_tensor`.
    """
    made = []
    with quiet(pipe):
        for start in range(0, PREVIEWS, size):
            noise = [torch.Generator().manual_seed(seed + start + i) for i in range(size)]
            made.append(pictures_tensor(make_arguments(start, size, noise).run(pipe)))
    pictures = torch.cat(made)[:PREVIEWS]
    return (pictures[:, 0] if pictures.ndim == 5 else pictures).movedim(-3, -1).numpy()
