"""What a quantized model and its teacher must be before anything is learned."""

import torch
from torch import Tensor, nn

from ..compat.accelerate import device_of_calls
from ..compat.peft import is_wrapped
from ..compat.torch import weight_of
from ..errors import ConfigError, StateError
from ..layers import QuantLayer
from ..layers.convert import require_tensors
from ..layers.split import whole_name
from ..sampling.denoisers import require_same_class
from ..sampling.observation import calibration_state, require_finished
from ..sampling.timestep import require_timesteps
from .method import require_order


def check_student(model: nn.Module, teacher: nn.Module, method: str, *, learns: bool = True) -> None:
    """Refuse what cannot be changed with a teacher's help, before anything is changed.

    Args:
        model (`ModelMixin`): quantized.
        teacher (`nn.Module`): the float model it was quantized from.
        method (`str`): that is to change it.
        learns (`bool`): by gradients.

    Raises:
        ConfigError: the model is float16, or cannot take what the teacher takes.
        StateError: quantizing it was stopped, or it is still observing, offloaded, or has what the method forbids; the
            teacher is quantized.
        ShapeError: the teacher is another model.
    """
    require_same_class(model, teacher)
    if any(isinstance(module, QuantLayer) for module in teacher.modules()):
        raise StateError("The teacher must be the full-precision original, but got a quantized model.")
    require_timesteps(model)
    require_finished(model, "improved")
    require_tensors(model, "improved")
    where = [device_of_calls(each) for each in (model, teacher)]
    if learns and where[0] != where[1]:
        raise ConfigError(
            f"A model learns where its teacher is, but it computes on {where[0]} and the teacher on {where[1]}. Move "
            f"one of the pipelines (`pipe.to(…)`)."
        )
    if learns and model.dtype == torch.float16:
        raise ConfigError(
            "Gradients of float16 models underflow, but this one is float16. Load it with "
            "`dtype=torch.float32` or `torch.bfloat16`."
        )
    if learns:
        require_takes(model, teacher)
    if calibration_state(model) == "observing":
        raise StateError("Only a calibrated model can be improved, but this one observes: call `calibrate(pipe)`.")
    require_order(model, method)
    if any(is_wrapped(name) for name, _ in model.named_modules()):
        raise StateError("Users' adapters must be unloaded before a model is changed, but this one has some.")


def require_takes(model: nn.Module, teacher: nn.Module) -> None:
    """Refuse a model that cannot be called with what its teacher was called with.

    Raises:
        ConfigError: it is bfloat16 and the teacher is not.
    """
    if model.dtype == torch.bfloat16 and teacher.dtype != torch.bfloat16:
        raise ConfigError(
            f"The quantized model is shown what its teacher reads, but it is bfloat16 and the teacher "
            f"{str(teacher.dtype).removeprefix('torch.')}. Load the quantized model in float32, or both in bfloat16."
        )


def original_weight(teacher: nn.Module, layer: QuantLayer) -> Tensor:
    """The float weight that a layer was quantized from.

    Raises:
        ConfigError: the teacher has no such layer.
        ShapeError: its weight has another shape.
    """
    module_name, columns = whole_name(layer.module_name, layer), layer.columns or slice(None)
    try:
        weight = weight_of(teacher.get_submodule(module_name)).detach()
    except AttributeError as error:
        raise ConfigError(
            f"The teacher must be the model that was quantized, but {type(teacher).__name__} has no layer "
            f"`{module_name}`."
        ) from error
    weight = weight[:, columns]
    layer.check_original(weight)
    return weight
