"""What diffusers makes out of a quantized model: float models from its config, and models that copy its weights.

`Model.from_config(quantized.config)` gives a float model, whose config must not say that it is quantized: its
checkpoint could not be loaded again. Constructors like `ControlNetModel.from_unet(unet)` copy tensors from module to
module; packed ones fit nowhere, so the first that is read is refused, with the way out. Both are additions to
`ModelMixin`, since diffusers asks no quantizer there. `from_pipe` and `pipe.to` cast the parts of a pipeline one after
the other: what one of them would refuse is asked before the first. So is what the models of a modular pipeline would,
whose `load_components` takes errors for warnings.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from torch import nn
from transformers import PreTrainedModel

from ..compat.diffusers import saves_averages
from ..errors import UnsupportedError
from ..layers.convert import quant_layers
from ..sampling.denoisers import is_quantized
from .config import MSFPConfig, MSFPMethod

_OWN = ("from_pretrained", "from_config", "from_single_file")
_ABOUT_QUANTIZATION = ("quantization_config", "_pre_quantization_dtype")


def install() -> None:
    """Add to diffusers' bases, once, what makes copies right or refused; classes that come later get it too."""
    if getattr(vars(ModelMixin).get("from_config"), "__func__", None) is _from_config:
        return
    base: Any = ModelMixin
    base.from_config = classmethod(_from_config)
    base.__init_subclass__ = classmethod(_init_subclass)
    for pipeline in (DiffusionPipeline, ModularPipeline):
        cast(Any, pipeline).to = _all_or_nothing(pipeline.to)
    cast(Any, ModularPipeline).load_components = _for_one_model(ModularPipeline.load_components)
    known = [ModelMixin]
    for cls in known:
        _guard_constructors(cls)
        known += cls.__subclasses__()


def _all_or_nothing(to: Callable) -> Callable:
    @functools.wraps(to)
    def cast_all(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if (dtype := dtype_among(args, kwargs)) is not None:
            for part in pipe.components.values():
                if isinstance(part, ModelMixin | PreTrainedModel) and is_quantized(part):
                    require_dtype(part, dtype)
        return to(pipe, *args, **kwargs)

    return cast_all


def _for_one_model(load_components: Callable) -> Callable:
    @functools.wraps(load_components)
    def load(pipe: ModularPipeline, names: Any = None, *args: Any, **kwargs: Any) -> None:
        one = isinstance(names, str) or isinstance(names, list | tuple) and len(names) == 1
        if not one and isinstance(kwargs.get("quantization_config"), MSFPConfig):
            raise UnsupportedError(
                "`load_components` gives one config to all models that it loads, the VAE too. Say which one it is for: "
                '`load_components(quantization_config={"unet": MSFPConfig(…)})`.'
            )
        load_components(pipe, names, *args, **kwargs)

    return load


def dtype_among(args: tuple, kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype among the arguments of a `to`."""
    return kwargs.get("dtype") or next((arg for arg in args if isinstance(arg, torch.dtype)), None)


def require_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse to cast a quantized model.

    Raises:
        UnsupportedError: it has another dtype.
    """
    if dtype is not None and dtype != model.dtype:
        raise UnsupportedError(
            f"A quantized {type(model).__name__} cannot be cast: it was loaded as {model.dtype}, but got {dtype}. "
            f"Load it with `dtype={dtype}`; for `from_pipe` pass `dtype={model.dtype}`."
        )


def _from_config(cls: Any, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
    """A float model with this config; what a quantized model's says about its quantization is left out."""
    if isinstance(config, Mapping) and _is_ours(config.get("quantization_config")):
        if saves_averages():
            raise UnsupportedError(
                f"An `EMAModel` saves averages as a float {cls.__name__}, but this one has those of an MSFP-quantized "
                f"model, whose packed weights fit no float model. Average the parameters of adapters alone and save "
                f"the adapters, or call `model.dequantize()` before averaging."
            )
        config = {key: value for key, value in config.items() if key not in _ABOUT_QUANTIZATION}
    return super(ModelMixin, cls).from_config(config, return_unused_kwargs, **kwargs)


def _is_ours(config: object) -> bool:
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return method == MSFPMethod.MSFP


def _init_subclass(cls: Any, **kwargs: Any) -> None:
    super(ModelMixin, cls).__init_subclass__(**kwargs)
    _guard_constructors(cls)


def _guard_constructors(cls: type[ModelMixin]) -> None:
    """Let a class's own constructors from other models (`from_unet`, `from_transformer`, …) refuse packed tensors."""
    for name, method in list(vars(cls).items()):
        if name.startswith("from_") and name not in _OWN and isinstance(method, classmethod):
            setattr(cls, name, classmethod(_guarded(method.__func__, f"{cls.__name__}.{name}")))


def _guarded(constructor: Callable, called: str) -> Callable:
    @functools.wraps(constructor)
    def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for model in (*args, *kwargs.values()):
                if isinstance(model, nn.Module):
                    stack.enter_context(_refusing_to_be_read(model, called))
            return constructor(cls, *args, **kwargs)

    vars(construct)["__signature__"] = inspect.signature(constructor)
    return construct


@contextmanager
def _refusing_to_be_read(model: nn.Module, called: str) -> Iterator[None]:
    """While this lasts, the packed tensors of a model are not handed out."""

    def refuse(layer: nn.Module, *_: object) -> None:
        raise UnsupportedError(
            f"`{called}` copies float weights, but `{layer.module_name}` of this {type(model).__name__} is packed. "
            f"Call `model.dequantize()` on a copy of it (`copy.deepcopy`), pass that, and quantize what is made of it."
        )

    hooks = [layer.register_state_dict_pre_hook(refuse) for _, layer in quant_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
