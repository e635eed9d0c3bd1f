"""The least time that a quantized model's step could take: its products, its attention, and one pass over the rest.

It is that of the model itself: adapters beside the weights are turned off while it is measured, so that a model that
they slow down lies further above its floor.

The bare kernels of every quantized layer on codes that are there already, the attention products, and for each tensor
that a norm or an activation touches one read and one write at the machine's copy speed. Nothing else counts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from ...engines.fusion.attention import attention
from ...layers.convert import quant_layers
from ...methods.talora import RoutingTable
from ...numerics import Codes

_TOUCHING = (nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.GELU, GEGLU)
_ROUNDS = 5


@dataclass(frozen=True)
class Floor:
    """Seconds of each part of a step.

    Args:
        kernels (`float`): bare kernels of the quantized layers.
        attention (`float`): softmax and its two products.
        traffic (`float`): one read and one write of what norms and activations touch.
    """

    kernels: float
    attention: float
    traffic: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.kernels + self.attention + self.traffic

    @property
    def parts(self) -> dict[str, float]:
        """The parts by name."""
        return {"kernels": self.kernels, "attention": self.attention, "traffic": self.traffic}


def fastest(call: Callable[[], object]) -> float:
    """The shortest of some calls, seconds."""
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def floor_of(model: nn.Module, step: Callable[[], object]) -> Floor:
    """Measure the floor of a model whose layers an engine runs.

    Args:
        model (`nn.Module`): quantized.
        step (`Callable`): calls it once.
    """
    with without_adapters(model):
        return _floor_of(model, step)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Timestep-aware adapters beside the weights are off in here; merged ones are weights and stay."""
    tables = [module for module in model.modules() if isinstance(module, RoutingTable)]
    before = [table.enabled for table in tables]
    try:
        for table in tables:
            table.enabled = False
        yield
    finally:
        for table, enabled in zip(tables, before, strict=True):
            table.enabled = enabled


def _floor_of(model: nn.Module, step: Callable[[], object]) -> Floor:
    calls, touched = [], []
    products: list[Callable[[], object]] = []
    layers = {id(layer) for _, layer in quant_layers(model)}
    hooks = []
    for module in model.modules():
        if id(module) in layers:
            hooks.append(module.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0].clone()))))
        elif isinstance(module, _TOUCHING):
            hooks.append(
                module.register_forward_hook(lambda _, args, out: touched.append((_bytes(args[0]), _bytes(out))))
            )
        elif isinstance(module, Attention):
            hooks.append(module.register_forward_pre_hook(partial(_remember, products), with_kwargs=True))
    step()
    for hook in hooks:
        hook.remove()
    copied = torch.empty(2**22, dtype=torch.uint8)
    per_byte = fastest(copied.clone) / (2 * copied.numel())
    return Floor(
        kernels=sum(_kernel(layer, x) for layer, x in calls),
        attention=sum(map(fastest, products)),
        traffic=sum(read + written for read, written in touched) * per_byte,
    )


def _bytes(tensor: Tensor) -> int:
    return (tensor.bytes() if isinstance(tensor, Codes) else tensor).nbytes


def _kernel(layer: Any, x: Tensor) -> float:
    """Seconds of a layer's kernel alone; quantizing its input is not counted where the engine can take codes."""
    prepared = layer.ready(x)
    if prepared is None or not prepared.reads_codes or (not isinstance(x, Codes) and layer.takes_codes(x) is None):
        return fastest(lambda: layer(x))
    if not isinstance(x, Codes):
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()
        x = prepared.hand_over(*prepared.codes(x, 0), 0, x.dtype)
    return fastest(lambda: layer(x))


def _remember(products: list, module: Attention, args: tuple, kwargs: dict) -> None:
    x = args[0] if args else kwargs["hidden_states"]
    context = kwargs.get("encoder_hidden_states")
    x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    size = module.inner_dim // module.heads
    tokens = x.shape[1] if context is None else context.shape[1]
    query, key = (x.new_zeros(len(x), module.heads, n, size) for n in (x.shape[1], tokens))
    product = attention if x.dtype == torch.bfloat16 else F.scaled_dot_product_attention
    products.append(lambda: product(query, key, key))
