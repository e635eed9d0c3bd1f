"""What a checkpoint says of its layers: read from a model, and made room for in a model without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import CheckpointError, MSFPError
from ..formats import FORMATS, FPFormat, largest_multiplier
from ..schemes import LayerScheme
from . import QUANT_LAYERS
from .convert import quant_layers, replace_modules
from .split import whole_name

OBSERVING = "observing"
MAX_GROUP = 2**20


@dataclass(frozen=True)
class LayerGroup:
    """Layers of the same formats; an entry of `layers` in a checkpoint's record.

    Args:
        weight (`str`): name in `FORMATS`, of a signed one.
        input (`str`, *optional*): name in `FORMATS`, `"observing"` before calibration, None for a float input.
        modules (`tuple[str, ...]`): names of the layers.
        group_size (`int`, *optional*): of the weights' groups, see `QuantLayer.multipliers`.

    Raises:
        CheckpointError: any other value.
    """

    weight: str
    input: str | None
    modules: tuple[str, ...]
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, str) or not isinstance(self.input, str | None):
            raise CheckpointError(
                f"`layers` of config.json must name formats, but got {self.weight!r}, {self.input!r}."
            )
        try:
            weight = FORMATS[self.weight]
            self.input_format  # noqa: B018
        except MSFPError as error:
            raise CheckpointError(f"In `layers` of config.json a format is not known: {error}") from error
        if not weight.signed:
            raise CheckpointError(f"Weights are stored in signed formats, but got `{weight}` in config.json.")
        size = self.group_size
        if size is not None and not (type(size) is int and 2 <= size <= MAX_GROUP and largest_multiplier(weight)):
            raise CheckpointError(
                f"`group_size` of `layers` in config.json must be a whole number from 2 to {MAX_GROUP}, and "
                f"the weight's integers must fit 8 bits, but got {size!r} for `{weight}`."
            )
        names = self.modules
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"`modules` of `layers` in config.json must be a list of names, but got {names!r}.")
        object.__setattr__(self, "modules", tuple(names))

    @property
    def weight_format(self) -> FPFormat:
        """Of the packed weights."""
        return FORMATS[self.weight]

    @property
    def observing(self) -> bool:
        """Whether the inputs' formats are still to be found."""
        return self.input == OBSERVING

    @property
    def input_format(self) -> FPFormat | None:
        """Of the inputs; None where they are float or observed."""
        return None if self.input is None or self.observing else FORMATS[self.input]

    @classmethod
    def from_dict(cls, record: object) -> "LayerGroup":
        """Read an entry.

        Raises:
            CheckpointError: fields are missing, or see above.
        """
        if not isinstance(record, Mapping) or not {"weight", "input", "modules"} <= record.keys():
            raise CheckpointError(
                f"Each entry of `layers` in config.json must have `weight`, `input` and `modules`, but got {record!r}."
            )
        return cls(record["weight"], record["input"], record["modules"], record.get("group_size"))

    def to_dict(self) -> dict:
        """In types that JSON knows."""
        groups = {} if self.group_size is None else {"group_size": self.group_size}
        return {"weight": self.weight, "input": self.input, "modules": list(self.modules)} | groups


def describe_layers(model: nn.Module) -> tuple[LayerGroup, ...]:
    """All quantized layers of a model, grouped."""
    groups: dict[tuple[str, str | None, int | None], list[str]] = {}
    for name, layer in quant_layers(model):
        state = OBSERVING if layer.observing else (layer.input_format.name if layer.input_format else None)
        groups.setdefault((layer.weight_format.name, state, layer.group_size), []).append(name)
    return tuple(LayerGroup(weight, state, tuple(names), size) for (weight, state, size), names in groups.items())


def convert_skeleton(model: nn.Module, groups: Sequence[LayerGroup], plan: Mapping[str, LayerScheme]) -> None:
    """Make room for a checkpoint's packed tensors in a model without weights.

    Args:
        groups (`Sequence[LayerGroup]`): of the checkpoint's record.
        plan (`Mapping[str, LayerScheme]`): candidates of each layer; those of a split one are its parts'.

    Raises:
        CheckpointError: a layer that the model does not have, or one that observes although its input stays float.
    """
    skeletons = {}
    for group in groups:
        for name in group.modules:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                module = None
            if module is None or type(module) not in QUANT_LAYERS:
                raise CheckpointError(
                    f"config.json says that `{name}` is quantized, but {type(model).__name__} has "
                    f"{'no such layer' if module is None else type(module).__name__ + ' there'}: not its checkpoint."
                )
            layer = QUANT_LAYERS[type(module)].skeleton(module, name, group.weight_format, group_size=group.group_size)
            layer.scheme = plan.get(whole_name(name, module)) or LayerScheme(
                (group.weight,), group_size=group.group_size
            )
            if group.observing:
                if not layer.scheme.activation:
                    raise CheckpointError(f"config.json says `{name}` is observing, but its scheme has nothing to try.")
                layer.start_observing(layer.scheme.activation)
            elif group.input_format is not None:
                layer.expect_input(group.input_format)
            skeletons[name] = layer
    replace_modules(model, skeletons)
