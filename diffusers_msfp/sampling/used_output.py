"""The part of a denoiser's output that is its prediction, where a variance stands beside it.

Models that learn variances put out twice as many channels. What a sampler or a pipeline makes of the second half is
not what the model is compared or trained by: errors and losses count the first half.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..calibration.watch import watching_calls
from ..compat.torch import tree_leaves
from ..layers.split import whole_name
from .denoisers import model_output, scheduler_of
from .finite_steps import learns_variance

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sample_of(args: tuple, kwargs: Mapping) -> Tensor:
    """What a denoiser is called with: its first tensor of floats."""
    return next(x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor) and x.is_floating_point())


def used_part(pipe: DiffusionPipeline, output: Tensor, args: tuple, kwargs: Mapping) -> Tensor:
    """The prediction in a denoiser's output, `(B, C, …)` of `(B, C, …)` or `(B, 2 C, …)`; a view.

    Args:
        pipe (`DiffusionPipeline`): whose scheduler may say that variances are learned.
        output (`Tensor`): see `model_output`.
        args (`tuple`), kwargs (`Mapping`): of the denoiser's call.
    """
    if output.ndim < 3 or output.shape[1] % 2:
        return output
    half = output.shape[1] // 2
    sample = sample_of(args, kwargs)
    doubled = sample.ndim == output.ndim and sample.shape[1] == half and sample.shape[2:] == output.shape[2:]
    return output[:, :half] if doubled or learns_variance(scheduler_of(pipe)) else output


@dataclass(frozen=True)
class UsedChannels:
    """Which output channels of a model's last layer are its prediction.

    Args:
        layer (`str`): its name.
        axis (`int`): of its output's channels.
        channels (`Tensor`, `(n,)`, int64): that count.
    """

    layer: str
    axis: int
    channels: Tensor

    def of(self, part: str, outputs: list[Tensor]) -> list[Tensor]:
        """What counts of the outputs of a part of the model, which may be the layer or hold it at its end."""
        if self.layer != part and not self.layer.startswith(f"{part}."):
            return outputs
        return [output.index_select(self.axis, self.channels.to(output.device)) for output in outputs]


def counted(used: UsedChannels | None, part: str, outputs: list[Tensor]) -> list[Tensor]:
    """What counts of the outputs of a part of a model, see `UsedChannels.of`; all where `used` is None."""
    return outputs if used is None else used.of(part, outputs)


@torch.no_grad()
def used_channels(pipe: DiffusionPipeline, model: nn.Module, args: tuple, kwargs: dict) -> UsedChannels | None:
    """See `UsedChannels`; None where everything that the model puts out is its prediction.

    The channels are found by experiment: in a second call the last layer puts out the numbers of its channels, and
    those that come to stand in the prediction count.

    Args:
        pipe (`DiffusionPipeline`): that the model denoises in.
        model (`nn.Module`): float or quantized; nothing is changed.
        args (`tuple`), kwargs (`dict`): of one of its calls.
    """
    layers = {name: layer for name, layer in _whole_layers(model) if isinstance(layer, _LAYERS)}
    order: dict[str, None] = {}

    def look(name: str, _args: tuple) -> None:
        order.pop(name, None)
        order[name] = None

    with watching_calls(layers, look):
        output = model_output(model(*args, **kwargs))
    if used_part(pipe, output, args, kwargs) is output:
        return None
    last = next(reversed(order))
    axis = -1 if isinstance(layers[last], nn.Linear) else 1
    number = 0

    def tell(_layer: nn.Module, _args: tuple, made: Tensor) -> Tensor:
        nonlocal number
        number = made.shape[axis]
        shape = [1] * made.ndim
        shape[axis] = number
        labels = torch.arange(number, device=made.device, dtype=torch.float32)
        return labels.view(shape).expand(made.shape)

    handle = layers[last].register_forward_hook(tell)
    try:
        labelled = model_output(model(*args, **kwargs))
    finally:
        handle.remove()
    found = used_part(pipe, labelled, args, kwargs).unique()
    rounded = found.round().long()
    arrived = torch.equal(rounded.to(found.dtype), found) and len(found) * 2 == number
    return UsedChannels(last, axis, rounded) if arrived else None


def _whole_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers by name, parts of a split layer left out."""
    return ((name, layer) for name, layer in model.named_modules() if whole_name(name, layer) == name)
