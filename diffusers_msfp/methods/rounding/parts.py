"""A part of a quantized model while the rounding of its weights is learned, and the examples that it learns from."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...compat.torch import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten
from ...errors import ConfigError
from ...layers import QuantLayer
from ...layers.convert import replace_module
from ...sampling.trajectory import DenoisingStep
from ...sampling.used_output import UsedChannels, counted
from ..blocks import block_call, block_outputs, float_outputs
from ..losses import squared_error
from ..routes import finite_set_of
from . import SoftRounding


class RoundedLayer(nn.Module):
    """A quantized layer with a soft weight in place of its codes; its input is quantized as ever.

    Args:
        layer (`QuantLayer`): frozen, with one bank; not changed.
        original (`Tensor`): its float weight.
        scale_aware (`bool`): see `SoftRounding`.
    """

    def __init__(self, layer: QuantLayer, original: Tensor, *, scale_aware: bool) -> None:
        super().__init__()
        self.layer = layer
        self.soft = SoftRounding(original.reshape(layer.rows_shape), layer.weight_qparams(), scale_aware=scale_aware)
        self.hardened = False

    @property
    def weight(self) -> Tensor:
        """What others read of the quantized layer, see `LogicalWeight`."""
        return self.layer.weight

    def rounded(self) -> Tensor:
        """The weight in use, `logical_shape`, float32: soft, or on the grid."""
        return (self.soft.hard() if self.hardened else self.soft()).view(self.layer.logical_shape)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 – as the float layer calls it
        """As the deployed layer will compute, with gradients."""
        x = input
        bias = None if self.layer.bias is None else self.layer.bias.to(torch.float32)
        return self.layer.compute(self.layer.quantize_input(x), self.rounded(), bias).to(x.dtype)


class RoundedPart:
    """A block or layer of a model with soft weights in it, until `close`.

    Args:
        model (`nn.Module`): quantized; its layers are replaced.
        name (`str`): of the block or layer.
        originals (`dict[str, Tensor]`): float weights of the layers to learn, by their names.
        scale_aware (`bool`): see `SoftRounding`.
        used (`UsedChannels`, *optional*): of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        originals: dict[str, Tensor],
        *,
        scale_aware: bool,
        used: UsedChannels | None = None,
    ) -> None:
        self.model, self.name, self.originals, self.used = model, name, originals, used
        self.layers = {
            key: RoundedLayer(cast(QuantLayer, model.get_submodule(key)), original, scale_aware=scale_aware)
            for key, original in originals.items()
        }
        for key, layer in self.layers.items():
            replace_module(model, key, layer)
        self.module = model.get_submodule(name)
        self.finite_set = finite_set_of(model)

    def close(self) -> None:
        """Put the quantized layers back."""
        for key, layer in self.layers.items():
            replace_module(self.model, key, layer.layer)

    def logits(self) -> list[nn.Parameter]:
        """What is learned."""
        return [layer.soft.logit for layer in self.layers.values()]

    def loss(self, call: tuple[tuple, dict], targets: list[Tensor], timesteps: Tensor) -> Tensor:
        """Mean squared error of what the part puts out, `()`."""
        with self.finite_set.at(timesteps) if self.finite_set is not None else nullcontext():
            outputs = counted(self.used, self.name, float_outputs(self.module(*call[0], **call[1])))
        errors = (squared_error(output, target).mean() for output, target in zip(outputs, targets, strict=True))
        return cast(Tensor, sum(errors))

    def penalty(self, exponent: float) -> Tensor:
        """Mean of the regulariser over all weights, `()`."""
        total = sum(layer.soft.penalty(exponent) for layer in self.layers.values())
        return cast(Tensor, total) / sum(logit.numel() for logit in self.logits())

    @torch.no_grad()
    def hard_weights(self) -> dict[str, Tensor]:
        """The weights rounded as they stand, on the grid, `logical_shape`."""
        return {key: layer.soft.hard().view(layer.layer.logical_shape) for key, layer in self.layers.items()}

    @torch.no_grad()
    def hard_loss(self, examples: "Examples", batches: list[Tensor]) -> float:
        """Mean of `loss` over the batches with weights on the grid."""
        for layer in self.layers.values():
            layer.hardened = True
        losses = [self.loss(*examples.batch(rows)) for rows in batches]
        for layer in self.layers.values():
            layer.hardened = False
        return torch.stack(losses).mean().item()


