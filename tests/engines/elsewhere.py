"""Run whole models on a device that need not exist, where whatever reads a value fails: a process of its own, since
torch knows one such device for good."""

import torch
from conftest import ONE_BLOCK, make_condition_unet, make_unet
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from diffusers_msfp import set_engine
from diffusers_msfp.layers.convert import Conversion, convert
from diffusers_msfp.sampling.observation import freeze

DEVICE = "npy"  # torch's own name for a device that is written in Python
ONE_BLOCK_WITH_TEXT = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""Of `make_condition_unet`: as few layers as such a UNet can have."""
HOST_READS = ("aten._local_scalar_dense", "aten.item", "aten.equal")


class NoHostReads(TorchDispatchMode):
    """Fails where a value is read, or a tensor is brought from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(HOST_READS):
            raise AssertionError(f"{name} waits for the device")
        made = func(*args, **kwargs or {})
        if name.startswith("aten._to_copy") and made.device != args[0].device:
            raise AssertionError(f"{name} from {args[0].device} to {made.device}")
        return made


def elsewhere(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    made = FakeTensor(mode, tensor.detach().to("meta"), torch.device(f"{DEVICE}:0"))
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made


@torch.no_grad()
def main() -> None:
    attention = make_unet(**ONE_BLOCK | {"down_block_types": ("AttnDownBlock2D",)}), ()
    with_text = make_condition_unet(**ONE_BLOCK_WITH_TEXT), (torch.randn(2, 5, 16),)
    for scheme, (model, conditions) in (("w4g16a8", attention), ("w8a8-wide", with_text)):
        convert(model, Conversion.plan(model, scheme))
        x = torch.randn(2, model.config.in_channels, 8, 8)
        model(x, 10, *conditions)
        freeze(model)
        set_engine(model, "reference")
        mode = FakeTensorMode()
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    held[name] = None if tensor is None else elsewhere(tensor, mode)
        given = [elsewhere(each, mode) for each in (x, torch.tensor(10), *conditions)]
        with mode, NoHostReads():
            y = model(*given).sample
        if (y.device.type, y.shape) != (DEVICE, x.shape):
            raise AssertionError(f"{y.device}, {y.shape}")


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    main()
