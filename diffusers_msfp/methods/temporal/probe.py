"""The full-precision model's temporal information block, found and computed along the teacher's own sampler."""

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from ...compat.torch import tensors_of, tree_map
from ...sampling.denoisers import denoiser_of
from ...sampling.timestep import Timestep, timestep_argument
from ...sampling.trajectory import DenoisingStep, rollout
from . import BlockLayer, TemporalBlock, find_block, find_upstream, root_inputs


class TemporalProbe:
    """A float pipeline's block, and what it gives at any timestep.

    Args:
        teacher (`DiffusionPipeline`): full precision; sampled once.
        names (`Collection[str]`): layers of its denoiser that may belong to the block; others than linears do not.
        make_arguments (`Callable`): see `call_arguments`.
        seed (`int`): of the sample.

    Attributes:
        timesteps (`Tensor`, `(S,)`, float32): the sampler's finite set as its denoiser gets it, ascending.
        block (`TemporalBlock`): empty where no layer depends on the timestep alone.
        upstream (`tuple[str, ...]`): other modules with tensors that depend on the timestep alone.
        weights (`dict[str, Tensor]`): of its layers, float32.
    """

    def __init__(
        self, teacher: DiffusionPipeline, names: Collection[str], make_arguments: Callable, seed: int = 0
    ) -> None:
        self.model = denoiser_of(teacher)
        self._timestep = timestep_argument(self.model)
        steps = {step.timesteps[0].float().item(): step for step in rollout(teacher, make_arguments, 0, 1, seed)}
        self.timesteps = torch.tensor(sorted(steps), dtype=torch.float32, device="cpu")
        first, last = steps[float(self.timesteps[0])], steps[float(self.timesteps[-1])]
        self._step = last
        if len(steps) == 1:  # a sampler of one step: what depends on the timestep is told from another one
            args, kwargs = self.arguments_at(_other(float(self.timesteps[0])))
            first = DenoisingStep(last.timesteps, args, kwargs, last.output)
        modules = dict(self.model.named_modules())
        linears = {name: modules[name] for name in names if isinstance(modules.get(name), nn.Linear)}
        generator = torch.Generator().manual_seed(seed)
        calls = [self._call(step.args, step.kwargs) for step in (first, last)]
        varied = [self._call(*self._vary(step, generator)) for step in (first, last)]
        self.block: TemporalBlock = find_block(linears, calls, varied)
        others = {name: each for name, each in modules.items() if name not in names and tensors_of(each)}
        self.upstream = find_upstream(others, calls, varied)
        self._layers = {name: linears[name] for name in self.block.names}
        self.weights = {name: layer.weight.detach().to(torch.float32) for name, layer in self._layers.items()}

    def _call(self, args: tuple, kwargs: dict) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return self.model(*args, **kwargs)

        return call

    def _vary(self, step: DenoisingStep, generator: torch.Generator) -> tuple[tuple, dict]:
        """The same timestep with other samples, prompts, labels and conditions, all of them valid."""

        def other(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.is_floating_point():
                noise = torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf)
                return leaf + noise * (1 + leaf.abs().mean())
            return leaf if leaf.dtype == torch.bool else (leaf == 0).to(leaf.dtype)

        args, kwargs = tree_map(other, (step.args, step.kwargs))
        return self._timestep.put(args, kwargs, cast(Timestep, self._timestep.of(step.args, step.kwargs)))

    def arguments_at(self, timestep: float) -> tuple[tuple, dict]:
        """Arguments of a call of the denoiser at a timestep."""
        step = self._step
        own = self._timestep.of(step.args, step.kwargs)
        other: Timestep = timestep
        if isinstance(own, Tensor):
            whole = own.is_floating_point() or timestep == int(timestep)
            other = torch.full_like(own, timestep, dtype=own.dtype if whole else torch.float32)
        return self._timestep.put(step.args, step.kwargs, other)

    def roots(self, timesteps: Tensor) -> dict[str, Tensor]:
        """What the block starts from, `(S, in)` float32 for each root."""
        roots = {name: self._layers[name] for name in self.block.roots}
        return root_inputs(roots, [self._call(*self.arguments_at(timestep)) for timestep in timesteps.tolist()])

    @torch.no_grad()
    def features(self, roots: dict[str, Tensor]) -> dict[str, Tensor]:
        """The full-precision outputs of all layers, `(S, out)` float32."""

        def apply(layer: BlockLayer, x: Tensor) -> Tensor:
            bias = self._layers[layer.name].bias
            return F.linear(x, self.weights[layer.name], None if bias is None else bias.to(torch.float32))

        return self.block.run(roots, apply)


def _other(timestep: float) -> float:
    """A timestep of the same kind, nearer to the image."""
    half = timestep / 2
    return 1.0 if not timestep else float(int(half)) if timestep == int(timestep) else half
