"""A bounded sample of everything that passed one place of a network.

A run may show a layer billions of values. Kept are their exact range and a uniform sample of fixed size (reservoir
sampling, Vitter 1985, algorithm R), drawn by a generator that is seeded from the place's name and the number of values
seen so far. So the result depends on the data alone, memory does not grow, and a stored observation can go on.
"""

import threading
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..numerics.rounding import check_finite

CAPACITY = 2**17
DRAWN_PER_CALL = 2**13
_LOCK = threading.Lock()  # threads may run one model at once


@dataclass
class Observation:
    """What has been seen at one place; its tensors live on the CPU and are updated in place.

    Args:
        sample (`Tensor`, `(CAPACITY,)`, float32): the first `min(count, CAPACITY)` are drawn uniformly.
        count (`Tensor`, `()`, int64): values offered to the sample.
        range (`Tensor`, `(2,)`, float32): smallest and largest of *all* values.
    """

    sample: Tensor = field(default_factory=lambda: torch.zeros(CAPACITY, dtype=torch.float32, device="cpu"))
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu"))
    range: Tensor = field(
        default_factory=lambda: torch.tensor([torch.inf, -torch.inf], dtype=torch.float32, device="cpu")
    )

    def drawn(self) -> Tensor:
        """The valid part of the sample, float32."""
        return self.sample[: min(int(self.count), CAPACITY)]

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest of all values; they are no part of the sample, where they would weigh far too much."""
        low, high = self.range.tolist()
        return low, high


def observe(observation: Observation, x: Tensor, module_name: str) -> None:
    """Take the values of one call into the observation; also inside compiled models.

    Args:
        x (`Tensor`, any shape, float32/bfloat16/float16): finite values; an empty tensor changes nothing.
        module_name (`str`): name of the layer, for messages and as part of the seed.

    Raises:
        NonFiniteError: `x` holds NaN or infinity.
    """
    _observe(x.detach(), observation.sample, observation.count, observation.range, module_name)


@torch.library.custom_op("msfp::observe", mutates_args=("sample", "count", "seen_range"))
def _observe(x: Tensor, sample: Tensor, count: Tensor, seen_range: Tensor, module_name: str) -> None:
    if x.numel() == 0:
        return
    check_finite(x, f"The input of layer `{module_name}`")
    with _LOCK:
        _take(x, sample, count, seen_range, module_name)


def _take(x: Tensor, sample: Tensor, count: Tensor, seen_range: Tensor, module_name: str) -> None:
    low, high = (end.float().cpu() for end in torch.aminmax(x))
    seen_range[0] = torch.minimum(seen_range[0], low)
    seen_range[1] = torch.maximum(seen_range[1], high)

    seen = int(count)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{module_name}:{seen}".encode()))
    drawn = min(x.numel(), DRAWN_PER_CALL)
    new = x.flatten()
    if drawn < x.numel():  # of few values all are taken: the search would clip extremes that the sample has not got
        new = new[torch.randint(x.numel(), (drawn,), generator=generator, device="cpu").to(x.device)]
    new = new.to("cpu", torch.float32)
    fits = max(0, min(CAPACITY - seen, drawn))
    sample[seen : seen + fits] = new[:fits]
    position = torch.arange(seen + fits, seen + drawn, dtype=torch.float64, device="cpu")  # of the rest in the stream
    slot = (torch.rand(drawn - fits, generator=generator, dtype=torch.float64, device="cpu") * (position + 1)).long()
    kept = slot < CAPACITY
    sample.numpy()[slot[kept].numpy()] = new[fits:][kept].numpy()  # of two in one slot the later wins, unlike in torch
    count.add_(drawn)


@_observe.register_fake
def _(x: Tensor, sample: Tensor, count: Tensor, seen_range: Tensor, module_name: str) -> None:  # noqa: ARG001
    return None
