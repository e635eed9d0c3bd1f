"""Make quantized models float again."""

from diffusers import DiffusionPipeline
from torch import nn

from ..compat.wrappers import sees_through
from ..errors import StateError
from ..methods.method import parts
from ..sampling.observation import quantized_models


@sees_through
def dequantize(model: nn.Module | DiffusionPipeline) -> None:
    """Make all quantized layers float again, in place, with the weights that they compute with.

    Args:
        model (`nn.Module` or `DiffusionPipeline`): with quantized layers; of a pipeline all components that have some.

    Raises:
        StateError: it has none.
        UnsupportedError: a model has no single float weight for each layer; none is changed then.

    Example:
        ```py
        dequantize(pipe)  # as pipe.unet.dequantize() and its like
        ```
    """
    models = list(quantized_models(model))
    if not models:
        raise StateError(f"A quantized model is needed to make it float, but {type(model).__name__} has none.")
    for each in models:
        for part in parts():
            if part.require_float is not None:
                part.require_float(each)
    for each in models:
        each.dequantize()
