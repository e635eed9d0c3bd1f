"""Split the layers that read a concatenation, so that each of its tensors gets a format and a range of its own.

The up blocks of a UNet concatenate what comes from below with what a skip connection brings; the two may differ widely
in range, and the shortcut reads both as they are (Q-Diffusion, arXiv 2302.04304, section 3.3). Such layers are found by
experiment: in a call of the full-precision model their input is what `torch.cat` has put together along channels.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...calibration import observe
from ...calibration.watch import watching_calls
from ...compat.hooks import share_hooks
from ...compat.peft import is_wrapped
from ...compat.torch import put_bias
from ...compat.wrappers import sees_through
from ...errors import StateError
from ...layers import QUANT_LAYERS, QuantLayer, SplitLayer
from ...layers.convert import layers_by_name, prepare_layers, replace_modules, require_own_methods
from ...layers.split import can_split, channel_axis, split_layer
from ...numerics.rounding import check_finite
from ...results import Result
from ...sampling.calls import Call, batched_calls, call_arguments, quiet, require_positive
from ...sampling.denoisers import ByDenoiser, by_denoiser, denoiser_of, each_quantized
from ...sampling.trajectory import DenoisingStep, rollout
from ...schemes import LayerScheme
from ..checks import check_student, original_weight

logger = logging.getLogger(__name__)

_CONCATENATE = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class SplitConfig:
    """Settings of `split_shortcuts`.

    Args:
        num_samples (`int`): that the parts' ranges are taken from.
        num_inference_steps (`int`): of the teacher's trajectories.
        seed (`int`): of the samples' noise.

    Raises:
        ConfigError: a number below 1.

    Example:
        >>> SplitConfig(num_samples=16).num_inference_steps
        20
    """

    num_samples: int = 64
    num_inference_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(num_samples=self.num_samples, num_inference_steps=self.num_inference_steps)


@dataclass(frozen=True, kw_only=True)
class SplitShortcuts(Result):
    """What was split.

    Args:
        split (`Mapping[str, Sequence[int]]`): layer → input channels of each part; empty where nothing is concatenated.
        seconds (`float`): of the run.
    """

    split: Mapping[str, Sequence[int]]
    seconds: float


@sees_through
def split_shortcuts(
    pipe: DiffusionPipeline,
    teacher: DiffusionPipeline,
    config: SplitConfig | None = None,
    *,
    prompts: Sequence[str] | None = None,
    **arguments: Any,
) -> SplitShortcuts | ByDenoiser:
    """Split, in place, every quantized layer of a pipeline's denoiser whose input is a concatenation.

    Formats of the parts' weights and inputs are searched anew among those of the layer's scheme; all other layers stay
    as they are. A layer in n parts takes n products, and n scales for each output channel.

    Args:
        pipe (`DiffusionPipeline`): quantized and calibrated, without adapters and temporal maintenance.
        teacher (`DiffusionPipeline`): the full-precision original.
        config (`SplitConfig`, *optional*): settings.
        prompts (`Sequence[str]`, *optional*): taken in turn where the pipeline takes prompts.
        **arguments: passed on to the teacher, e.g. `guidance_scale=…`.

    Returns:
        `SplitShortcuts`, with a warning where nothing is concatenated; where several denoisers are quantized, a
        `ByDenoiser` of these.

    Raises:
        ConfigError: pipelines that do not fit.
        StateError: the model is observing, offloaded, or has what this method forbids; the teacher is quantized or has
            adapters.
        ShapeError: the teacher is another model. Nothing is changed after any of these.

    Source:
        arXiv 2302.04304, section 3.3.

    Example:
        ```py
        pipe = quantize_pipeline(DiffusionPipeline.from_pretrained("model"), "w4a4")
        split_shortcuts(pipe, DiffusionPipeline.from_pretrained("model"))
        ```
    """
    config, views = config or SplitConfig(), each_quantized(pipe, teacher)
    for own, original in views.values():
        model, teacher_model = denoiser_of(own), denoiser_of(original)
        check_student(model, teacher_model, "split", learns=False)
        if any(is_wrapped(name) for name, _ in teacher_model.named_modules()):
            raise StateError("The teacher must be without adapters, but this one has some: unload or fuse them.")
    ready = {name: _split(*view, config, prompts, arguments) for name, view in views.items()}
    return by_denoiser({name: apply() for name, apply in ready.items()})  # only now are models changed


def _split(
    pipe: DiffusionPipeline,
    teacher: DiffusionPipeline,
    config: SplitConfig,
    prompts: Sequence[str] | None,
    arguments: dict,
) -> Callable[[], SplitShortcuts]:
    """The new layers of one denoiser; the function that is returned puts them in, and gives the verb's result."""
    started, model, original = time.perf_counter(), denoiser_of(pipe), denoiser_of(teacher)
    layers = layers_by_name(model)
    make_arguments = call_arguments(teacher, prompts, config.num_inference_steps, arguments)
    concatenated = concatenated_inputs(original, rollout(teacher, make_arguments, 0, 1, config.seed)[0])
    found = {name: list(sizes) for name, sizes in concatenated.items() if name in layers}
    if not found:
        logger.warning(
            "%s has no quantized layer, or none left, that reads a concatenation: nothing is split.",
            type(model).__name__,
        )
    require_own_methods(model, {name: layers[name] for name in found}, "split")
    for name in found:
        check_finite(original_weight(original, layers[name]), f"The weight of layer `{name}`")
    split = {}
    for name, sizes in found.items():
        split[name] = _quantized(original.get_submodule(name), layers[name], sizes)
    if split:
        calls = batched_calls(make_arguments, [original], config.num_samples, config.seed)
        _observe(teacher, split, calls)
        for each in split.values():
            for part in each.children():
                if isinstance(part, QuantLayer) and part.observing:
                    part.freeze()

    def apply() -> SplitShortcuts:
        if split:
            replace_modules(model, split)
            prepare_layers(model)
        return SplitShortcuts(split=found, seconds=time.perf_counter() - started)

    return apply


