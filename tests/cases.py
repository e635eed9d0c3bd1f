"""Layers of every kind, quantized and calibrated, for engines to be compared on."""

import torch
from torch import nn
from torch.nn import functional as F

from diffusers_msfp.layers import QUANT_LAYERS
from diffusers_msfp.schemes import SCHEMES

LAYERS = {
    "conv": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
    "odd": (nn.Conv2d(15, 7, 3, stride=2, bias=False), (1, 15, 9, 8)),
    "dilated-groups": (nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4), (3, 16, 9, 9)),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 5)),
    "reflect": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (2, 8, 5, 5)),
    "circular": (nn.Conv2d(8, 8, (2, 3), padding="same", padding_mode="circular"), (2, 8, 5, 5)),
    "replicate-1d": (nn.Conv1d(8, 12, 5, padding=2, padding_mode="replicate"), (2, 8, 15)),
    "same": (nn.Conv2d(8, 8, (5, 3), padding="same"), (2, 8, 5, 5)),
    "conv1d": (nn.Conv1d(8, 12, 3, padding=1, stride=2), (2, 8, 15)),
    "pointwise": (nn.Conv2d(3, 5, 1), (1, 3, 4, 4)),
    "unbatched": (nn.Conv2d(3, 5, 3), (3, 4, 4)),
    "linear": (nn.Linear(33, 17), (4, 5, 33)),
    "row": (nn.Linear(64, 64, bias=False), (64,)),
    "no-linear": (nn.Linear(8, 4), (0, 8)),
    "no-conv": (nn.Conv2d(4, 4, 3, stride=2), (0, 4, 8, 8)),
}


def quantized(module: nn.Module, scheme: str, shape: tuple[int, ...], signed: bool):
    """A frozen layer and an input for it."""

    def values():
        x = torch.randn(shape) * 2
        return x if signed else F.silu(x)

    layer = QUANT_LAYERS[type(module)].from_float(module, "place", SCHEMES[scheme].inner)
    if layer.observing:
        with torch.no_grad():
            layer(values() if min(shape) else torch.randn(max(1, shape[0]), *shape[1:]))
        layer.freeze()
    return layer, values()


def assert_close(y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert (y.double() - expected.double()).norm() <= tolerance * expected.double().norm()
