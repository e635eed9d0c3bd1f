"""Split layers as a checkpoint says them: read from its record, put into a model without weights, found in a model."""

from collections.abc import Mapping, Sequence

from torch import nn

from ...compat.torch import weight_of
from ...errors import CheckpointError, UnsupportedError
from ...layers import SplitLayer
from ...layers.convert import plain_name, replace_module
from ...layers.split import can_split, is_complete, split_layer

Split = Mapping[str, Sequence[int]]
"""Split layer → input channels of each part; `split` in a checkpoint's record."""


def read_split(record: object) -> Split:
    """Read a record.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(record, Mapping):
        raise CheckpointError(f"`split` in config.json must map layers to sizes, but got {record!r}: damaged file.")
    return dict(record)


def split_of(model: nn.Module) -> Split | None:
    """The layers of a model that are split; None where none is."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, SplitLayer))
    return {plain_name(name): list(layer.sizes) for name, layer in layers} or None


def split_skeleton(model: nn.Module, split: Split) -> None:
    """Split float layers of a model without weights.

    Raises:
        CheckpointError: a layer that the model does not have, or sizes that do not fit it.
    """
    for name, sizes in split.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        counted = isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes) and sizes
        if layer is None or not can_split(layer) or not counted or sum(sizes) != weight_of(layer).shape[1]:
            raise CheckpointError(
                f"config.json says that `{name}` of {type(model).__name__} is split into {sizes!r} input channels, but "
                f"it cannot be: not its checkpoint."
            )
        replace_module(model, name, split_layer(layer, sizes, name))


def require_complete(model: nn.Module) -> None:
    """Refuse parts that cannot be joined.

    Raises:
        UnsupportedError: users' adapters on a part of a split layer alone.
    """
    for name, module in model.named_modules():
        if isinstance(module, SplitLayer) and not is_complete(module):
            raise UnsupportedError(
                f"`{name}` is split, and its parts cannot be joined with adapters on one of them: unload these first."
            )