def concatenated_inputs(model: nn.Module, step: DenoisingStep) -> dict[str, tuple[int, ...]]:
    """Layers of a float model whose input is a concatenation along the channels, with the channels of its parts.

    Args:
        step (`DenoisingStep`): a call of the model.
    """
    found: dict[str, tuple[int, ...]] = {}
    layers, made = {name: layer for name, layer in model.named_modules() if can_split(layer)}, _Concatenations()

    def look(name: str, args: tuple) -> None:
        if args and args[0].ndim > 2 and (sizes := made.sizes(args[0], channel_axis(layers[name]))):
            found[name] = sizes

    with made, torch.no_grad(), watching_calls(layers, look):
        step.run(model)
    return found


class _Concatenations(TorchFunctionMode):
    """Remembers what was put together along which axis, from what."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, int, tuple[int, ...]]] = []  # holds the tensors: their ids must stay theirs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CONCATENATE:
            tensors = args[0] if args else kwargs["tensors"]
            axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.ndim
            self._made.append((result, axis, tuple(tensor.shape[axis] for tensor in tensors)))
        return result

    def sizes(self, tensor: Tensor, axis: int) -> tuple[int, ...] | None:
        """Sizes of the tensors that this one was made from along an axis; None if it was not."""
        for made, along, sizes in self._made:
            if made is tensor and along == axis % made.ndim and len(sizes) > 1:
                return sizes
        return None


def _quantized(original: nn.Module, layer: QuantLayer, sizes: Sequence[int]) -> SplitLayer:
    """The layer in quantized parts; parts observe if the layer's input is quantized."""
    scheme = cast(LayerScheme, layer.scheme)
    scheme = scheme if layer.input_format is not None else replace(scheme, activation=(), residual=())
    split = split_layer(original, sizes, layer.module_name)
    share_hooks(layer, split)
    for index, part in enumerate(list(split.children())):
        quantized = QUANT_LAYERS[type(part)].from_float(part, f"{layer.module_name}.{index}", scheme)
        put_bias(quantized, layer.bias if index == 0 else None)
        quantized.expect_sum(layer.input_format is not None and layer.input_format.name in scheme.residual)
        quantized.use_engine(layer.engine)
        split.add_module(str(index), quantized.to(layer.packed_weight.device))
    return split


def _observe(teacher: DiffusionPipeline, split: Mapping[str, SplitLayer], calls: Sequence[Call]) -> None:
    """Show the parts what the teacher's layers read."""

    def look(name: str, args: tuple) -> None:
        for part, piece in zip(split[name].children(), split[name].pieces(args[0]), strict=True):
            if isinstance(part, QuantLayer) and part.observation is not None:
                observe(part.observation, piece, part.module_name)

    layers = {name: denoiser_of(teacher).get_submodule(name) for name in split}
    with quiet(teacher), torch.no_grad(), watching_calls(layers, look):
        for call in calls:
            call.run(teacher)
