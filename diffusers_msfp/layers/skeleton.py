"""What a checkpoint says of its layers: read from a model, and made room for in a model without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import CheckpointError, ConfigError
from ..formats import FORMATS, FPFormat
from ..schemes import LayerScheme
from . import QUANT_LAYERS
from .convert import quant_layers, replace_modules
from .split import whole_name

OBSERVING = "observing"


@dataclass(frozen=True)
class LayerGroup:
    """Layers of the same formats; an entry of `layers` in a checkpoint's record.

    Args:
        weight (`str`): name in `FORMATS`, of a signed one.
        input (`str`, *optional*): name in `FORMATS`, `"observing"` before calibration, None for a float input.
        modules (`tuple[str, ...]`): names of the layers.

    Raises:
        CheckpointError: any other value.
    """

    weight: str
    input: str | None
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        try:
            weight = FORMATS[self.weight]
            self.input_format  # noqa: B018
        except ConfigError as error:
            raise CheckpointError(f"In `layers` of config.json a format is not known: {error}") from error
        if not weight.signed:
            raise CheckpointError(f"Weights are stored in signed formats, but got `{weight}` in config.json.")
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
        return cls(record["weight"], record["input"], record["modules"])

    def to_dict(self) -> dict:
        """In types that JSON knows."""
        return {"weight": self.weight, "input": self.input, "modules": list(self.modules)}


def describe_layers(model: nn.Module) -> tuple[LayerGroup, ...]:
    """All quantized layers of a model, grouped."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name, layer in quant_layers(model):
        state = OBSERVING if layer.observing else (layer.input_format.name if layer.input_format else None)
        groups.setdefault((layer.weight_format.name, state), []).append(name)
    return tuple(LayerGroup(weight, state, tuple(names)) for (weight, state), names in groups.items())


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
            layer = QUANT_LAYERS[type(module)].skeleton(module, name, group.weight_format)
            layer.scheme = plan.get(whole_name(name, module)) or LayerScheme((group.weight,))
            if group.observing:
                if not layer.scheme.activation:
                    raise CheckpointError(f"config.json says `{name}` is observing, but its scheme has nothing to try.")
                layer.start_observing(layer.scheme.activation)
            elif group.input_format is not None:
                layer.expect_input(group.input_format)
            skeletons[name] = layer
    replace_modules(model, skeletons)
