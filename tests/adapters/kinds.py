"""Every kind of adapter that PEFT knows, with small sizes, and a network that has a layer of every kind."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin, StableDiffusionLoraLoaderMixin
from peft import PeftConfig, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffusers_msfp import MSFPConfig, freeze
from diffusers_msfp.layers import QUANT_LAYERS
from diffusers_msfp.layers.convert import replace_module
from diffusers_msfp.layers.split import split_layer
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.schemes import resolve

LAYERS = ("linear", "conv", "grouped", "split_linear", "split_conv")
VARIANTS = {"rsLoRA": ("LORA", {"use_rslora": True}), "DoRA": ("LORA", {"use_dora": True})}
KINDS = [str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind in PEFT_TYPE_TO_TUNER_MAPPING]
ALL_KINDS = [*KINDS, *VARIANTS]


class NoConfig(Exception):
    """A kind that PEFT has for language models alone."""


class Net(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Sixteen channels in 4 × 4 pictures; few enough layers to be attached to a thousand times."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(16, 16, 1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.split_conv = nn.Conv2d(32, 16, 1)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.split_linear = nn.Linear(32, 16)
        self.conv_out = nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: int = 0) -> Tensor:  # noqa: ARG002
        first = self.conv_in(sample)
        x = nn.functional.silu(self.conv(first))
        x = nn.functional.silu(self.grouped(x)) + first
        x = self.split_conv(torch.cat([x, first], 1)).flatten(2).mT
        y = nn.functional.gelu(self.linear(self.norm(x)))
        return self.conv_out(self.split_linear(torch.cat([y, x], -1)))


class Pipe(StableDiffusionLoraLoaderMixin):
    """What diffusers' loaders of LoRA files need of a pipeline."""

    def __init__(self, unet: Net) -> None:
        self.unet, self.text_encoder, self.components, self.hf_device_map = unet, None, {"unet": unet}, None


def make_net(scheme: str = "w4a16", dtype: torch.dtype = torch.float32) -> Net:
    """Quantized, two of its layers in parts, and frozen."""
    torch.manual_seed(0)
    net = Net().eval().to(dtype)
    floats = {name: copy.deepcopy(net.get_submodule(name)) for name in ("split_linear", "split_conv")}
    quantize_model(net, MSFPConfig(scheme))
    for name, layer in floats.items():
        split = split_layer(layer, [16, 16], name)
        for index, part in enumerate(list(split.children())):
            place = f"{name}.{index}"
            split.add_module(str(index), QUANT_LAYERS[type(part)].from_float(part, place, resolve(name, scheme, {})))
        replace_module(net, name, split)
    output(net, dtype)
    freeze(net)
    return net


def inputs() -> Tensor:
    return torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(7))


def output(net: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)  # some kinds sample
    with torch.no_grad():
        return net(inputs().to(dtype))


def config_of(kind: str, layer: str, **changes) -> PeftConfig:
    """A config of this kind for one layer, with sizes that fit it: chosen by what the config's fields are called."""
    kind, variant = VARIANTS.get(kind, (kind, {}))
    cls = next(cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(key.value) == kind)
    arguments = dict(variant)
    for field in fields(cls):
        default = field.default if field.default is not MISSING else None
        if field.name == "feedforward_modules":
            arguments[field.name] = []
        elif field.name == "total_step":
            arguments[field.name] = 10
        elif type(default) is int and default > 4 and "seed" not in field.name:
            arguments[field.name] = 4
    if "target_modules" in inspect.signature(cls).parameters:
        arguments["target_modules"] = [layer]
    try:
        return cls(**arguments | changes)
    except ImportError:
        raise
    except Exception as error:
        raise NoConfig from error


# ── ways to attach ───────────────────────────────────────────────────────────────────────────────────────────


def _add(net: Net, config: PeftConfig, name: str, state: dict) -> nn.Module:
    net.add_adapter(config, adapter_name=name)
    return net


def _load_weights(net: Net, config: PeftConfig, name: str, state: dict) -> nn.Module:
    Pipe(net).load_lora_weights({f"unet.{key}": value.clone() for key, value in state.items()}, adapter_name=name)
    return net


def _load_adapter(net: Net, config: PeftConfig, name: str, state: dict) -> nn.Module:
    net.load_lora_adapter({key: value.clone() for key, value in state.items()}, prefix=None, adapter_name=name)
    return net


def _inject(net: Net, config: PeftConfig, name: str, state: dict) -> nn.Module:
    return inject_adapter_in_model(config, net, adapter_name=name)


def _wrap(net: Net, config: PeftConfig, name: str, state: dict) -> nn.Module:
    return get_peft_model(net, config, adapter_name=name)


WAYS: dict[str, Callable] = {
    "add_adapter": _add,
    "load_lora_weights": _load_weights,
    "load_lora_adapter": _load_adapter,
    "inject_adapter_in_model": _inject,
    "get_peft_model": _wrap,
}


def randomise(net: nn.Module, only: str = "") -> None:
    """Give what is trained values of its own, the same ones under the same names."""
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and only in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.1 * noise).to(parameter.dtype)


def adapter_state(net: nn.Module, config: PeftConfig, name: str = "a") -> dict:
    """A file of this adapter with random values; empty where PEFT cannot attach it to this float model."""
    try:
        made = _inject(copy.deepcopy(net), copy.deepcopy(config), name, {})
    except Exception:  # noqa: BLE001 - PEFT's errors have no class in common
        return {}
    randomise(made)
    return get_peft_model_state_dict(made, adapter_name=name)


def fingerprint(net: nn.Module) -> dict:
    """All that attaching may change: modules, tensors, flags."""
    return {
        "modules": {name: type(module) for name, module in net.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in net.state_dict().items()},
        "flags": {
            "loaded": bool(getattr(net, "_hf_peft_config_loaded", False)),
            "peft_config": dict(getattr(net, "peft_config", {})),
        },
        "trained": {name for name, parameter in net.named_parameters() if parameter.requires_grad},
    }


def same(a: dict, b: dict, trained: bool = True) -> bool:
    """Whether two fingerprints are equal, tensors bit for bit; `trained`: also what requires gradients."""
    left, right = a["tensors"], b["tensors"]
    tensors = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    keys = ("modules", "flags", "trained") if trained else ("modules", "flags")
    return tensors and all(a[key] == b[key] for key in keys)
