"""Settings of a fine-tuning run, and what changes over its course."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ...errors import ConfigError
from ...results import Result
from ...sampling.calls import require_positive
from ...schemes import as_patterns
from . import PLACEMENTS
from .plan import MAX_ADAPTERS, READS

DEFAULT_UPDATES = 2000
KEEPING = ("checkpoint_seconds", "preview_every", "preview_seconds")
WARM_UP = 20  # updates over which the learning rates rise


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune. The defaults are ours, measured on the package's model; those of the paper were not found.

    Args:
        num_adapters (`int`): of each layer; 1 is a single LoRA (EfficientDM), without a router.
        rank (`int`, *optional*): largest rank; a layer gets at most half of its smaller channel count. 8
            beside the weights; merged adapters, whose rank costs nothing at run time, update the whole weight by
            default, which is 0.
        placement (`str`): `"side"`, low-rank adapters beside one packed weight, which can be scaled, disabled and
            exported; or `"merged"`, updated weights, packed, at no cost at run time (the recipe `msfp`, with one).
        reads (`str`, *optional*): what adapters beside the weights read: the layer's quantized input, `"codes"` (3 to
            10 % of a step), or its `"float"` input; codes by default.
        router_groups (`tuple[str, ...]`): glob patterns of layer groups that choose on their own.
        num_inference_steps (`int`): of the trajectories.
        batch_size (`int`): samples of a batch, over all processes, each at a timestep of its own.
        gradient_accumulation_steps (`int`): batches per update.
        train_steps (`int`, *optional*): updates; 2000 if `minutes` is not given either.
        minutes (`float`, *optional*): instead, as many updates as fit, measured over the first ones.
        learning_rate (`float`, *optional*): peak of the adapters, in steps of their layer's weight grid per update; 0.1
            for low-rank ones, 0.02 for the whole weight.
        activation_learning_rate (`float`): peak of the logarithm of activation scales, and of zero points relative to
            them.
        affine_learning_rate (`float`): peak of biases, norms and the logarithm of weight scales, which learn with
            merged adapters.
        router_learning_rate (`float`): peak of the router. All with AdamW and linear decay.
        weight_decay (`float`): of the adapters.
        denoising_factor_exponent (`float`): 1 weighs the loss by the denoising factor (DFA), 0 does not.
        denoising_factor_floor (`float`): smallest factor as a share of the mean; it protects the last step, and costs
            pictures more.
        balance (`float`): weight of the router's load-balance loss.
        exploration (`float`): scale of the Gumbel noise on the router's choice, gone after half of the updates.
        ema_decay (`float`): of an exponential moving average that takes the adapters' place at the end; 0 is none.
        mixed_precision (`str`): `"no"` or `"bf16"`.
        gradient_checkpointing (`bool`): recompute activations instead of keeping them.
        blockwise (`bool`): train block after block, for models whose activations do not fit.
        checkpoint_every (`int`): updates between checkpoints, at most.
        checkpoint_seconds (`float`): seconds between checkpoints, at most; 0 goes by updates alone.
        preview_every (`int`): updates between preview pictures; 0 is none at all, else there are some at the end too.
        preview_seconds (`float`): seconds between preview pictures, or as many as keep them below a tenth of the time;
            0 goes by updates alone.
        seed (`int`): of everything.

    Raises:
        ConfigError: a value that makes no sense.

    Example:
        >>> FinetuneConfig(minutes=10, placement="merged").num_adapters
        2
    """

    num_adapters: int = 2
    rank: int | None = None
    placement: str = "side"
    reads: str | None = None
    router_groups: tuple[str, ...] = ()
    num_inference_steps: int = 20
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    train_steps: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    activation_learning_rate: float = 5e-3
    affine_learning_rate: float = 1e-3
    router_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    denoising_factor_exponent: float = 1.0
    denoising_factor_floor: float = 0.0
    balance: float = 0.01
    exploration: float = 0.0
    ema_decay: float = 0.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    blockwise: bool = False
    checkpoint_every: int = 100
    checkpoint_seconds: float = 30.0
    preview_every: int = 200
    preview_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "router_groups", as_patterns(self.router_groups))
        if self.rank is None:
            object.__setattr__(self, "rank", 0 if self.placement == "merged" else 8)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 0.1 if self.rank else 0.02)
        if self.reads is None and self.placement == "side":
            object.__setattr__(self, "reads", "codes")
        if self.rank == 0 and self.placement == "side":
            raise ConfigError("Adapters beside the weights need a `rank` of at least 1, but got 0.")
        counts = ("num_adapters", "num_inference_steps", "batch_size", "gradient_accumulation_steps")
        require_positive(**{name: getattr(self, name) for name in (*counts, "checkpoint_every")})
        if self.train_steps is not None and self.minutes is not None:
            raise ConfigError("`train_steps` and `minutes` exclude each other, but got both.")
        if self.train_steps is not None:
            require_positive(train_steps=self.train_steps)
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"`minutes` must be a number above 0, but got {self.minutes}.")
        if self.num_adapters > MAX_ADAPTERS:
            raise ConfigError(f"`num_adapters` must be at most {MAX_ADAPTERS}, but got {self.num_adapters}.")
        choices_of = {"placement": PLACEMENTS, "reads": (*READS, None), "mixed_precision": ("no", "bf16")}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                names = ", ".join(filter(None, choices))
                raise ConfigError(f"`{name}` must be one of {names}, but got {getattr(self, name)!r}.")
        if self.reads is not None and self.placement != "side":
            raise ConfigError(
                f"`reads` is for adapters beside the weights, but got {self.reads!r} with "
                f"`placement={self.placement!r}`. Leave it out: merged ones read what the weights do."
            )
        if self.rank:
            require_positive(rank=self.rank)
        rates = (
            "learning_rate",
            "activation_learning_rate",
            "affine_learning_rate",
            "router_learning_rate",
            "weight_decay",
            "balance",
        )
        for name in (*rates, "exploration", "denoising_factor_exponent", "denoising_factor_floor", *KEEPING):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"`{name}` must be finite and ≥ 0, but got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"`ema_decay` must lie in [0, 1), but got {self.ema_decay}.")

    def to_dict(self) -> dict:
        """In types that JSON knows."""
        return asdict(self) | {"router_groups": list(self.router_groups)}


