"""Real pictures to compare with: an `.npz` archive or a folder."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...calibration.pictures import fitted, opened, picture_files
from ...errors import ConfigError, ShapeError

KEYS = ("x_test", "images")
_MAX_BORDER = 8  # a side may lack one part in so many


def load_real(source: str | Path, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """Real pictures in the shape of a pipeline's.

    Arrays get a black border where they lack at most an eighth of a side, as Fashion-MNIST's 28 pixels at 32; the
    pictures of a folder, which must not be smaller, are turned upright, cropped in their middle and scaled down
    (Lanczos).

    Args:
        source (`str` or `Path`): an `.npz` with `x_test` or `images`, `(N, H, W)` or `(N, H, W, channels)`, 8-bit or
            float in [0, 1]; or a folder of pictures.
        shape (`tuple`): `(channels, height, width)`.

    Returns:
        pictures `(N, *shape)`, float32 in [0, 1], and what was done to them.

    Raises:
        ConfigError: there are none, or they cannot be read.
        ShapeError: they do not fit.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, shape)
    if path.suffix != ".npz" or not path.is_file():
        raise ConfigError(f"`--data` must be an .npz file or a folder of pictures, but {source} is neither.")
    try:
        with np.load(path) as archive:
            names = list(archive)
            key = next((key for key in KEYS if key in names), None)
            array = archive[key] if key else None
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a NumPy archive, but it cannot be read ({error}).") from error
    if array is None:
        raise ConfigError(f"{path} must hold an array `x_test` or `images`, but has {', '.join(names)}.")
    in_range = array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1
    if array.dtype != np.uint8 and not in_range:
        raise ConfigError(f"`{key}` in {path} must be uint8, or float in [0, 1], but it is {array.dtype} or beyond.")
    array = array[..., None] if array.ndim == 3 else array
    if array.ndim != 4 or not len(array):
        raise ShapeError(f"`{key}` in {path} must have 3 or 4 axes and pictures in it, but its shape is {array.shape}.")
    pictures = torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)
    pictures = pictures.float() / 255 if array.dtype == np.uint8 else pictures.float()
    channels, *sizes = shape
    found = tuple(pictures.shape[1:])
    lacks = [wanted - size for wanted, size in zip(sizes, found[1:], strict=True)]
    if found[0] != channels or any(not 0 <= n <= size // _MAX_BORDER for n, size in zip(lacks, sizes, strict=True)):
        raise ShapeError(
            f"The pictures in {path} must have the shape {shape} of the pipeline's, or lack a narrow border, but got "
            f"{found}. Convert them first, or give a folder of pictures, which are scaled down."
        )
    height, width = lacks
    border = (width // 2, width - width // 2, height // 2, height - height // 2)
    done = f"black border, {found[1]}×{found[2]} to {sizes[0]}×{sizes[1]}" if any(lacks) else "as they are"
    return F.pad(pictures, border), done


def _from_folder(folder: Path, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    _, height, width = shape
    pictures, adapted = [], 0
    files = picture_files(folder, "--data")
    for file in files:
        picture = opened(file)
        if picture.width < width or picture.height < height:
            raise ShapeError(
                f"Pictures must be at least {height}×{width}, as the pipeline's, but {file} is "
                f"{picture.height}×{picture.width}. Take it out, or give larger ones."
            )
        adapted += picture.size != (width, height)
        pictures.append(fitted(picture, shape))
    done = f"{adapted} of {len(files)} cropped and scaled to {height}×{width}" if adapted else "as they are"
    return torch.stack(pictures).float() / 255, done
