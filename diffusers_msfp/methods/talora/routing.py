"""Which adapter a call uses: a table over timesteps, looked up once per call of the model.

The table is a plain buffer that is saved with the model.
"""

import torch
from torch import Tensor, nn

from ...compat.torch import assert_later
from ...errors import CheckpointError, ConfigError
from ...numerics.route import ByTimestep, Route, Timestep
from ..routes import ROUTER
from .plan import AdapterPlan


class RoutingTable(ByTimestep, nn.Module):
    """Timestep → adapter, after training.

    Args:
        table (`Tensor`, `(groups, T)`, uint8): adapter of each layer group at each timestep 0 … T - 1.
        num_adapters (`int`): how many there are.

    Raises:
        CheckpointError: a table of another shape or dtype, or one that names an adapter that does not exist.
    """

    module_name = ROUTER
    table: Tensor
    plan: AdapterPlan
    base_correction: nn.Module | None = None
    """That of the output, fitted without these adapters: no part of the model while they are on it."""

    def __init__(self, table: Tensor, num_adapters: int) -> None:
        super().__init__()
        self.num_adapters, self.scale, self.enabled = num_adapters, 1.0, True
        self.register_buffer("table", table)
        self.forget()
        self.check()

    def check(self, name: str = ROUTER) -> None:  # noqa: ARG002
        """Refuse a table that no training could have written."""
        table = self.table
        if table.dtype != torch.uint8 or table.ndim != 2 or not table.numel():
            raise CheckpointError(
                f"A router's table must be uint8 of shape (groups, timesteps), but got {table.dtype} of shape "
                f"{tuple(table.shape)}: damaged file."
            )
        if not table.is_meta and int(table.max()) >= self.num_adapters:
            raise CheckpointError(
                f"A router's table must name adapters below {self.num_adapters}, but got {int(table.max())}: damaged "
                f"file."
            )

    @property
    def strength(self) -> float:
        """Factor of what adapters beside the weights add; 0 while they are disabled."""
        return self.scale if self.enabled else 0.0

    @property
    def num_timesteps(self) -> int:
        """Length T of the table."""
        return self.table.shape[1]

    def lookup(self, timestep: Timestep) -> list[Route]:
        """The route of each layer group.

        Args:
            timestep (`int`, `float` or `Tensor` of shape `()`, `(1,)` or `(B,)`): continuous ones take the nearest.

        Raises:
            ConfigError: a timestep more than one step outside the table.
        """
        if torch.compiler.is_compiling():
            wanted = torch.as_tensor(timestep, device=self.table.device).reshape(-1)
            assert_later(self._inside(wanted), "A timestep lies outside the router's table.")
            index = self.table.index_select(1, self._nearest(wanted)).to(torch.int64)  # (groups, B)
            return [Route(row.reshape(()) if row.numel() == 1 else row) for row in index]
        wanted = torch.as_tensor(timestep, device="cpu").detach().reshape(-1)
        if not bool(self._inside(wanted)):
            raise ConfigError(
                f"Timesteps must lie within 0 … {self.num_timesteps - 1}, where this router was trained, but got "
                f"{wanted.tolist()}. Use a scheduler with as many training timesteps."
            )
        if bool((wanted == wanted[0]).all()):
            wanted = wanted[:1]
        index = self.table.index_select(1, self._nearest(wanted).to(self.table.device)).to(torch.int64)
        if index.shape[1] > 1:
            return [Route(row) for row in index]
        return [Route(row[0], uniform=value) for row, value in zip(index, index[:, 0].tolist(), strict=True)]

    def _inside(self, timestep: Tensor) -> Tensor:
        return ((timestep >= -1) & (timestep <= self.num_timesteps)).all()

    def _nearest(self, timestep: Tensor) -> Tensor:
        return timestep.to(torch.float64).round().to(torch.int64).clamp(0, self.num_timesteps - 1)

    def usage(self) -> list[list[float]]:
        """Share of the timesteps that each adapter serves, for each layer group: `[group][adapter]`, sums to 1."""
        return [
            (torch.bincount(row.long(), minlength=self.num_adapters) / len(row)).tolist() for row in self.table.cpu()
        ]

    def intervals(self) -> list[list[tuple[int, int, int]]]:
        """The table as runs of equal entries: `[group][(first timestep, last timestep, adapter), …]`."""
        result = []
        for row in self.table.cpu().tolist():
            starts = [0, *(t for t in range(1, len(row)) if row[t] != row[t - 1]), len(row)]
            result.append([(a, b - 1, row[a]) for a, b in zip(starts, starts[1:], strict=False)])
        return result
