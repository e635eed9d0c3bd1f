"""Calls of a denoiser by its pipeline: what it is given, and which part of its output is its prediction.

Models that learn variances put out twice as many channels. What a sampler or a pipeline makes of the second half is
not what the model is compared or trained by: errors and losses count the first half. Nor do they count what a pipeline
throws away: a model that reads a picture to be edited beside the sample puts out something in that picture's place.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..calibration.watch import watching_calls
from ..compat.diffusers import Scheduler
from ..compat.torch import tree_leaves, tree_map
from ..errors import UnsupportedError
from ..layers.split import whole_name
from .denoisers import attention_of, model_output, scheduler_of
from .solvers import learns_variance

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


Index = tuple[slice, ...]
"""Of a part of a tensor: `tensor[index]`; `()` is all of it."""


@contextmanager
def after_calls(model: nn.Module, look: Callable) -> Iterator[None]:
    """Within the block, `look(model, args, kwargs, output)` follows each call of a denoiser by its pipeline.

    The arguments are those that were given, see `fresh`: what takes its lists apart (`UNet2DConditionModel` those of a
    T2I-Adapter) leaves a forward hook empty ones.

    Raises:
        UnsupportedError: in the first call, where the pipeline perturbs attention: a call outside of it would not.
    """
    given: list[tuple] = []
    outside = attention_of(model)

    def before(_model: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal outside
        if outside is not None and _perturbs(outside, attention_of(model) or {}):
            raise UnsupportedError(
                f"A pipeline must call its {type(model).__name__} with the attention that it has outside of the call, "
                f"but perturbed-attention guidance exchanges it while the pipeline runs. Give `pag_scale=0`."
            )
        outside = None
        given.append(fresh((args, kwargs)))

    def after(_model: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> Any:
        return look(model, *given.pop(), output)

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _perturbs(outside: Mapping[str, Any], inside: Mapping[str, Any]) -> bool:
    """Whether processors are others than outside of the call, and compute something else: some only store attention."""
    return any("PAG" in type(each).__name__ and outside.get(name) is not each for name, each in inside.items())


def fresh(arguments: Any, change: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """The same leaves in containers of their own, so that another model may be given them.

    Objects with a state are containers too: a cache of keys and values, which a model fills in the first step of a run
    and reads in those that follow, would else hold those of whichever model was called last.

    Args:
        arguments (`Any`): of a call.
        change (`Callable`, *optional*): what becomes of each leaf.
    """
    known: dict[int, Any] = {}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) or callable(leaf) or not hasattr(leaf, "__dict__"):
            return change(leaf)
        if id(leaf) not in known:
            known[id(leaf)] = made = copy.copy(leaf)
            vars(made).update(tree_map(inside, vars(leaf)))
        return known[id(leaf)]

    def inside(leaf: Any) -> Any:
        return change(leaf.clone()) if isinstance(leaf, Tensor) else own(leaf)  # some are written in place

    return tree_map(own, arguments)


_LOCK = threading.Lock()
_watched: dict[type, list[tuple[Scheduler, Callable[[Tensor], None]]]] = {}  # by class


@contextmanager
def watching_samples(scheduler: Scheduler, look: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block, `look` gets the sample that a scheduler is to step from, before each of its steps.

    The class is told so and not the scheduler, as pipelines copy those: a copy would step in the original's place.
    """
    if getattr(scheduler, "step", None) is None:  # one that is stepped otherwise
        return (yield)
    kind, entry = type(scheduler), (scheduler, look)
    own = cast("dict[str, Any]", scheduler.__dict__).get("step")  # a copy may have been given one
    with _LOCK:
        if own is not None:
            scheduler.__dict__["step"] = functools.wraps(own)(functools.partial(_step, own, kind, scheduler))
        elif kind not in _watched:
            _tell(kind)
        _watched.setdefault(kind, []).append(entry)
    try:
        yield
    finally:
        with _LOCK:
            _watched[kind] = [each for each in _watched[kind] if each is not entry]
            if own is not None:
                scheduler.__dict__["step"] = own
            if not _watched[kind] and not _watched.pop(kind):
                _leave(kind)


