"""Arguments of a call that say something of each picture, such as prompts and embeddings: they are taken in turn."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_EMBEDDED = re.compile(
    r"((negative|pooled|generated)_)*((prompt|image)_embeds|((prompt|text|encoder)_)?attention_mask)(_\w+)?"
)
_PICTURES = re.compile(r"(control_|mask_)?image|hint")
_TEXTS = re.compile(r"(negative_)?prompt(_\d)?")


def by_picture(arguments: Mapping[str, Any], parameters: Mapping[str, Any], start: int, size: int) -> dict[str, Any]:
    """Those of a call's arguments that say something of each picture: taken in turn, as prompts are."""
    if arguments.get("prompt") is not None:
        lists = {name for name, parameter in parameters.items() if "list" in str(parameter.annotation).lower()}
        texts = {name: arguments.get(name) for name in sorted(lists) if name != "prompt" and _TEXTS.fullmatch(name)}
        texts = {name: [text] if isinstance(text, str) else text for name, text in texts.items()}
        return {name: in_turn(text, start, size) for name, text in texts.items() if text}
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor | list)}
    rows = {name: value for name, value in given.items() if _EMBEDDED.fullmatch(name)}
    axes = {name: int("llama3" in name) for name in rows}  # HiDream's, of which the first axis is of layers
    counts = {name: _number(value, axes[name]) for name, value in rows.items()}
    own = [counts[name] for kind in ("prompt_embeds", "image_embeds") for name in rows if name.startswith(kind)]
    if own and own[0] > 1 and "controlnet_conditioning_scale" not in parameters:  # of some a list is of networks
        rows |= {name: value for name, value in given.items() if _PICTURES.fullmatch(name)}
    return {
        name: in_turn(value, start, size, axes.get(name, 0))
        for name, value in rows.items()
        if counts.get(name, len(value)) == next(iter(own), 0)
    }


def in_turn(values: Any, start: int, size: int, axis: int = 0) -> Any:
    """Entries of a list, or rows of a tensor on an axis, for so many pictures from one on."""
    order = [(start + i) % _number(values, axis) for i in range(size)]
    if isinstance(values, Tensor):
        return values.index_select(axis, torch.tensor(order, device=values.device))
    return [values[i] for i in order]


def _number(values: Any, axis: int = 0) -> int:
    return values.shape[axis] if isinstance(values, Tensor) else len(values)
