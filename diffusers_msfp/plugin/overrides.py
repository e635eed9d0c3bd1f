"""What a quantized model answers differently from a float one, set on the model object and removed by `dequantize`.

The class of the model stays the stock one, so that its name in a checkpoint is one that plain diffusers can open.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..compat.diffusers import kept_in_float32
from ..engines.fusion.processors import use_engine_attention
from ..errors import UnsupportedError
from ..layers import QuantLayer
from ..layers.convert import quant_layers
from ..layers.logical import ReadableState
from .adapters.attaching import all_or_nothing, leave_out_parts, refuse_widened
from .adapters.versions import require_peft
from .config import MSFPMethod
from .copies import dtype_among, require_dtype
from .files import saving

_REFUSED = {
    "fuse_lora": "Its weights are packed, so they must be searched again with the LoRA in them. "
    "`diffusers_msfp.fuse_lora(pipe, file, weight)` and `diffusers-msfp fuse DIR --lora FILE` do that; or leave the "
    "LoRA beside them.",
    "enable_layerwise_casting": "The weights are already stored in {bits} bits, and casting would damage their scales. "
    "There is nothing to gain: leave it out.",
    "fuse_qkv_projections": "Packed projections of different formats cannot be joined. Leave them apart, or call "
    "`model.dequantize()`, fuse, and quantize again.",
    "type": "The packed weights have no dtype to cast. Load the model with `dtype=…` instead.",
    "half": "The packed weights have no dtype to cast. Load the model with `dtype=torch.float16` instead.",
    "float": "The packed weights have no dtype to cast. Load the model with `dtype=torch.float32` instead.",
}


def _refuse(model: nn.Module, *_: object, method: str, **__: object) -> None:
    bits = sorted({layer.weight_format.bits for _, layer in quant_layers(model)})
    reason = _REFUSED[method].format(bits=" and ".join(map(str, bits)))
    raise UnsupportedError(f"`{method}` is not possible for the MSFP-quantized {type(model).__name__}. {reason}")


def _num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As `ModelMixin.num_parameters`, with packed weights counted as the weights they stand for."""
    count = cast(Any, type(model)).num_parameters(
        model, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings
    )
    if only_trainable:  # packed weights are not trainable, so none of them was counted
        return count
    layers = {id(layer): layer for _, layer in quant_layers(model)}
    for layer in layers.values():
        rows, length = layer.matrix_shape
        count += rows * length - layer.packed_weight.numel()
    return count


