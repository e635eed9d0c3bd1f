"""The trainable router: timestep embedding → small MLP → one adapter per timestep and layer group.

As reconstructed from summaries of arXiv 2505.21591; sizes, warm start, noise and load balance are our choice. Without
a warm start one adapter takes nearly all timesteps on the package's model.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compat.torch import weight_of

EMBEDDING = 16
HIDDEN = 64
PERIODS = 4.0  # of the fastest sinusoid over all timesteps: neighbours choose alike
WARM_UP_STEPS = 300
WARM_LOGIT = 2.0  # distance between first and second choice that the warm start aims at


class TimestepRouter(nn.Module):
    """Chooses one of `num_adapters` for every timestep.

    Args:
        num_timesteps (`int`): T, training timesteps of the scheduler.
        num_adapters (`int`): h.
        groups (`int`): layer groups that choose on their own.
        seed (`int`): of the initial weights.
    """

    def __init__(self, num_timesteps: int, num_adapters: int, groups: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.num_timesteps, self.num_adapters, self.groups = num_timesteps, num_adapters, groups
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # that of the CPU alone
            self.mlp = nn.Sequential(
                nn.Linear(EMBEDDING, HIDDEN, dtype=torch.float32),
                nn.SiLU(),
                nn.Linear(HIDDEN, groups * num_adapters, dtype=torch.float32),
            )

    def embed(self, timestep: Tensor) -> Tensor:
        """Sinusoids of the relative timestep; `(B,)` → `(B, EMBEDDING)`."""
        frequency = (
            2 * math.pi * torch.linspace(0.5, PERIODS, EMBEDDING // 2, device=timestep.device, dtype=torch.float32)
        )
        angle = timestep.to(torch.float32)[:, None] / self.num_timesteps * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def logits(self, timestep: Tensor) -> Tensor:
        """`(B,)` → `(B, groups, num_adapters)`."""
        return self.mlp(self.embed(timestep)).unflatten(1, (self.groups, self.num_adapters))

    def forward(self, timestep: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hard choice with a straight-through gradient.

        Args:
            timestep (`Tensor`, `(B,)`).
            noise (`Tensor`, `(B, groups, num_adapters)`, *optional*): added to the logits, for exploration.

        Returns:
            `tuple[Tensor, Tensor]`: the gate, one-hot with the gradient of the probabilities, and the probabilities;
            both `(B, groups, num_adapters)`.
        """
        logits = self.logits(timestep)
        probability = (logits if noise is None else logits + noise).softmax(-1)
        hard = F.one_hot(probability.argmax(-1), self.num_adapters).to(probability.dtype)
        return hard + (probability - probability.detach()), logits.softmax(-1)

    def gumbel(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Noise that turns the most likely choice into a draw; `(batch_size, groups, num_adapters)`."""
        shape = batch_size, self.groups, self.num_adapters
        uniform = torch.rand(shape, generator=generator, device="cpu").clamp(1e-6, 1 - 1e-6)
        return -(-uniform.log()).log()

    def warm_start(self, loads: Mapping[float, float]) -> None:
        """Begin with contiguous ranges of timesteps that carry equal loads.

        Args:
            loads (`Mapping[float, float]`): timestep → load ≥ 0.
        """
        timesteps = sorted(loads, reverse=True)
        load = torch.tensor([loads[t] for t in timesteps], dtype=torch.float64, device="cpu")
        middle = (load.cumsum(0) - load / 2) / load.sum().clamp_min(1e-30)
        share = (middle * self.num_adapters).long().clamp(0, self.num_adapters - 1)
        device = weight_of(self.mlp[0]).device
        wanted = torch.tensor(timesteps, dtype=torch.float32, device=device)
        target = F.one_hot(share, self.num_adapters).float()[:, None].expand(-1, self.groups, -1) * WARM_LOGIT
        optimizer = torch.optim.Adam(self.mlp.parameters(), lr=1e-2)
        for _ in range(WARM_UP_STEPS):
            optimizer.zero_grad()
            F.mse_loss(self.logits(wanted), target.to(device)).backward()
            optimizer.step()
        optimizer.zero_grad()

    def balance_loss(self, timesteps: Tensor) -> Tensor:
        """1 where all adapters are used equally, up to `num_adapters` where one takes all.

        Source:
            Switch Transformer, arXiv 2101.03961, eq. 4.
        """
        gate, probability = self(timesteps)
        return self.num_adapters * (gate.detach().mean(0) * probability.mean(0)).sum(-1).mean()

    @torch.no_grad()
    def table(self, trained: Sequence[float]) -> Tensor:
        """What is deployed: `(groups, T)`, uint8.

        Args:
            trained (`Sequence[float]`): timesteps of training; each other one takes the choice of the nearest of them.
        """
        device = weight_of(self.mlp[0]).device
        known = torch.tensor(sorted(set(trained)), dtype=torch.float32, device=device)
        distance = (torch.arange(self.num_timesteps, device=device)[:, None] - known).abs()
        return self.logits(known).argmax(-1)[distance.argmin(1)].T.to(torch.uint8).contiguous()