def _tell(kind: type) -> None:
    """Let a class's `step` tell of its samples; wrapped, as pipelines look at the signature for what they may pass."""
    stock = cast(Any, kind).step

    @functools.wraps(stock)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _step(functools.partial(stock, self), kind, self, *args, **kwargs)

    cast(Any, step).before, cast(Any, kind).step = vars(kind).get("step"), step


def _leave(kind: Any) -> None:
    """Let a class be as it was."""
    before = getattr(vars(kind).get("step"), "before", ())
    if before is None:
        del kind.step
    elif before:
        kind.step = before


def _step(stock: Callable, kind: type, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    looks = [look for each, look in _watched.get(kind, ()) if each is scheduler]
    sample = inspect.signature(stock).bind(*args, **kwargs).arguments.get("sample") if looks else None
    if isinstance(sample, Tensor):
        for look in looks:
            look(sample)
    return stock(*args, **kwargs)


def place_of(sample: Tensor, read: Tensor, output: Tensor) -> Index:
    """Where a sampler's sample stands in what a denoiser has read, which is where its prediction is in the output.

    Args:
        sample (`Tensor`, `(B, …)`): that the sampler steps from.
        read (`Tensor`, `(k B, …)`): by the denoiser, the sample perhaps scaled, and on one axis something beside it.
        output (`Tensor`, `(k B, …)`): of the denoiser, as long on this axis as what was read.

    Returns:
        `Index`: the beginning or the end of an axis; `()` where nothing stands beside the sample.
    """
    if not sample.ndim == read.ndim == output.ndim or len(sample) > len(read):
        return ()
    axis, *others = [each for each in range(1, sample.ndim) if sample.shape[each] != output.shape[each]] or [0]
    size = sample.shape[axis]
    if not axis or others or not size < output.shape[axis] == read.shape[axis]:
        return ()
    for part in (slice(None, size), slice(-size, None)):
        index = (*[slice(None)] * axis, part)
        there = read[: len(sample)][index]
        if there.shape == sample.shape and _proportional(there, sample):
            return index
    return ()


def _proportional(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same but for a factor and the rounding of a narrower dtype."""
    return bool(nn.functional.cosine_similarity(a.float().flatten(), b.to(a.device).float().flatten(), 0) > 0.999)


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
    return output[index] if (index := used_index(pipe, output, args, kwargs)) else output


def used_index(pipe: DiffusionPipeline, output: Tensor, args: tuple, kwargs: Mapping) -> Index:
    """Which part of an output `used_part` takes."""
    if output.ndim < 3 or output.shape[1] % 2:
        return ()
    half = output.shape[1] // 2
    sample = sample_of(args, kwargs)
    doubled = sample.ndim == output.ndim and sample.shape[1] == half and sample.shape[2:] == output.shape[2:]
    return (slice(None), slice(half)) if doubled or learns_variance(scheduler_of(pipe)) else ()


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
        output = model_output(_called(model, args, kwargs))
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
        labelled = model_output(_called(model, args, kwargs))
    finally:
        handle.remove()
    found = used_part(pipe, labelled, args, kwargs).unique()
    rounded = found.round().long()
    arrived = torch.equal(rounded.to(found.dtype), found) and len(found) * 2 == number
    return UsedChannels(last, axis, rounded) if arrived else None


def _called(model: nn.Module, args: tuple, kwargs: dict) -> Any:
    """What a model gives; it may take the lists among its arguments apart."""
    args, kwargs = fresh((args, kwargs))
    return model(*args, **kwargs)


def _whole_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers by name, parts of a split layer left out."""
    return ((name, layer) for name, layer in model.named_modules() if whole_name(name, layer) == name)
