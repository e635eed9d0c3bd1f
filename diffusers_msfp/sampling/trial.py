"""Try a pipeline's arguments as far as costs little, before anything is changed."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..compat.diffusers import Scheduler, source_of
from ..errors import ConfigError, MSFPError, NonFiniteError
from ..layers import QuantLayer
from .calls import Call, quiet
from .pictures import NoisedPictures, showing
from .solvers import with_parts
from .timestep import timestep_argument


class _Reached(Exception):
    """Everything that is to be tried has worked; the rest of the run is not needed."""


def try_calls(pipe: DiffusionPipeline, calls: Sequence[Call], pictures: NoisedPictures | None = None) -> None:
    """Run calls of a pipeline through the first step of its sampler, and drop what they make.

    One call of each batch size is tried. Models that are still observing, or whose weights are elsewhere (on the meta
    device), are not run: a call that has come to them has worked. The pipeline's scheduler and the user's random states
    stay as they are.

    Args:
        pipe (`DiffusionPipeline`): float, quantized, or with denoisers on the meta device; not changed.
        calls (`Sequence[Call]`): made for this; their generators advance.
        pictures (`NoisedPictures`, *optional*): made for this; what the denoiser is to be called with.

    Raises:
        ConfigError: a call fails.
        NonFiniteError: a step makes NaN or infinity.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    others = {name: _on_cpu(part) for name, part in parts.items() if _is_meta(part)}
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None:
        others["scheduler"] = _ending_after_one_step(copy.deepcopy(scheduler))
    own = with_parts(pipe, **others)
    denoisers = [part for part in own.components.values() if isinstance(part, nn.Module) and _has_timestep(part)]
    sizes = {_size(call): call for call in calls}
    stopped = _stopping_before([part for part in denoisers if not _may_run(part)])
    with quiet(own), torch.no_grad(), stopped, showing(own, pictures):
        for size, call in sizes.items():
            if pictures is not None:
                pictures.show(call)
            try:
                call.run(own)
            except _Reached:
                continue
            except MSFPError:
                raise
            except Exception as error:  # a pipeline may fail in any way
                raise ConfigError(
                    f"{type(pipe).__name__} must run with the arguments that it is given, but a batch of {size} fails "
                    f"in its first step, before anything is changed: {describe(error)} Correct the arguments."
                ) from error


def describe(error: Exception) -> str:
    """A foreign error as a sentence."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:500].rstrip('.')}."


def refuse_upcast(pipe: DiffusionPipeline, models: Mapping[str, nn.Module]) -> None:
    """Refuse models that a pipeline casts to float32 while it runs, which packed weights cannot be.

    Args:
        pipe (`DiffusionPipeline`): that they are in.
        models (`Mapping[str, nn.Module]`): quantized or to be, by name.

    Raises:
        ConfigError: there is one.
    """
    for name, model in models.items():
        wanted = getattr(getattr(model, "config", None), "force_upcast", False) and model.dtype == torch.float16
        if wanted and _casts(cast(Any, type(pipe))):
            raise ConfigError(
                f"A quantized model keeps its dtype, but {type(pipe).__name__} casts a float16 `{name}` to float32 "
                f"(`force_upcast` in its config). Load the pipeline in bfloat16 or float32, or leave `{name}` out of "
                f"`components_to_quantize`."
            )


@functools.cache
def _casts(cls: type) -> bool:
    """Whether a pipeline's code looks at `force_upcast`."""
    source = source_of(inspect.getmodule(cls))
    return source is None or "force_upcast" in source


def _size(call: Call) -> int:
    generator, prompt = (call.arguments.get(name) for name in ("generator", "prompt"))
    labels = call.arguments.get("class_labels")
    counted = next((each for each in (prompt, labels, generator) if isinstance(each, list)), None)
    return len(counted) if counted is not None else call.arguments.get("batch_size", 1)


def _has_timestep(model: nn.Module) -> bool:
    return timestep_argument(model).name is not None


def _is_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in model.parameters())


def _may_run(model: nn.Module) -> bool:
    """Whether a run leaves no trace in a model."""
    layers = (module for module in model.modules() if isinstance(module, QuantLayer))
    return not _is_meta(model) and not any(layer.observing for layer in layers)


def _on_cpu(model: nn.Module) -> nn.Module:
    """A model that gives itself out for being on the CPU, so that pipelines prepare their tensors there."""
    shown = copy.copy(model)
    shown.__class__ = type(type(model).__name__, (type(model),), {"device": torch.device("cpu")})
    return shown


@contextmanager
def _stopping_before(models: Sequence[nn.Module]) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Reached

    with ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_pre_hook(stop, prepend=True).remove)
        yield


def _ending_after_one_step(scheduler: Scheduler) -> Scheduler:
    """Let a scheduler end the run after its first step, which must be finite."""
    step: Callable = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature
    def only(*args: Any, **kwargs: Any) -> Any:
        made = step(*args, **kwargs)
        sample = made[0] if isinstance(made, tuple) else getattr(made, "prev_sample", None)
        if isinstance(sample, torch.Tensor) and not sample.isfinite().all():
            raise NonFiniteError(
                f"{type(scheduler).__name__} must make finite samples of what the denoiser puts out, but the first "
                f"step holds NaN or infinity. Sample the pipeline in a wider dtype, and check its weights."
            )
        raise _Reached

    scheduler.step = only
    return scheduler
