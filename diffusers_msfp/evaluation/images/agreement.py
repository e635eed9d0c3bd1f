"""Whether a classifier takes the pictures of a conditional pipeline for what was asked."""

import re
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...compat.diffusers import labels_by_name
from .distances import Estimate, mean_of
from .features import FeatureNetwork, Features
from .samples import arguments_of


def asked_classes(
    pipe: DiffusionPipeline,
    network: FeatureNetwork | None,
    *,
    num_samples: int,
    seed: int,
    prompts: list[str] | None,
    arguments: dict,
) -> tuple[Tensor | None, str | None]:
    """Which of the classifier's classes each picture of `draw_pictures` was asked to be.

    Labels are matched by the pipeline's names for them (`DiTPipeline`'s `id2label`), prompts by the one class that they
    name as a word of its own. Nothing is guessed: where one of them does not say a class, there is no figure.

    Args:
        pipe (`DiffusionPipeline`): conditional or not.
        network (`FeatureNetwork`): names its logits in `classes`.
        num, seed, prompts, arguments: of `draw_pictures`.

    Returns:
        `Tensor`, `(num_samples,)`, int64, or None; and why there is none, unless nothing was asked.
    """
    classes = [name.lower() for name in getattr(network, "classes", ())]
    asked = arguments_of(pipe, num_samples, seed, prompts, arguments)
    if "prompt" not in asked and "class_labels" not in asked:
        return None, None
    if not classes:
        return None, "these features do not name classes"
    kind = "prompt" if "prompt" in asked else "class_labels"
    if kind in arguments:
        return None, f"`{kind}` came for each call, not for each picture"
    if kind == "prompt":
        named = {text: _named_in(text, classes) for text in set(asked[kind])}
    else:
        names = labels_by_name(pipe)
        named = {label: [] for label in set(asked[kind])}
        for name, label in names.items():
            if label in named and name.lower() in classes:
                named[label].append(classes.index(name.lower()))
    silent = [str(wanted) for wanted, found in named.items() if len(found) != 1]
    if silent:
        what = "prompts" if kind == "prompt" else "labels"
        return None, f"{len(silent)} of {len(named)} {what} do not name one class of these features: {min(silent)}"
    return torch.tensor([named[wanted][0] for wanted in asked[kind]]), None


def _named_in(text: str, classes: list[str]) -> list[int]:
    words = re.findall(r"\w+", text.lower())
    return [i for i, name in enumerate(classes) if name in words]


def class_agreement(
    pipe: DiffusionPipeline,
    network: FeatureNetwork | None,
    found: Mapping[str, Features],
    *,
    num_samples: int,
    seed: int,
    prompts: list[str] | None,
    arguments: dict,
) -> tuple[dict[str, Estimate], str | None]:
    """Share of pictures whose highest logit is that of the class that was asked.

    Args:
        pipe, network, num, seed, prompts, arguments: as for `asked_classes`.
        found (`Mapping[str, Features]`): of sets of pictures that `draw_pictures` made of these requests.

    Returns:
        `dict`: set → share; empty where it cannot be told. `str` or None: why not; None where nothing was asked.
    """
    asked, reason = asked_classes(
        pipe, network, num_samples=num_samples, seed=seed, prompts=prompts, arguments=arguments
    )
    if asked is None:
        return {}, reason
    logits = {name: features.logits for name, features in found.items() if features.logits is not None}
    if len(logits) < len(found):
        return {}, "these features have no logits"
    return {name: mean_of(each.argmax(1) == asked, seed) for name, each in logits.items()}, None
