"""Let a model's attention use the engines' products; see `attention`."""

from types import BuiltinFunctionType
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from ...compat.hooks import has_dispatch_modes, home_of, is_watched
from ...layers import QuantLayer
from ..engine import PreparedLayer
from .attention import attention
from .norms import norm_rows


def _is_intercepted() -> bool:
    """Whether somebody runs code of their own in the place of attention, which another product would pass by."""
    own = home_of(AttnProcessor2_0.__call__) == AttnProcessor2_0.__module__
    return not own or not isinstance(F.scaled_dot_product_attention, BuiltinFunctionType) or has_dispatch_modes()


class BF16AttnProcessor(AttnProcessor2_0):
    """`AttnProcessor2_0` with another product where there is no mask and no gradient, in bfloat16 on a CPU.

    It counts as the original for whoever looks processors up by their class, as hooks and guiders of diffusers' do.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return AttnProcessor2_0

    def __reduce__(self) -> tuple:
        return BF16AttnProcessor, ()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """As the original; `(B, N, C)` or `(B, C, H, W)` → the same shape."""
        plain = (
            attention_mask is None
            and hidden_states.dtype == torch.bfloat16
            and hidden_states.device.type == "cpu"
            and not attn.upcast_attention  # scores so large that bfloat16 is too coarse for them
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and all(module is None for module in (attn.spatial_norm, attn.norm_q, attn.norm_k))
            and not _is_intercepted()
        )
        if not plain:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **arguments)
        x, shape = hidden_states, hidden_states.shape
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = norm_rows(attn.group_norm, x)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        def heads(tensor: Tensor) -> Tensor:  # (B, N, H * D) → (B, H, N, D)
            return tensor.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        if context is x:
            read = read_together(x, attn.to_q, attn.to_k, attn.to_v)
        else:
            read = [attn.to_q(x), *read_together(context, attn.to_k, attn.to_v)]
        mixed = attention(*map(heads, read))
        x = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            x = x.transpose(1, 2).unflatten(2, shape[2:])
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor


def read_together(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What layers give for one input, which is quantized once where all of them have the same grid for it."""
    apart = not x.numel() or not x.is_floating_point()
    found: list[tuple[PreparedLayer, int]] = []
    for layer in layers:
        adapter = layer.takes_codes(x) if isinstance(layer, QuantLayer) and not is_watched(layer) else None
        if apart or adapter is None:
            return [each(x) for each in layers]
        found.append((cast(PreparedLayer, layer.prepared), adapter))
    first, adapter = found[0]
    if any(each.grid(own) != first.grid(adapter) for each, own in found[1:]):
        return [each(x) for each in layers]
    codes = first.quantize(x.contiguous(), adapter)
    handed = [each.hand_over(codes.view_as(codes), own, x.dtype) for each, own in found]
    return [layer(each) for layer, each in zip(layers, handed, strict=True)]


def use_engine_attention(model: nn.Module, wanted: bool) -> None:
    """Exchange the processors that diffusers sets by default; any other stays."""
    old, new = (AttnProcessor2_0, BF16AttnProcessor) if wanted else (BF16AttnProcessor, AttnProcessor2_0)
    for module in model.modules():
        if isinstance(module, Attention) and type(module.processor) is old:
            module.processor = new()
