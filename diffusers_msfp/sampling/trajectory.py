"""The teacher's own trajectories: what the full-precision denoiser is called with, and what it answers.

No data are needed: a pipeline samples from noise, and each call of its denoiser becomes a training example. So prompts,
labels, guidance and any sampler are those of the pipeline. Each sample has a generator of its own, seeded by its
number: how samples are shared out among processes changes nothing.

A training batch holds all samples of a rollout, each at another step: better, per update, than one timestep for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..compat.torch import tree_flatten, tree_map, tree_unflatten
from ..errors import ConfigError
from .calls import quiet
from .denoisers import denoiser_name, denoiser_of, model_output, scheduler_of
from .denoising_factor import RunFactors
from .timestep import TimestepArgument, require_timesteps, timestep_argument
from .used_output import Index, after_calls, fresh, place_of, sample_of, used_index, watching_samples


@dataclass(frozen=True)
class DenoisingStep:
    """One call of the teacher, R rows.

    Args:
        timesteps (`Tensor`, `(R,)`): of its rows.
        args (`tuple`), kwargs (`dict`): of the call.
        output (`Tensor`, `(R, …)`): what the teacher predicts, without variances that it may put out beside it, and
            without what its pipeline throws away.
        used (`Index`): where that stands in what the teacher puts out.
    """

    timesteps: Tensor
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor
    used: Index = ()

    def rows(self, order: Tensor) -> "DenoisingStep":
        """The same call with its rows in another order."""
        is_list = _lists_of_samples(self.args, self.kwargs, len(order))

        def arrange(leaf: Any) -> Any:
            if is_list(leaf):
                return [leaf[row] for row in order]
            return leaf[order] if _has_rows(leaf, len(order)) else leaf

        args, kwargs = tree_map(arrange, (self.args, self.kwargs), is_leaf=is_list)
        return DenoisingStep(arrange(self.timesteps), args, kwargs, arrange(self.output), self.used)

    @property
    def is_by_row(self) -> bool:
        """Whether each tensor of the call has an entry for each row, so that others can be told from these."""
        number = len(self.timesteps)
        is_list = _lists_of_samples(self.args, self.kwargs, number)
        leaves, _ = tree_flatten((self.args, self.kwargs), is_leaf=is_list)
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        return all(_has_rows(leaf, number) for leaf in read)

    def run(self, model: nn.Module) -> Any:
        """What a model gives in this call; it may take the lists among its arguments apart."""
        args, kwargs = fresh((self.args, self.kwargs))
        return model(*args, **kwargs)

    def counted(self, output: Tensor) -> Tensor:
        """What counts of a model's output in this call, as `output` has it of the teacher's."""
        return output[self.used] if self.used else output


def _has_rows(leaf: Any, number: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == number


def _lists_of_samples(args: tuple, kwargs: dict, rows: int) -> Callable[[Any], bool]:
    """What tells lists with a tensor for each sample from those of features that have rows themselves.

    Where a model reads its samples as a list, as Z-Image does, all its lists of so many tensors are of samples.
    """

    def of_rows(value: Any) -> bool:
        return isinstance(value, list) and len(value) == rows and all(isinstance(each, Tensor) for each in value)

    return of_rows if of_rows(next(iter((*args, *kwargs.values())), None)) else lambda _value: False


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and (not isinstance(a, int | float | str) or a == b)


def rollout(
    pipe: DiffusionPipeline,
    make_arguments: Callable,
    first: int,
    size: int,
    seed: int,
    factors: RunFactors | None = None,
) -> list[DenoisingStep]:
    """Sample `size` trajectories and keep every call of the denoiser.

    Args:
        pipe (`DiffusionPipeline`): the teacher.
        make_arguments (`Callable`): see `call_arguments`.
        first (`int`): number of the first sample.
        size (`int`): samples at once.
        seed (`int`): sample i is drawn with seed + i.
        factors (`RunFactors`, *optional*): of the sampler, taken on the way.

    Raises:
        UnsupportedError: the denoiser takes no timestep.
        ConfigError: the pipeline never calls it.
    """
    denoiser = denoiser_of(pipe)
    argument = require_timesteps(denoiser)
    steps: list[DenoisingStep] = []
    done = 0

    def keep(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if factors is not None:
            factors.look()
        answer = model_output(output)
        used = used_index(pipe, answer, args, kwargs)
        predicted = answer[used]
        timesteps = torch.as_tensor(argument.of(args, kwargs), device=predicted.device).flatten()
        sample = sample_of(args, kwargs)  # cloned: some pipelines step in place
        args, kwargs = tree_map(lambda leaf: leaf.clone() if leaf is sample else leaf, (args, kwargs))
        steps.append(DenoisingStep(timesteps.expand(len(predicted)), args, kwargs, predicted.clone(), used))

    def cut(sample: Tensor) -> None:
        nonlocal done
        for number in range(done, len(steps)):
            step = steps[number]
            if place := place_of(sample, sample_of(step.args, step.kwargs), step.output):
                steps[number] = replace(step, output=step.output[place].clone(), used=place)
        done = len(steps)

    generators = [torch.Generator().manual_seed(seed + first + i) for i in range(size)]
    with after_calls(denoiser, keep), watching_samples(scheduler_of(pipe), cut), quiet(pipe), torch.no_grad():
        make_arguments(first, size, generators if size > 1 else generators[0]).run(pipe)
    if not steps:
        raise ConfigError(
            f"{type(pipe).__name__} must call its `{denoiser_name(pipe)}` to show how it works, but never does with "
            f"these arguments and this number of steps."
        )
    return steps


def _unmixable(why: str) -> ConfigError:
    what = f"Steps of a trajectory are mixed sample by sample, but this pipeline calls its denoiser with {why}"
    return ConfigError(f"{what}: with these arguments it cannot be a teacher.")


def mix(steps: list[DenoisingStep], choice: list[int], argument: TimestepArgument) -> DenoisingStep:
    """One call in which each row comes from a step of its own.

    Args:
        steps (`list[DenoisingStep]`): of one rollout.
        choice (`list[int]`): for each row, which step.
        argument (`TimestepArgument`): where the model takes its timestep.

    Raises:
        ConfigError: calls that differ in something without rows, in shapes, or in what is given at all.
    """

    def pick(parts: list) -> Any:
        if all(part is parts[0] for part in parts):
            return parts[0]
        if is_list(parts[0]):
            return [parts[step][row] for row, step in enumerate(choice)]
        if not _has_rows(parts[0], len(choice)):
            if not all(_equal(part, parts[0]) for part in parts):
                raise _unmixable("something that has no entry for each sample and changes from step to step")
            return parts[0]
        rows = [parts[step][row] for row, step in enumerate(choice)]
        if len({row.shape for row in rows}) > 1:
            raise _unmixable("tensors whose shape changes from step to step")
        return torch.stack(rows)

    is_list = _lists_of_samples(steps[0].args, steps[0].kwargs, len(choice))
    own = argument.given(steps[0].args, steps[0].kwargs)
    by_row = isinstance(own, Tensor) and own.ndim > 1 and _has_rows(own, len(choice))  # one for each token
    parts = [(step.args, step.kwargs) if by_row else argument.put(step.args, step.kwargs, 0) for step in steps]
    leaves = [tree_flatten(each, is_leaf=is_list) for each in parts]
    if any(structure != leaves[0][1] for _, structure in leaves):
        raise _unmixable("other arguments in some steps than in others")
    if any(step.used != steps[0].used for step in steps):
        raise _unmixable("pictures beside the sample in some steps and not in others")
    args, kwargs = tree_unflatten(
        [pick(list(each)) for each in zip(*(leaf for leaf, _ in leaves), strict=True)], leaves[0][1]
    )
    timesteps = torch.stack([steps[step].timesteps[row] for row, step in enumerate(choice)])
    if not by_row:
        args, kwargs = argument.put(args, kwargs, timesteps)
    return DenoisingStep(timesteps, args, kwargs, pick([step.output for step in steps]), steps[0].used)


def _order(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed), device="cpu")


class Trajectories:
    """Training batches in a fixed order; batch n is a function of the seed and n alone, so a run can go on anywhere.

    The first rollout is drawn when this is made.

    Args:
        pipe (`DiffusionPipeline`): the teacher.
        make_arguments (`Callable`): see `call_arguments`.
        batch_size (`int`): samples of a batch, over all processes.
        seed (`int`): of noise and order.
        rank, world (`int`): this process, and how many there are.
        factors (`RunFactors`, *optional*): of the sampler, taken in the first rollout.

    Raises:
        ConfigError: the batch cannot be shared out evenly, or the pipeline cannot be a teacher.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        make_arguments: Callable,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        factors: RunFactors | None = None,
    ):
        if batch_size % world:
            raise ConfigError(f"`batch_size` must be a multiple of the {world} processes, but got {batch_size}.")
        self.pipe, self.make_arguments = pipe, make_arguments
        self.batch_size, self.seed, self.rank, self.share = batch_size, seed, rank, batch_size // world
        self._factors = factors
        self._roll(0)

    def __getitem__(self, number: int) -> DenoisingStep:
        """Batch `number`: every sample of the rollout once, at a step drawn for it; rollouts last one pass."""
        length = len(self._steps)
        rollout_number, position = divmod(number, length)
        if rollout_number != self._number:
            self._roll(rollout_number)
        order = [int(_order(length, self.seed + self._first + i)[position]) for i in range(self.share)]
        rows = len(self._steps[0].output)  # guidance calls the denoiser with every sample twice
        choice = [order[row % self.share] for row in range(rows)]
        return mix(self._steps, choice, timestep_argument(denoiser_of(self.pipe)))

    def _roll(self, number: int) -> None:
        self._number, self._first = number, number * self.batch_size + self.rank * self.share
        self._steps = rollout(self.pipe, self.make_arguments, self._first, self.share, self.seed, self._factors)
        rows = {len(step.output) for step in self._steps}
        if len(rows) != 1 or rows.pop() % self.share:
            raise ConfigError(
                f"Every step of {type(self.pipe).__name__} must call the denoiser once with all samples, but it does "
                f"not: it cannot be a teacher."
            )

    def own(self, batch: Tensor) -> Tensor:
        """This process's part of something that has a row for every sample of the batch."""
        return batch[self.rank * self.share : (self.rank + 1) * self.share]

    def steps(self) -> list[DenoisingStep]:
        """This process's part of the rollout, in the sampler's order."""
        return self._steps

    def timesteps(self) -> list[float]:
        """Timesteps of a rollout in the sampler's order, as its denoiser sees them."""
        return [float(step.timesteps[0]) for step in self._steps]
