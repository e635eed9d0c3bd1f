"""A user's pictures, whatever they come as: found, opened, cropped."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def picture_files(folder: str | Path, argument: str = "images") -> list[Path]:
    """The pictures of a folder and of those below it, sorted.

    Args:
        folder (`str` or `Path`): where they are.
        argument (`str`): what the user calls it, for messages.

    Raises:
        ConfigError: it is no folder, or holds none.
    """
    found = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        what = "there are none" if Path(folder).is_dir() else "it is no folder"
        kinds = ", ".join(SUFFIXES)
        raise ConfigError(f"`{argument}` must be a folder with pictures ({kinds}), but {folder}: {what}.")
    return found


def opened(image: Image.Image | np.ndarray | Tensor | str | Path) -> Image.Image:
    """One picture, whatever it came as, upright: as a camera's EXIF data say that it was held.

    Args:
        image: a PIL image, a file's path, an array `(H, W)` or `(H, W, channels)` or a tensor `(channels, H, W)`; these
            are 8-bit, or float in [0, 1]. Pillow's images of 16-bit greys are scaled to 8 bits.

    Raises:
        ConfigError: it is something else, or cannot be read.
    """
    if isinstance(image, Image.Image):
        return _in_bytes(ImageOps.exif_transpose(image), "A picture")
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as file:
                return _in_bytes(ImageOps.exif_transpose(file), str(image))
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(f"{image} must be a picture, but it cannot be read ({error}).") from error
    if isinstance(image, Tensor) and image.ndim == 3:
        last = image.detach().cpu().movedim(0, -1)
        image = (last.float() if last.is_floating_point() else last).numpy()
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise ConfigError(
            f"Each of `images` must be a PIL image, a file, an array (H, W) or (H, W, channels) or a tensor (channels, "
            f"H, W), but got {type(image).__name__}{shape}."
        )
    if image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1:
        image = np.round(255 * image).astype(np.uint8)
    if image.dtype != np.uint8 or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ConfigError(
            f"Arrays among `images` must be 8-bit, or float in [0, 1], with 1, 3 or 4 channels, but got {image.dtype} "
            f"of shape {image.shape}, or values beyond."
        )
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def _in_bytes(image: Image.Image, name: str) -> Image.Image:
    """An image whose channels are 8-bit; Pillow's own conversion would clip wider greys at 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ConfigError(
            f"{name} must be 8-bit, or 16-bit grey, but got Pillow's mode {image.mode!r}, whose white is not known. "
            f"Scale it to 8 bits first."
        )
    return image


def fitted(image: Image.Image, shape: tuple[int, ...]) -> Tensor:
    """A picture scaled (Lanczos) so that it covers a size, and cropped in its middle; `shape`, uint8.

    Args:
        image (`PIL.Image.Image`): of any size and mode.
        shape (`tuple`): channels (1 or 3), height, width.
    """
    channels, height, width = shape
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)
