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
    """What has been seen at one place.

    Args:
        sample (`Tensor`, `(min(count, CAPACITY),)`, float32): drawn uniformly from the values offered.
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
            torch.zeros(0, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.tensor([torch.inf, -torch.inf], device=device),
        )

    def values(self) -> Tensor:
        """The sample together with both ends of the range, float32."""
        return torch.cat([self.sample, self.range]) if len(self.sample) else self.sample


@torch.compiler.disable
def observe(observation: Observation, x: Tensor, place: str) -> Observation:
    """The observation after one more call.

    Args:
        x (`Tensor`, any shape, float32/bfloat16/float16): finite values; an empty tensor changes nothing.
        place (`str`): name of the layer, for messages and as part of the seed.

    Returns:
        `Observation`: may share tensors with the one given, which is used up.

    Raises:
        NonFiniteError: `x` holds NaN or infinity.
    """
    if x.numel() == 0:
        return observation
    x = x.detach().flatten()
    check_finite(x, f"The input of layer `{place}`")
    low, high = torch.aminmax(x)
    seen_low, seen_high = observation.range
    new_range = torch.stack([torch.minimum(seen_low, low.float()), torch.maximum(seen_high, high.float())])

    seen = int(observation.count)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{place}:{seen}".encode()))
    drawn = min(x.numel(), DRAWN_PER_CALL)
    index = torch.randint(x.numel(), (drawn,), generator=generator)
    new = x[index.to(x.device)].to(torch.float32)
    fits = max(0, min(CAPACITY - seen, drawn))
    sample = torch.cat([observation.sample, new[:fits]])
    position = torch.arange(seen + fits, seen + drawn, dtype=torch.float64)  # of the rest in the stream of all drawn
    slot = (torch.rand(drawn - fits, generator=generator, dtype=torch.float64) * (position + 1)).long()
    kept = slot < CAPACITY
    sample[slot[kept].to(x.device)] = new[fits:][kept.to(x.device)]
    return Observation(sample, observation.count + drawn, new_range)
