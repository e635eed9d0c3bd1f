"""What a method is to the rest of the package, and the registry of all methods.

Recipes, loading, saving, calibration, `dequantize` and `inspect` go through the registry and name no method: a new one
is a folder with a `Method` in it and a line in `methods/__init__.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import CheckpointError, StateError
from ..registry import Registry
from ..results import Result


@dataclass(frozen=True)
class Part:
    """What a method leaves on a model beside weights, and so in a checkpoint.

    Args:
        key (`str`): of its record in `quantization_config`.
        read (`Callable`): `(JSON) -> record`; refuses what no run could have written (`CheckpointError`).
        write (`Callable`): `(record) -> JSON`.
        record_of (`Callable`): `(model) -> record`, None where the model has none of it.
        attach (`Callable`): `(model, record)` makes room in a model without weights, whose layers are quantized.
        reshape (`Callable`, *optional*): `(model, record)` before they are.
        stored (`Mapping[type, tuple[str, ...]]`): kind of module → names of the tensors that a checkpoint keeps of it;
            the module checks them in `check(name)`.
        loaded (`Callable`, *optional*): `(model)` after its weights have been loaded.
        require_float (`Callable`, *optional*): `(model)` refuses a model that cannot become float again.
        require_ranges (`Callable`, *optional*): `(model)` refuses one whose inputs' ranges cannot be observed anew.
        require_whole (`Callable`, *optional*): `(model)` refuses one that would not be the same after loading.
        detach (`Callable`, *optional*): `(model)` takes it off.
        of_ranges (`bool`): whether it belongs to the inputs' ranges and goes when these are observed anew.
        since (`Callable`): `(record) -> int`, the format version that has a place for it; a model that was loaded from
            an older one and has it now is saved as this one.
        describe (`Callable`, *optional*): `(record, tensors) -> dict` for `inspect`, from a checkpoint's small ones.
        forbids_fusing (`str`, *optional*): why nothing can be fused into the weights while it is there, and what to do
            instead; None where `detach` takes it off for that.
    """

    key: str
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]
    record_of: Callable[[nn.Module], Any]
    attach: Callable[[nn.Module, Any], None] | None = None
    reshape: Callable[[nn.Module, Any], None] | None = None
    stored: Mapping[type, tuple[str, ...]] = field(default_factory=dict)
    loaded: Callable[[nn.Module], None] | None = None
    require_float: Callable[[nn.Module], None] | None = None
    require_ranges: Callable[[nn.Module], None] | None = None
    require_whole: Callable[[nn.Module], None] | None = None
    detach: Callable[[nn.Module], None] | None = None
    of_ranges: bool = False
    since: Callable[[Any], int] = lambda _: 1
    describe: Callable[[Any, Mapping], dict] | None = None
    forbids_fusing: str | None = None


@dataclass(frozen=True)
class Method:
    """A way to improve a quantized model with its float original.

    Args:
        name (`str`): as a stage of recipes.
        config (`type`): dataclass of its settings.
        run (`Callable`): `(pipe, teacher, config, *, prompts, …) -> Result`, in place.
        part (`Part`, *optional*): None leaves nothing but other weights.
        forbids (`Mapping[str, str]`): method that must not be on the model yet → what to do instead.
        reports (`bool`): whether `run` takes `on_progress`, see `results.OnProgress`.
        resumes (`bool`): whether `run` takes a `work_dir`.
    """

    name: str
    config: type
    run: Callable[..., Result]
    part: Part | None = None
    forbids: Mapping[str, str] = field(default_factory=dict)
    reports: bool = False
    resumes: bool = True


def read_part(cls: type, key: str, record: object) -> Any:
    """A dataclass from a checkpoint's part; for `Part.read`.

    Args:
        cls (`type`): validates its fields where it is made.
        key (`str`): of the part.
        record (`object`): JSON.

    Raises:
        CheckpointError: fields are missing or unknown, or see the class.
    """
    if not isinstance(record, Mapping):
        raise CheckpointError(f"`{key}` in config.json must be an object, but got {record!r}: damaged file.")
    try:
        return cls(**record)
    except TypeError as error:
        raise CheckpointError(f"`{key}` in config.json is malformed ({error}): damaged file.") from error


CORRECTED = (
    "The output of this model is corrected for the weights that it has, which would change. Take the correction off "
    "first (`uncorrect_output(pipe)`), and fit it again afterwards."
)
"""Why methods that change weights layer by layer forbid a correction before them."""
METHODS: Registry[Method] = Registry("method")
"""Methods by name, in the order in which recipes run them."""


def parts() -> Iterator[Part]:
    """Of all methods that leave something on a model."""
    return (method.part for method in METHODS.values() if method.part is not None)


def require_order(model: nn.Module, name: str) -> None:
    """Refuse a model that a method must not be applied to any more.

    Args:
        name (`str`): of the method.

    Raises:
        StateError: one that it forbids is on the model.
    """
    for other, instead in METHODS[name].forbids.items():
        part = METHODS[other].part
        if part is not None and part.record_of(model) is not None:
            raise StateError(instead)
