"""Networks whose features measure distances between sets of pictures, by name.

`inception` is the standard one of FID, through torch-fidelity, where its weights lie on this machine. Two small
classifiers come with the package, and their distances are never called FID: `fashion` of Fashion-MNIST (test accuracy
0.90) and `cifar10-resnet56` of CIFAR-10 (0.83 on JPEG CIFAR-10); both distances grow with added noise (`model_cards/
results/fashion-features.json`, `cifar10-features.json`). Own networks come as `module:function`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...assets import CIFAR10_FEATURES, FASHION_FEATURES
from ...errors import ConfigError, MSFPError, ShapeError, UnsupportedError
from ...registry import Registry

FASHION_SHAPE = (1, 32, 32)
CIFAR10_SHAPE = (3, 32, 32)
_BATCH = 100
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION_FILE}"


@dataclass(frozen=True)
class Features:
    """What a network says of N pictures; all float.

    Args:
        pooled (`Tensor`, `(N, d)`): without positions, for Fréchet distance, precision and recall.
        spatial (`Tensor`, `(N, s)`, *optional*): a few channels with their positions, for the spatial Fréchet distance.
        logits (`Tensor`, `(N, classes)`, *optional*): for the classifier score.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


FeatureNetwork = Callable[[Tensor], Features]
"""Pictures `(N, channels, H, W)` in [0, 1], float32 → their features; an attribute `classes` may name the logits."""


