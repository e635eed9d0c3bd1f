"""Which adapter a call uses: a table over timesteps, looked up once per call of the model.

The table is a plain buffer that is saved with the model. The route of the running call is kept per thread, so several
threads may use one model at once; layers read it through the table object that they share.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnsupportedError

Timestep = int | float | Tensor


@dataclass(frozen=True)
class Route:
    """The adapter of each sample of a call.

    Args:
        index (`Tensor`, `()` or `(B,)`, int64): adapter of all samples, or of each.
        uniform (`int`, *optional*): the one adapter, where it is known without looking into a tensor; None where the
            samples differ, or while compiling.
    """

    index: Tensor
    uniform: int | None = None

    def apply(self, function: Callable[[Tensor, int | Tensor], Tensor], x: Tensor, num_adapters: int) -> Tensor:
        """`function(x, adapter)` for every sample with its own adapter.

        Args:
            function (`Callable[[Tensor, int | Tensor], Tensor]`): keeps the order of the samples.
            x (`Tensor`, `(B * m, …)`): each sample stands `m` times in a row.
            num_adapters (`int`): how many there are.

        Raises:
            UnsupportedError: the rows of `x` are no whole multiple of the samples.
        """
        if self.uniform is not None:
            return function(x, self.uniform)
        if self.index.ndim == 0:
            return function(x, self.index)
        if x.shape[0] % self.index.shape[0]:
            raise UnsupportedError(
                f"With a timestep of its own for each of {self.index.shape[0]} samples, a layer must see a multiple of "
                f"as many rows, but {x.shape[0]} came. Use one timestep per call for this model."
            )
        index = self.index.repeat_interleave(x.shape[0] // self.index.shape[0])
        if torch.compiler.is_compiling():  # no shapes that depend on values: compute all, keep one
            result = function(x, 0)
            for adapter in range(1, num_adapters):
                chosen = (index == adapter).view(-1, *[1] * (result.ndim - 1))
                result = torch.where(chosen, function(x, adapter), result)
            return result
        result = None
        for adapter in index.unique().tolist():
            rows = (index == adapter).nonzero().flatten()
            part = function(x[rows], adapter)
            result = part.new_empty(x.shape[0], *part.shape[1:]) if result is None else result
            result[rows] = part
        return result


class RoutingTable(nn.Module):
    """Timestep → adapter, after training.

    Args:
        table (`Tensor`, `(groups, T)`, uint8): adapter of each layer group at each timestep 0 … T - 1.
        num_adapters (`int`): how many there are.

    Raises:
        CheckpointError: a table of another shape or dtype, or one that names an adapter that does not exist.
    """

    def __init__(self, table: Tensor, num_adapters: int) -> None:
        super().__init__()
        self.num_adapters, self.scale, self.enabled = num_adapters, 1.0, True
        self.register_buffer("table", table)
        self._running, self._latest = threading.local(), None
        self.check()

    def check(self) -> None:
        """Refuse a table that no training could have written."""
        table = self.table
        if table.dtype != torch.uint8 or table.ndim != 2 or not table.numel():
            raise CheckpointError(
                f"A router's table must be uint8 of shape (groups, timesteps), but {table.dtype} of shape "
                f"{tuple(table.shape)} came: damaged file."
            )
        if not table.is_meta and int(table.max()) >= self.num_adapters:
            raise CheckpointError(
                f"A router's table must name adapters below {self.num_adapters}, but {int(table.max())} came: damaged "
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
            torch._assert_async(self._inside(wanted), "A timestep lies outside the router's table.")
            index = self.table.index_select(1, self._nearest(wanted)).to(torch.int64)  # (groups, B)
            return [Route(row.reshape(()) if row.numel() == 1 else row) for row in index]
        wanted = torch.as_tensor(timestep).detach().reshape(-1).to("cpu")
        if not bool(self._inside(wanted)):
            raise ConfigError(
                f"Timesteps must lie within 0 … {self.num_timesteps - 1}, where this router was trained, but "
                f"{wanted.tolist()} came. Use a scheduler with as many training timesteps."
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

    def enter(self, timestep: Timestep) -> None:
        """Use the adapters of this timestep from now on, in this thread."""
        self._running.routes = self.lookup(timestep)
        if not torch.compiler.is_compiling():
            self._latest = self._running.routes

    @contextmanager
    def at(self, timestep: Timestep) -> Iterator[None]:
        """Use the adapters of this timestep for layers that are called alone."""
        before, latest = getattr(self._running, "routes", None), self._latest
        self.enter(timestep)
        try:
            yield
        finally:
            self._running.routes, self._latest = before, latest

    def route(self, group: int) -> Route:
        """The route of this thread's latest call for a layer group.

        A thread that has made none, such as autograd's when it recomputes activations, uses the latest of all.

        Raises:
            UnsupportedError: the model was never called.
        """
        routes = getattr(self._running, "routes", None) or self._latest
        if routes is None:
            raise UnsupportedError(
                "A layer with timestep-aware adapters must know the timestep. Call the whole model, or the layer "
                "within `with model.timestep_router.at(timestep):`."
            )
        return routes[group]

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

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_running", "_latest")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._running, self._latest = threading.local(), None
