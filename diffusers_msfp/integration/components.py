"""Which components a pipeline has, as its index says."""

import inspect
from collections.abc import Mapping

import diffusers


def class_named(entry: object) -> type | None:
    """The class that a pipeline's index names for a component, `[library, name]`; None where it cannot be told."""
    library, name = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    found = getattr(diffusers, name, None) if library == "diffusers" and isinstance(name, str) else None
    return found if isinstance(found, type) else None


def components_being_loaded() -> dict[str, type | None] | None:
    """Name and class of the components of the pipeline that is being loaded.

    diffusers asks component by component and never says which there are; its loader's own frame knows. Where that
    frame looks different (another version of diffusers) the answer is None.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "from_pretrained":
        frame = frame.f_back
    components = frame.f_locals.get("init_dict") if frame is not None else None
    return {name: class_named(entry) for name, entry in components.items()} if isinstance(components, Mapping) else None
