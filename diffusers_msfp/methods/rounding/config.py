"""Settings of learned rounding.

300 steps a block lower `eps_rel_l2` of the package's model at `w4a8-wide` by a third in two minutes on one thread;
learning rate, penalty and patience are not tuned.
"""

from dataclasses import asdict, dataclass

from ...errors import ConfigError
from ...sampling.calls import require_positive
from ...schemes import as_patterns

GRANULARITIES = ("block", "layer")


@dataclass(frozen=True)
class RoundingConfig:
    """How weights learn which way to round.

    Args:
        granularity (`str`): `"block"` rounds all layers of a resnet, attention or transformer block together,
            `"layer"` each by itself.
        exclude (`tuple[str, ...]`): patterns of layers that stay as they are.
        num_samples (`int`): calibration examples, each one call of the denoiser for one sample at one timestep. They
            are of `batch_size` trajectories as long as these have steps enough, then of others.
        num_inference_steps (`int`): of the teacher's trajectories.
        iterations (`int`): optimizer steps of each part, at most.
        batch_size (`int`): examples of a step.
        learning_rate (`float`): of the logits, Adam.
        penalty (`float`): weight of the mean regulariser, beside a loss that is 1 for nearest rounding.
        scale_aware (`bool`): see `SoftRounding`.
        patience (`int`): evaluations without a better hardened weight after which a part is finished; there are ten
            evaluations in `iterations`, so that 10 stops none early.
        memory_mb (`int`): for a part's stored inputs and targets; larger ones take fewer examples.
        seed (`int`): of noise and batches.

    Raises:
        ConfigError: a value that makes no sense.

    Example:
        >>> RoundingConfig(granularity="layer").granularity
        'layer'
    """

    granularity: str = "block"
    exclude: tuple[str, ...] = ()
    num_samples: int = 256
    num_inference_steps: int = 20
    iterations: int = 300
    batch_size: int = 16
    learning_rate: float = 0.03
    penalty: float = 0.1
    scale_aware: bool = True
    patience: int = 10
    memory_mb: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", as_patterns(self.exclude))
        counts = ("num_samples", "num_inference_steps", "iterations", "batch_size", "patience", "memory_mb")
        require_positive(**{name: getattr(self, name) for name in counts})
        if self.granularity not in GRANULARITIES:
            raise ConfigError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, but got {self.granularity!r}.")
        for name in ("learning_rate", "penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"`{name}` must be finite and ≥ 0, but got {getattr(self, name)}.")

    def to_dict(self) -> dict:
        """In types that JSON knows."""
        return asdict(self) | {"exclude": list(self.exclude)}