@dataclass(frozen=True)
class Examples:
    """What a part is called with in the quantized model, and what it answers in the teacher.

    Args:
        leaves (`list`): of the call's arguments; tensors have a row for each example, or are shared.
        structure (`TreeSpec`): of the arguments.
        targets (`list[Tensor]`): the teacher's outputs, a row for each example.
        timesteps (`Tensor`, `(B,)`): of each example.
        samples (`Tensor`, `(B,)`, int64): number of the trajectory of each example; of a single one that of the step.
        per_example (`list[int]`): how many rows each leaf has for an example; 0 where all examples share it.
    """

    leaves: list
    structure: Any
    targets: list[Tensor]
    timesteps: Tensor
    samples: Tensor
    per_example: list[int]

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        teacher: nn.Module,
        name: str,
        steps: list[DenoisingStep],
        batch: int,
        memory: int,
        used: UsedChannels | None = None,
        length: int | None = None,
    ) -> "Examples":
        """Run both models up to the part's end.

        Args:
            batch (`int`): samples of each step; guidance calls with each of them twice.
            memory (`int`): bytes to stay below, but one step at least is taken.
            used (`UsedChannels`, *optional*): of the model.
            length (`int`, *optional*): so many steps are of the same trajectories; by default all.

        Raises:
            ConfigError: steps call the part with something that differs and cannot be told from example to example.
        """
        parts: list[list] = []
        targets: list[list[Tensor]] = []
        taken = 0
        for step in steps:
            leaves, structure = tree_flatten(block_call(model, name, step))
            outputs = counted(used, name, block_outputs(teacher, name, step, gradients=False))
            size = sum(leaf.nbytes for leaf in tree_leaves((leaves, outputs)) if isinstance(leaf, Tensor))
            if parts and taken + size > memory:
                break
            taken += size
            parts.append(leaves)
            targets.append(outputs)
        rows = len(targets[0][0])
        paths = [path for path, _ in tree_flatten_with_path(tree_unflatten(parts[0], structure))[0]]
        per_example = [_rows_each(path, leaf, rows) for path, leaf in zip(paths, parts[0], strict=True)]
        columns = list(zip(per_example, zip(*parts, strict=True), strict=True))
        if not all(each or _all_equal(column) for each, column in columns):
            raise ConfigError(
                f"Examples of the part `{name}` are drawn from all steps, but these call it with what differs and "
                f"has no entry for each example. Leave it out: `exclude=[{name!r}]`."
            )
        joined = [torch.cat(column) if each else column[0] for each, column in columns]
        told = [step.timesteps for step in steps[: len(parts)]]
        timesteps = torch.cat([each.repeat_interleave(rows // len(each)) for each in told])  # of frames, too
        row = torch.arange(len(told[0]), device="cpu") % batch
        length = length or len(steps)
        numbers = [number // length * batch + row for number in range(len(told))]
        samples = torch.cat([number.repeat_interleave(rows // len(row)) for number in numbers])
        outputs = [torch.cat(column) for column in zip(*targets, strict=True)]
        return cls(joined, structure, outputs, timesteps, samples, per_example)

    def __len__(self) -> int:
        return len(self.targets[0])

    def batch(self, rows: Tensor) -> tuple[tuple[tuple, dict], list[Tensor], Tensor]:
        """Arguments, targets and timesteps of some examples."""
        columns = zip(self.per_example, self.leaves, strict=True)
        leaves = [
            leaf.unflatten(0, (-1, each))[rows.to(leaf.device)].flatten(0, 1) if each else leaf
            for each, leaf in columns
        ]
        call, targets = tree_unflatten(leaves, self.structure), [target[rows] for target in self.targets]
        return call, targets, self.timesteps[rows]


def _rows_each(path: tuple, leaf: Any, number: int) -> int:
    """How many rows of an argument belong to each of so many examples; diffusers' masks have one for each head."""
    if not isinstance(leaf, Tensor) or not leaf.ndim:
        return 0
    is_mask = str(getattr(path[-1], "key", "")).endswith("attention_mask")
    return len(leaf) // number if len(leaf) == number or (is_mask and len(leaf) % number == 0) else 0


def _all_equal(column: tuple) -> bool:
    tensors = isinstance(column[0], Tensor)
    return all(part is column[0] or not tensors or torch.equal(part, column[0]) for part in column)
