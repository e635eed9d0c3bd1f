"""Find the places of a model where a leaf can do the work of several: see `norms`."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ...compat.hooks import home_of, is_watched
from ...layers import QuantLayer
from .norms import FusedGroupNorm, fuse_norm, unfuse

_END = ("conv_norm_out", "conv_act", "conv_out")


class FusedResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D` whose second norm adds the time embedding itself; the residual is added in place."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As the original."""
        second = self.norm2
        apart = type(second) is not FusedGroupNorm or is_watched(second)
        apart = apart or home_of(ResnetBlock2D.forward) != ResnetBlock2D.__module__  # somebody's own for all blocks
        if apart or self.time_emb_proj is None or torch.is_grad_enabled():
            return ResnetBlock2D.forward(self, input_tensor, cast(Tensor, temb), *args, **kwargs)
        x = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        temb = temb if self.skip_time_act else self.nonlinearity(temb)
        x = self.nonlinearity(second(x, self.time_emb_proj(temb)))
        own = isinstance(self.conv2, QuantLayer) and not is_watched(self.conv2)  # then nobody else has its output
        x = self.conv2(self.dropout(x))
        residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        x = x.add_(residual) if own else x + residual
        return x if self.output_scale_factor == 1 else x.div_(self.output_scale_factor)


def fuse(model: nn.Module) -> None:
    """Let norms quantize for the layers behind them, wherever diffusers runs one right after the other."""
    for module in list(model.modules()):
        for norm, activation, layer in _places(module):
            names = (norm, layer, activation) if activation else (norm, layer)
            found = [getattr(module, name, None) for name in names]
            kinds = (type(found[0]) is nn.GroupNorm, isinstance(found[1], QuantLayer), isinstance(found[-1], nn.SiLU))
            if all(kinds[: len(found)]) and "forward" not in vars(found[0]):  # that would run as its old class has it
                dropout = "dropout" if norm == "norm2" else None  # of residual blocks
                fuse_norm(cast(nn.GroupNorm, found[0]), module, layer, activation, dropout)
        if type(module) is ResnetBlock2D and module.time_embedding_norm == "default" and not _resamples(module):
            module.__class__ = FusedResnetBlock2D


def undo(model: nn.Module) -> None:
    """Give every module its own class back, but for those whose `forward` somebody keeps: offloading runs that."""
    for module in model.modules():
        if "forward" in vars(module):
            continue
        unfuse(module)
        if type(module) is FusedResnetBlock2D:
            cast(nn.Module, module).__class__ = ResnetBlock2D


def _places(module: nn.Module) -> Iterator[tuple[str, str | None, str]]:
    """Names of a norm, an activation and the layer that reads nothing but their result."""
    if isinstance(module, ResnetBlock2D):
        if not _resamples(module):
            yield "norm1", "nonlinearity", "conv1"
        if module.time_embedding_norm != "scale_shift":
            yield "norm2", "nonlinearity", "conv2"
    elif isinstance(module, Transformer2DModel) and not getattr(module, "use_linear_projection", True):
        yield "norm", None, "proj_in"
    else:  # the end of UNets, encoders and decoders; in a few, more stands between
        names = [name for name, _ in module.named_children()]
        begin = names.index(_END[0]) if _END[0] in names else len(names)
        if names[begin : begin + 3] == [*_END]:
            yield _END


def _resamples(block: ResnetBlock2D) -> bool:
    return block.upsample is not None or block.downsample is not None
