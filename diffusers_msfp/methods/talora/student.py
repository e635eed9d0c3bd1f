"""The quantized model while it learns: trainable layers in place of the quantized ones, and the router."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ...compat.modules import KeptState
from ...compat.torch import device_of, weight_of
from ...compat.wrappers import forget_compiled
from ...errors import ConfigError
from ...layers.convert import base_fingerprint, layers_by_name, prepare_layers, replace_module
from ...numerics.rounding import check_finite
from ...sampling.denoisers import model_output
from ...sampling.timestep import timestep_argument
from ...sampling.trajectory import DenoisingStep
from ...schemes import check_patterns
from ..blocks import block_outputs
from ..checks import check_student, original_weight
from ..correction.attach import attach_correction, detach_correction, set_aside
from ..correction.table import correction_of
from ..losses import squared_error
from ..routes import ROUTER, finite_set_of, remove_route_hooks, routing_of
from . import AdapterBank, AdapterPlan, FullUpdate, Gate, TimestepRouter, Trainee, adapter_rank
from .attach import connect

if TYPE_CHECKING:
    from ..temporal import FiniteSet, TemporalPlan


class Student(nn.Module):
    """A frozen quantized model with trainable adapters, activation ranges and router around it.

    Args:
        model (`ModelMixin`): quantized, frozen, without adapters; changed in place until `finish` or `abandon`.
        teacher (`nn.Module`): the float model it was quantized from.
        num_timesteps (`int`): T of the router's table.
        num_adapters, rank (`int`): h, and (0: an update of the whole weight) the largest rank.
        placement (`str`): `"merged"` or `"side"`.
        reads (`str`, *optional*): what adapters beside the weights read, `"float"` or `"codes"`.
        router_groups (`tuple[str, ...]`): see `AdapterPlan`.
        seed (`int`): of the initial weights.

    Raises:
        ConfigError: the model is still observing, or has adapters already.
        ShapeError: the teacher is another model.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        num_timesteps: int,
        num_adapters: int,
        rank: int,
        placement: str,
        reads: str | None = None,
        router_groups: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_student(model, teacher, "talora")
        finite_set = finite_set_of(model)
        layers, beside_sets = layers_by_name(model), placement == "merged" and num_adapters == 1
        if finite_set is not None:
            block = set(finite_set.plan.block)
            elsewhere = any(layer.num_sets for name, layer in layers.items() if name not in block)
            if finite_set.plan.keeps_block or not (beside_sets or elsewhere):
                layers = {name: layer for name, layer in layers.items() if name not in block}
        self.has_sets = any(layer.num_sets for layer in layers.values())
        if self.has_sets and not beside_sets:
            raise ConfigError(
                f"Layers with input parameters for each timestep learn with `placement='merged'` and "
                f"`num_adapters=1`, since they follow the timestep already, but got {placement!r} and {num_adapters}. "
                f"Give these, or use `fsc='block'` in temporal maintenance."
            )
        check_patterns(router_groups, list(layers), "router_groups")
        ranks: dict[str, list[str]] = {}
        for name, layer in layers.items():
            ranks.setdefault(str(adapter_rank(layer.logical_shape, rank)), []).append(name)
        reads = reads or "float"
        self.plan = AdapterPlan(placement, num_adapters, num_timesteps, ranks, router_groups, reads=reads)
        self.gate = Gate()
        generator = torch.Generator().manual_seed(seed)
        trainees = {}
        for name, layer_rank in self.plan.rank_of().items():
            layer, original = layers[name], original_weight(teacher, layers[name])
            device = layer.packed_weight.device
            bank: AdapterBank | FullUpdate
            if rank:
                bank = AdapterBank(layer.logical_shape, num_adapters, layer_rank, device=device, reads=reads)
                bank.initialise(generator)
            else:
                bank = FullUpdate(layer.logical_shape, num_adapters, device)
            trainees[name] = Trainee(layer, original, bank, placement, self.gate, self.plan.group_of(name))
        self._before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.norms = (
            [(each, each.detach().clone()) for each in _affine_of_norms(model)] if placement == "merged" else []
        )
        self._checkpointing = False
        self._correction, self.model = correction_of(model), model
        self.router = TimestepRouter(num_timesteps, num_adapters, self.plan.groups, seed).to(device_of(model))
        try:
            detach_correction(model)  # only now is the model changed
            model.requires_grad_(False)
            for parameter, _ in self.norms:
                parameter.requires_grad_(True)
            for name, trainee in trainees.items():
                replace_module(model, name, trainee)
        except BaseException:
            self.abandon()
            raise

    @property
    def finite_set(self) -> "FiniteSet | None":
        """The timesteps for each of which inputs learn their own parameters; None where they follow adapters."""
        return finite_set_of(self.model) if self.has_sets else None

    def choose(self, timesteps: Tensor, noise: Tensor | None = None) -> None:
        """Set the adapters of the coming calls, `(B,)` timesteps, with the router's gradient."""
        gate, _ = self.router(timesteps.to(weight_of(self.router.mlp[0]).device), noise)
        known = self.finite_set
        self.gate.set(gate, None if known is None else known.nearest(timesteps))

    def forward(
        self, step: DenoisingStep, noise: Tensor | None = None, block: str | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Answer one of the teacher's calls.

        Args:
            step (`DenoisingStep`): the call.
            noise (`Tensor`, `(B, groups, num_adapters)`, *optional*): lets the router explore.
            block (`str`, *optional*): compute gradients in this part of the model only, see `block_outputs`.

        Returns:
            `tuple[list[Tensor], Tensor]`: what the model predicts, or the block puts out, and the router's balance
            loss over the timesteps set by `watch_timesteps`.
        """
        self.choose(step.timesteps, noise)
        order = torch.arange(len(step.timesteps), device=self.gate.value.device)
        if step.is_by_row:
            order = self.gate.value[:, 0].argmax(1).argsort(stable=True)  # a layer's adapters see adjoining rows
            self.gate.set(self.gate.value[order], None if self.gate.entries is None else self.gate.entries[order])
            step = step.rows(order)
        if block is None:
            outputs = [step.counted(model_output(step.run(self.model)))]
        else:
            outputs = block_outputs(self.model, block, step, gradients=True)
        back = order.argsort()
        return [_in_order(output, back) for output in outputs], self.router.balance_loss(self.watched)

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Let the model be called by a pipeline, whose timesteps the router sees."""
        argument = timestep_argument(self.model)

        def choose(_model: nn.Module, args: tuple, kwargs: dict) -> None:
            self.choose(torch.as_tensor(argument.of(args, kwargs), device="cpu").reshape(-1)[:1])

        handle = self.model.register_forward_pre_hook(choose, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def errors_by_timestep(self, steps: Iterable[DenoisingStep]) -> dict[float, tuple[float, int]]:
        """Sum of the samples' mean squared errors and their number, for every watched timestep."""
        found = {timestep: (0.0, 0) for timestep in self.watched.tolist()}
        for step in steps:
            (output,), _ = self(step)
            for timestep, error in zip(
                step.timesteps.float().tolist(), squared_error(output, step.output), strict=True
            ):
                total, number = found[timestep]
                found[timestep] = (total + error.item(), number + 1)
        return found

    def watch_timesteps(self, timesteps: list[float]) -> None:
        """Over which timesteps the load of the adapters is to be balanced."""
        self.watched = torch.tensor(timesteps, dtype=torch.float32, device=weight_of(self.router.mlp[0]).device)

    def trainees(self) -> Iterator[Trainee]:
        """Layers with adapters."""
        return (module for module in self.model.modules() if isinstance(module, Trainee))

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trainable_state`."""
        own = self.trainable_state()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise ConfigError("The saved training state belongs to another model or other settings.")
        for name, value in state.items():
            own[name].copy_(value)

    def abandon(self) -> nn.Module:
        """Put the quantized layers back, and everything else as it was."""
        for trainee in list(self.trainees()):
            replace_module(self.model, trainee.layer.module_name, trainee.layer)
        for parameter, before in self.norms:
            parameter.data.copy_(before)
        self._restore()
        if self._correction is not None:
            attach_correction(self.model, self._correction)
        return self.model

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass, until the end of training."""
        model = cast(ModelMixin, self.model)
        self._checkpointing = not model.is_gradient_checkpointing
        model.enable_gradient_checkpointing()

    def _restore(self) -> None:
        for parameter, required in self._before:
            parameter.requires_grad_(required)
        if self._checkpointing:
            cast(ModelMixin, self.model).disable_gradient_checkpointing()

    def finish(self, training: dict | None = None, dtype: torch.dtype = torch.float16) -> nn.Module:
        """The quantized model with what was learned; the router becomes a table.

        Args:
            training (`dict`, *optional*): how it was made, for the checkpoint's config.
            dtype (`torch.dtype`): of adapters beside the weights.
        """
        for name, value in self.trainable_state().items():
            check_finite(value, f"The trained `{name}`")
        trainees, known = list(self.trainees()), self.finite_set
        kept, plan = [KeptState(trainee.layer) for trainee in trainees], None if known is None else known.plan
        try:
            return self._finish(trainees, training or {}, dtype)
        except BaseException:  # `abandon` does the rest
            for each in kept:
                each.put_back()
            for trainee in trainees:
                replace_module(self.model, trainee.layer.module_name, trainee)
            if known is not None:
                known.plan = cast("TemporalPlan", plan)
            elif routing_of(self.model) is not None:
                delattr(self.model, ROUTER)
                remove_route_hooks(self.model, ROUTER)
            raise

    def _finish(self, trainees: list[Trainee], training: dict, dtype: torch.dtype) -> nn.Module:
        finished = [(trainee.layer.module_name, trainee.finish(dtype)) for trainee in trainees]
        for module_name, layer in finished:
            replace_module(self.model, module_name, layer)
        self._restore()
        if (known := self.finite_set) is not None:  # it knows the timestep, and there is one adapter for all
            known.plan = replace(known.plan, training={**known.plan.training, "finetuning": training})
            forget_compiled()
            prepare_layers(self.model)
        else:
            base = base_fingerprint(self.model) if self.plan.placement == "side" else None
            plan = AdapterPlan(**{**vars(self.plan), "training": training, "base": base})
            connect(self.model, plan, self.router.table(self.watched.tolist()))
        set_aside(self.model, self._correction)
        return self.model


def _in_order(output: Tensor, order: Tensor) -> Tensor:
    """Rows of samples in this order; a sample may have several, the frames of a video."""
    return output.unflatten(0, (len(order), -1)).index_select(0, order).flatten(0, 1)


def _affine_of_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of a model's norms, which follow its dtype and are stored as they are."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            yield from module.parameters(recurse=False)