def learning_rate_factor(update: int, total: int) -> float:
    """Linear warm-up, of at most a quarter of all updates, then linear decay to 0 at `total`."""
    warm_up = min(WARM_UP, max(1, total // 4))
    return min(1.0, (update + 1) / warm_up) * max(0.0, 1 - update / max(1, total))


def exploration_factor(update: int, total: int) -> float:
    """From 1 down to 0 in the first half."""
    return max(0.0, 1 - 2 * update / max(1, total))


class Turn(NamedTuple):
    """Whose turn it is: a block's, or the whole model's, with the updates of it that are over and all of them."""

    block: str | None
    update: int
    total: int


def turn_at(blocks: dict[str, int], update: int, total: int) -> Turn:
    """Blocks have their turns in order, each with a share of the updates by its number of layers."""
    begin, layers, whole = 0, 0, sum(blocks.values())
    for name, number in blocks.items():
        layers += number
        end = math.ceil(layers * total / whole)
        if update < end or layers == whole:
            return Turn(name, update - begin, max(1, end - begin))
        begin = end
    return Turn(None, update, total)


def example_seed(seed: int, example: int) -> int:
    """A seed for the noise of one example."""
    return random.Random(f"{seed}:{example}").getrandbits(63)


@dataclass(frozen=True, kw_only=True)
class Finetuned(Result):
    """What became of a run of fine-tuning.

    Args:
        updates (`int`): of the optimizer.
        seconds (`float`): of training, over all sessions.
        losses (`Sequence[float]`): of each update.
        usage (`Sequence[Sequence[float]]`): `[group][adapter]`, share of the table's timesteps.
        collapsed (`bool`): one adapter serves all timesteps.
    """

    updates: int
    seconds: float
    losses: Sequence[float]
    usage: Sequence[Sequence[float]]
    collapsed: bool
