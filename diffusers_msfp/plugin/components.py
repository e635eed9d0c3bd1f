"""Which components a pipeline has, as its index says."""

import diffusers

from ..compat import diffusers as loading


def class_named(entry: object) -> type | None:
    """The class that a pipeline's index names for a component, `[library, name]`; None where it cannot be told."""
    library, name = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    found = getattr(diffusers, name, None) if library == "diffusers" and isinstance(name, str) else None
    return found if isinstance(found, type) else None


def components_being_loaded() -> dict[str, type | None] | None:
    """Name and class of the components of the pipeline that is being loaded; None where that cannot be told."""
    entries = loading.components_being_loaded()
    return None if entries is None else {name: class_named(entry) for name, entry in entries.items()}
