"""See what layers are called with while a model runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def watching_calls(layers: Mapping[str, nn.Module], look: Callable[[str, tuple], None]) -> Iterator[None]:
    """Within the block, tell of each call before it happens.

    Args:
        layers (`Mapping[str, nn.Module]`): float or quantized.
        look (`Callable[[str, tuple], None]`): takes a layer's name and its arguments in order, however they were given;
            may raise, which ends the model's call.
    """

    def tell(name: str) -> Callable:
        def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> None:
            look(name, (*args, *kwargs.values()))

        return hook

    handles = [layer.register_forward_pre_hook(tell(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
