"""A bounded sample of everything that passed one place of a network.

A run may show a layer billions of values. Kept are their exact range and a uniform sample of fixed size (reservoir
sampling, Vitter 1985, algorithm R), drawn by a generator that is seeded from the place's name and the number of values
seen so far. So the result depends on the data alone, memory does not grow, and a stored observation can go on.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.rounding import check_finite

CAPACITY = 2**17
DRAWN_PER_CALL = 2**13


@dataclass(frozen=True)
class Observation:
    """What has been seen at one place; its tensors are updated in place.

    Args:
        sample (`Tensor`, `(CAPACITY,)`, float32): the first `min(count, CAPACITY)` entries are valid.
        count (`Tensor`, `()`, int64): values offered to the sample.
        range (`Tensor`, `(2,)`, float32): smallest and largest of *all* values.
    """

    sample: Tensor
    count: Tensor
    range: Tensor

    @classmethod
    def empty(cls, device: torch.device | str | None = None) -> "Observation":
        """Nothing seen yet."""
        return cls(
            torch.zeros(CAPACITY, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.tensor([torch.inf, -torch.inf], device=device),
        )

    def values(self) -> Tensor:
        """The sample together with both ends of the range, float32."""
        if not int(self.count):
            return self.sample[:0]
        return torch.cat([self.sample[: min(int(self.count), CAPACITY)], self.range])


@torch.compiler.disable
def observe(observation: Observation, x: Tensor, place: str) -> None:
    """Take the values of one call into the observation.

    Args:
        x (`Tensor`, any shape, float32/bfloat16/float16): finite values; an empty tensor changes nothing.
        place (`str`): name of the layer, for messages and as part of the seed.

    Raises:
        NonFiniteError: `x` holds NaN or infinity.
    """
    if x.numel() == 0:
        return
    x = x.detach().flatten()
    check_finite(x, f"The input of layer `{place}`")
    low, high = torch.aminmax(x)
    observation.range[0] = torch.minimum(observation.range[0], low)
    observation.range[1] = torch.maximum(observation.range[1], high)

    seen = int(observation.count)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{place}:{seen}".encode()))
    drawn = min(x.numel(), DRAWN_PER_CALL)
    index = torch.randint(x.numel(), (drawn,), generator=generator)
    new = x[index.to(x.device)].to(observation.sample)
    position = torch.arange(seen, seen + drawn)  # each of the drawn values in the stream of all drawn so far
    slot = torch.where(
        position < CAPACITY, position, (torch.rand(drawn, generator=generator, dtype=torch.float64) * position).long()
    )
    kept = slot < CAPACITY
    observation.sample[slot[kept].to(x.device)] = new[kept.to(x.device)]
    observation.count.add_(drawn)
