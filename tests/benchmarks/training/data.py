"""Training pictures, decoded once, and batches that are functions of seed and number alone."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The data set's labels, in its order."""


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes.

    Args:
        images (`Tensor`, `(N, channels, 32, 32)` uint8).
        labels (`Tensor`, `(N,)` int64).
    """

    images: Tensor
    labels: Tensor


def load_cifar10(file: Path, train: bool = True) -> Pictures:
    """JPEG CIFAR-10: `data` (all files in a row), `offsets`, `label`, `is_train` in one `.npz`."""
    with np.load(file) as arrays:
        data, offsets, labels = arrays["data"], arrays["offsets"], arrays["label"]
        chosen = np.flatnonzero(arrays["is_train"].astype(bool) == train)
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")) for i in chosen]
    )
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[chosen]).long())


def load_fashion_mnist(file: Path, train: bool = True) -> Pictures:
    """Fashion-MNIST, padded with two black pixels on each side."""
    part = "train" if train else "test"
    with np.load(file) as arrays:
        images, labels = torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"])
    return Pictures(torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None], labels.long())


def batch_generator(seed: int, update: int) -> torch.Generator:
    """The only source of randomness of an update, so that a resumed run is the same run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + update)


def draw_pictures(pictures: Pictures, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1], half of them mirrored, and their labels."""
    index = torch.randint(len(pictures.images), (size,), generator=generator)
    images = pictures.images[index].float() / 127.5 - 1
    mirrored = torch.rand(size, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images), pictures.labels[index]
