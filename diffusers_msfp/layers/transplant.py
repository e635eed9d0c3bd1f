"""Another class for a layer's sizes and bias."""

from typing import TypeVar

from torch import nn

from ..compat.modules import BOUND, exchanged_methods
from ..compat.torch import bias_of, put_bias
from .logical import PackedLayer

Module = TypeVar("Module", bound=nn.Module)


def transplant(source: nn.Module, cls: type[Module]) -> Module:
    """An empty module of another class with the plain attributes (sizes, strides, …) and the bias of `source`.

    What is bound to `source`, such as another `forward`, would run it in place of the new one and is left out.
    """
    module = object.__new__(cls)
    nn.Module.__init__(module)
    own = set(module.__dict__).union(BOUND, exchanged_methods(source))
    own = own.union(*(_annotated(kind) for kind in (*type(source).__mro__, *cls.__mro__)))
    module.__dict__.update({key: value for key, value in vars(source).items() if key not in own})
    module.train(source.training)
    module.register_parameter("bias", bias_of(source))
    return module


def float_layer(source: PackedLayer, cls: type[Module]) -> Module:
    """A float layer of a class with the weight that a packed one stands for, sharing nothing with it."""
    module = transplant(source, cls)
    module.weight = nn.Parameter(source.decode_whole().to(source.weight.dtype))
    bias = bias_of(source)
    put_bias(module, None if bias is None else nn.Parameter(bias.detach().clone()))
    return module


def _annotated(kind: type) -> set[str]:
    """What a quantized layer keeps about its quantization."""
    return set(vars(kind).get("__annotations__", ())) if issubclass(kind, PackedLayer) else set()