def _require_shape(images: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(images.shape[1:]) != shape:
        raise ShapeError(
            f"The features `{name}` need pictures of shape {shape}, but got {tuple(images.shape[1:])}. Choose others: "
            f"`--features inception` or `--features module:function`."
        )


class FashionFeatures(nn.Module):
    """Images `(N, 1, 32, 32)` in [0, 1] → 64 pooled features, 128 spatial ones (8 channels of the last map), 10 logits.

    Raises:
        ShapeError: images of another shape.
    """

    width, spatial_channels = 64, 8

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 32, self.width, self.width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.head = nn.Linear(self.width, 10)

    @classmethod
    def trained(cls) -> "FashionFeatures":
        """With the weights of the package."""
        network = cls()
        network.load_state_dict(load_file(FASHION_FEATURES))
        return network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """Features and logits."""
        _require_shape(images, "fashion", FASHION_SHAPE)
        maps = images * 2 - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps = F.max_pool2d(F.relu(norm(conv(maps))), 2)
        pooled = maps.mean((2, 3))
        return Features(pooled, maps[:, : self.spatial_channels].flatten(1), self.head(pooled))


class _ResidualBlock(nn.Module):
    """Two convolutions; the shortcut of a smaller map takes every other pixel and pads channels (option A)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.added = stride, (out_channels - channels) // 2

    def forward(self, maps: Tensor) -> Tensor:
        """Maps → maps."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        shortcut = maps[:, :, :: self.stride, :: self.stride]
        return F.relu(inner + F.pad(shortcut, (0, 0, 0, 0, self.added, self.added)))


class Cifar10Features(nn.Module):
    """Images `(N, 3, 32, 32)` in [0, 1] → 64 pooled features, 128 spatial ones (8 channels at 4 × 4), 10 logits.

    Source:
        arXiv 1512.03385, section 4.2, n = 9; weights: `assets/cifar10-resnet56.md`.

    Raises:
        ShapeError: images of another shape.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    spatial_channels, positions = 8, 4
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        sizes = (16, 16, 32, 64)
        for level, (channels, out) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
            first = _ResidualBlock(channels, out, 1 if level == 1 else 2)
            self.add_module(f"layer{level}", nn.Sequential(first, *(_ResidualBlock(out, out, 1) for _ in range(8))))
        self.linear = nn.Linear(64, len(self.classes))

    @classmethod
    def trained(cls) -> "Cifar10Features":
        """With the weights of the package."""
        network = cls()
        network.load_state_dict(load_file(CIFAR10_FEATURES))
        return network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """Features and logits."""
        _require_shape(images, "cifar10-resnet56", CIFAR10_SHAPE)
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.deviation))
        maps = F.relu(self.bn1(self.conv1((images - mean) / deviation)))
        for level in (1, 2, 3):
            maps = self.get_submodule(f"layer{level}")(maps)
        pooled = maps.mean((2, 3))
        spatial = F.adaptive_avg_pool2d(maps[:, : self.spatial_channels], self.positions)
        return Features(pooled, spatial.flatten(1), self.linear(pooled))


class InceptionFeatures:
    """InceptionV3 of FID (torch-fidelity): 2048 pooled features, 7 channels of `mixed_6` (arXiv 2103.03841), logits.

    Raises:
        UnsupportedError: torch-fidelity or the weights are not on this machine; nothing is downloaded.
    """

    def __init__(self) -> None:
        weights = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            FeatureExtractorInceptionV3 = None
        if FeatureExtractorInceptionV3 is None or not weights.is_file():
            raise UnsupportedError(
                f"The features `inception` need the package torch-fidelity and its weights in the folder `checkpoints` "
                f"of `torch.hub.get_dir()`, but they are not there: `pip install torch-fidelity`, and download "
                f"{_INCEPTION_URL}. Or choose other features: `--features module:function`."
            )
        names = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", names, str(weights)).eval()
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: object, output: Tensor) -> None:
        self._maps = output[:, :7].flatten(1)

    def __call__(self, images: Tensor) -> Features:
        """Grey pictures become three equal channels, values 8-bit."""
        pixels = (images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
        pooled, logits = self.network(pixels)
        return Features(pooled.flatten(1), self._maps, logits)


FEATURES: Registry[Callable[[], FeatureNetwork]] = Registry("feature network")
FEATURES.add("inception", InceptionFeatures)
FEATURES.add("fashion", FashionFeatures.trained)
FEATURES.add("cifar10-resnet56", Cifar10Features.trained)
_BY_SHAPE: dict[tuple[int, ...], str] = {FASHION_SHAPE: "fashion", CIFAR10_SHAPE: "cifar10-resnet56"}


def default_features(shape: tuple[int, ...]) -> str:
    """`fashion` for pictures of shape `(1, 32, 32)`, `cifar10-resnet56` for `(3, 32, 32)`, else `inception`."""
    return _BY_SHAPE.get(tuple(shape), "inception")


CONTRACT = (
    "a function without arguments that returns a network: a callable that takes pictures `(N, channels, H, W)`, "
    "float32 in [0, 1], and returns their features, a tensor `(N, d)` or `Features`"
)
"""What `module:function` must name."""


def feature_network(name: str) -> FeatureNetwork:
    """A network of `FEATURES`, or what an own function without arguments makes.

    Args:
        name (`str`): of the registry, or `module:function`, where the module may lie in the working directory; the
            network may also return pooled features alone.

    Raises:
        ConfigError: there is no such name, module or function, or it does not make a network.
        UnsupportedError: its weights are missing.

    Example:
        ```py
        # my_features.py in the working directory, for `--features my_features:network`
        def network():  # called once, e.g. to load weights
            return lambda images: images.mean((2, 3))  # (N, channels, H, W) in [0, 1] -> features (N, d)
        ```
    """
    module, colon, function = name.partition(":")
    if not colon:
        return FEATURES[name]()
    try:
        with _working_directory():
            factory = getattr(importlib.import_module(module), function)
    except Exception as error:  # noqa: BLE001 – other people's module may fail in any way
        raise ConfigError(
            f"Own features must be a `module:function` that can be imported, from an installed package or the working "
            f"directory {Path.cwd()}, but {name!r} cannot: "
            f"{type(error).__name__}: {error}."
        ) from error
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`{name}` must be {CONTRACT}; but it cannot be called without any: {error}.") from error
    try:
        with _working_directory():
            network = factory()
    except MSFPError:
        raise
    except Exception as error:  # noqa: BLE001 – other people's code may fail in any way
        raise ConfigError(f"`{name}` must be {CONTRACT}; but it fails: {type(error).__name__}: {error}.") from error
    if not callable(network):
        raise ConfigError(f"`{name}` must be {CONTRACT}; but it returned {type(network).__name__}.")
    return network


@contextmanager
def _working_directory() -> Iterator[None]:
    """Modules of the working directory can be imported, which the installed program does not see by itself."""
    folder = str(Path.cwd())
    added = not {folder, ""} & set(sys.path)
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)


def extract(network: FeatureNetwork, images: Tensor) -> Features:
    """Features of many pictures, some at a time.

    Raises:
        ShapeError: the network does not give one row for each picture.
    """
    found = []
    with torch.no_grad():
        for part in images.split(_BATCH):
            result = network(part.float())
            result = result if isinstance(result, Features) else Features(result)
            if not isinstance(result.pooled, Tensor):
                raise ShapeError(
                    f"A feature network must give a tensor of features, but got {type(result.pooled).__name__}."
                )
            if result.pooled.ndim != 2 or len(result.pooled) != len(part):
                raise ShapeError(
                    f"A feature network must give a row of features for each of {len(part)} pictures, but got "
                    f"{tuple(result.pooled.shape)}."
                )
            found.append(result)

    def joined(name: str) -> Any:
        parts = [getattr(result, name) for result in found]
        return None if parts[0] is None else torch.cat(parts).double()

    return Features(*map(joined, ("pooled", "spatial", "logits")))