def _to(stock: Callable[..., nn.Module], model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """As the class's own; the dtype that the model has is for what was added to it, another one is refused."""
    dtype = dtype_among(args, kwargs)
    require_dtype(model, dtype)
    kwargs.pop("dtype", None)
    args = tuple(arg for arg in args if not isinstance(arg, torch.dtype) and arg is not None)
    with _ready_again(model):
        if dtype is not None and not kept_in_float32(model):
            nn.Module.to(model, dtype)  # what came after loading, such as an IP-Adapter's layers
        if not args and not {key: value for key, value in kwargs.items() if value is not None}:
            return model
        return stock(model, *args, **kwargs)


def _move(stock: Callable[..., nn.Module], model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """As the class's own method, one of those that move a model to a device."""
    with _ready_again(model):
        return stock(model, *args, **kwargs)


@contextmanager
def _ready_again(model: nn.Module) -> Iterator[None]:
    """Let layers that are ready be so after their tensors are moved, too: what is compiled next cannot do it."""
    ready = [layer for _, layer in quant_layers(model) if layer.prepared is not None]
    yield
    for layer in ready:
        layer.prepare()


def _set_default_attn_processor(model: nn.Module) -> None:
    """As diffusers' own, which does not know the engines' processors and would refuse them."""
    use_engine_attention(model, wanted=False)
    cast(Any, type(model)).set_default_attn_processor(model)


def _attach(
    model: nn.Module, *args: Any, method: str, hotswap: bool = False, adapter_name: str | None = None, **kwargs: Any
) -> Any:
    """As the model's own method, where PEFT is new enough for whoever loads in this call; an error changes nothing."""
    require_peft("transformers" if isinstance(model, PreTrainedModel) else "diffusers")
    state, pipeline = args[0] if args else None, kwargs.get("_pipeline")
    parts = {key.partition(".")[0] for key in state} if isinstance(state, Mapping) else ()
    texts = sorted(part for part in parts if isinstance(getattr(pipeline, part, None), PreTrainedModel))
    if texts:  # the pipeline goes on with its text encoders when this model has its adapter
        require_peft("transformers")
    if texts and hotswap:
        raise UnsupportedError(
            f"`hotswap` is possible for denoisers alone, but this LoRA has a part for `{texts[0]}` too, at which "
            f"diffusers would stop half-way. Load it without `hotswap`, under another `adapter_name`."
        )
    if hotswap:
        kwargs["hotswap"] = hotswap
    if adapter_name is not None:
        kwargs["adapter_name"] = adapter_name
    refuse_widened(model)
    leave_out_parts(model, args[0] if args else kwargs.get("adapter_config"))
    with all_or_nothing(model, adapter_name if hotswap else None):
        return getattr(type(model), method)(model, *args, **kwargs)


def _state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As of any module; it also knows the float weights by their names."""
    state = type(model).state_dict(model, *args, **kwargs)
    return state if args or "destination" in kwargs else ReadableState(state, model)


def _require_no_gradients(module: nn.Module, requires_grad: bool = True) -> nn.Module:
    """As `nn.Module.requires_grad_`, with True refused before anything is changed: packed weights cannot be trained."""
    if requires_grad:
        raise UnsupportedError(
            f"The weights of this MSFP-quantized {type(module).__name__} are packed, so they cannot be trained, but "
            f"got `requires_grad_(True)`. Train adapters: `diffusers_msfp.finetune(pipe, teacher)`, or PEFT's by "
            f"`model.add_adapter(LoraConfig(…))`; biases and norms one by one (`parameter.requires_grad_(True)`)."
        )
    return type(module).requires_grad_(module, requires_grad)


def _with_packed(model: nn.Module) -> Iterator[nn.Module]:
    """The model and those of its modules that hold quantized layers."""
    module_names = {name for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    above = {"".join(name[:end]) for name in module_names for end in (0, *(i for i, c in enumerate(name) if c == "."))}
    yield from (module for name, module in model.named_modules() if name in above)


_ANSWERS: dict[str, Callable[..., Any]] = {
    "state_dict": _state_dict,
    "num_parameters": _num_parameters,
    "set_default_attn_processor": _set_default_attn_processor,
    "save_config": saving.save_config,
    "save_pretrained": saving.save_pretrained,
    **{name: functools.partial(_attach, method=name) for name in ("add_adapter", "load_adapter", "load_lora_adapter")},
    **{name: functools.partial(_refuse, method=name) for name in _REFUSED},
}


class _Bound(functools.partial):
    """An answer for one object; accelerate's `compile_regions` binds it to the copy that it makes, as methods are."""

    @property
    def __func__(self) -> Callable[..., Any]:
        unbound: Any = functools.partial(self.func, **self.keywords)
        vars(unbound).update(vars(self))  # what it wraps, for those who look which arguments there are
        return unbound

    @property
    def __self__(self) -> nn.Module:
        return self.args[0]


def install(model: nn.Module) -> None:
    """Set the answers on the model object."""
    for method, answer in _ANSWERS.items():
        if hasattr(type(model), method):
            bound: Any = _Bound(answer, model)
            if method.startswith("save"):
                bound.__wrapped__ = getattr(type(model), method)  # for those who look which arguments there are
            setattr(model, method, bound)
    for module in _with_packed(model):
        vars(module)["requires_grad_"] = _Bound(_require_no_gradients, module)


def install_on_classes() -> None:
    """Let diffusers' and transformers' bases move quantized models as these need it, once.

    On the classes, since accelerate puts `to` and its like on model objects, and takes away whatever stands there.
    """
    for base in (ModelMixin, PreTrainedModel):
        for method, answer in _MOVES.items():
            stock = vars(base).get(method, functools.partial(_next, base, method))
            if hasattr(base, method) and getattr(stock, "answer", None) is not answer:
                setattr(base, method, _answered(getattr(base, method), stock, answer))


def _next(base: type, method: str, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """As the class that follows this base among the model's, for methods that the base does not have itself."""
    return getattr(super(base, model), method)(*args, **kwargs)


def _answered(known: Callable, stock: Callable, answer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(known)
    def method(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        ours = getattr(model, "quantization_method", None) == MSFPMethod.MSFP
        return answer(stock, model, *args, **kwargs) if ours else stock(model, *args, **kwargs)

    method.answer = answer  # type: ignore[attr-defined]
    return method


_MOVES = {"to": _to, **dict.fromkeys(("cpu", "cuda", "ipu", "mtia", "xpu"), _move)}


def remove(model: nn.Module) -> None:
    """Let the model answer like any other."""
    for method in _ANSWERS:
        model.__dict__.pop(method, None)
    for module in model.modules():
        module.__dict__.pop("requires_grad_", None)
