"""Recipes as data: which stages follow the search and calibration of `quantize`, in which order, with which settings.

`msfp` is the one to take: it trains weights, biases, norms and scales as they will run, in integers, and leaves nothing
beside them. Of `ptq`, `tfmq`, `rounded` and `full` each adds a stage to the one before; the `split…` ones split
shortcuts first, which pays where they read 4 bits (`bench_baselines.py`). The others are baselines by the same code, as
reconstructed: combined with the `int-…` schemes, they are what their papers do up to sizes and lengths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .registry import Registry


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name (`str`): `"split"`, `"temporal"`, `"rounding"`, `"talora"` or `"correction"`.
        settings (`Mapping`): that differ from the defaults of the stage's config.
    """

    name: str
    settings: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


DEFAULT_RECIPE = "ptq"
RECIPES: Registry[tuple[Stage, ...]] = Registry("recipe")
"""Stages by the recipe's name."""

_SPLIT, _TEMPORAL, _ROUNDING, _TALORA = (Stage(name) for name in ("split", "temporal", "rounding", "talora"))
CORRECTION = Stage("correction")
"""Ends every recipe of 4-bit activations, unless it is left out: `quantize --no-correction`."""
RECIPES.add("ptq", ())
RECIPES.add("tfmq", (_TEMPORAL,))
RECIPES.add("rounded", (_TEMPORAL, _ROUNDING))
RECIPES.add("full", (_TEMPORAL, _ROUNDING, _TALORA))
_WEIGHTS = {"num_adapters": 1, "placement": "merged"}
RECIPES.add("msfp", (Stage("talora", MappingProxyType(_WEIGHTS)),))
RECIPES.add("split", (_SPLIT,))
RECIPES.add("split-rounded", (_SPLIT, _TEMPORAL, _ROUNDING))
RECIPES.add("split-full", (_SPLIT, _TEMPORAL, _ROUNDING, _TALORA))
# Baselines: shortcuts split, AdaRound block by block, then learned activation scales (Q-Diffusion); AdaRound, then
# temporal maintenance with parameters for each timestep in all layers, as TFMQ-DM's code has; activation scales for
# each timestep, learned beside a single merged LoRA (EfficientDM). Layers that stay float are left to the caller.
_PER_STEP = {"fsc": "all", "cache_above": None}
_SCALES_ALONE = {"learning_rate": 0.0, "affine_learning_rate": 0.0}
_ONE_LORA = {"rank": 32, "affine_learning_rate": 0.0}
_PLAIN_LOSS = {"num_adapters": 1, "placement": "merged", "denoising_factor_exponent": 0.0}
_BASELINES = {
    "q-diffusion": (_SPLIT, _ROUNDING, Stage("talora", MappingProxyType(_PLAIN_LOSS | _SCALES_ALONE))),
    "tfmq-dm": (_ROUNDING, Stage("temporal", MappingProxyType(_PER_STEP))),
    "efficientdm": (
        Stage("temporal", MappingProxyType(_PER_STEP | {"iterations": 0})),
        Stage("talora", MappingProxyType(_PLAIN_LOSS | _ONE_LORA)),
    ),
}
for _name, _stages in _BASELINES.items():
    RECIPES.add(_name, _stages)
