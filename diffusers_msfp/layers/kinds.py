"""The quantized layers. Adding a kind: one final class here, one entry in `QUANT_LAYERS`."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.torch import ConvNd, convolve
from .quant_layer import QuantLayer


class QuantLinear(QuantLayer, nn.Linear):
    """Quantized `nn.Linear`; input `(*, in_features)`, output `(*, out_features)`."""

    float_class = nn.Linear

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """`(out_features, in_features)`."""
        return self.out_features, self.in_features

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`."""
        return F.linear(x, weight, bias)


class _QuantConvNd(QuantLayer, ConvNd):
    """Convolutions: the input is quantized before it is padded, and real 0 has a code, so padding is exact."""

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """`(out_channels, in_channels / groups, *kernel_size)`."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The original's convolution with its stride, dilation, groups and padding mode."""
        return convolve(self, x, weight, bias)


class QuantConv2d(_QuantConvNd, nn.Conv2d):
    """Quantized `nn.Conv2d`; input `(B, in_channels, H, W)`."""

    float_class = nn.Conv2d


class QuantConv1d(_QuantConvNd, nn.Conv1d):
    """Quantized `nn.Conv1d`; input `(B, in_channels, L)`."""

    float_class = nn.Conv1d


QUANT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    cls.float_class: cls for cls in (QuantLinear, QuantConv2d, QuantConv1d)
}
"""Float class → quantized class. Subclasses of the float classes have a forward of their own and are not converted."""
