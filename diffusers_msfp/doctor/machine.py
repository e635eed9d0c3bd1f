"""The processor with its instructions, what limits their use, and the devices that torch sees."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..compat.processor import LIMITS as OF_ONEDNN
from ..compat.torch import has_bf16_instructions, has_int8_operators
from ..engines import ENGINES, kernels
from ..engines.engine import kind_of
from ..results import Result

FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16",),
    "AMX": ("amx_tile",),
    "AMX int8": ("amx_int8",),
    "AMX BF16": ("amx_bf16",),
}
"""Instructions of x86 processors that decide on speed → what torch calls them."""
LIMITS = (*OF_ONEDNN, "ATEN_CPU_CAPABILITY")
"""Environment variables that hold oneDNN and torch to older instructions than the processor has."""


@dataclass(frozen=True, kw_only=True)
class Processor(Result):
    """The CPU.

    Args:
        name (`str`): as torch knows it.
        architecture (`str`): like `x86_64`.
        cores, threads (`int`): physical cores, and threads that torch uses.
        features (`Mapping[str, bool]`): of an x86 processor `FEATURES`, of another all that torch names.
        used (`str`): instructions that torch's own kernels take.
        limited_by (`Mapping[str, str]`): those of `LIMITS` that are set.
        int8_operators (`bool`): this build of torch has oneDNN's 8-bit products.
        bf16_products (`bool`): oneDNN multiplies bfloat16 here, by the processor's instructions.
        kernels (`str`): `numba`, or `torch` for the slower ones that serve without it.
    """

    name: str
    architecture: str
    cores: int
    threads: int
    features: Mapping[str, bool]
    used: str
    limited_by: Mapping[str, str]
    int8_operators: bool
    bf16_products: bool
    kernels: str


@dataclass(frozen=True, kw_only=True)
class Device(Result):
    """A device that torch can compute on.

    Args:
        device (`str`): as torch calls it, like `cuda:0`.
        name (`str`): of the hardware.
        measured (`bool`): some engine was timed on its kind; of others nothing but correctness is known.
    """

    device: str
    name: str
    measured: bool


def processor() -> Processor:
    """The CPU of this machine, as torch sees it."""
    said = torch.cpu.get_capabilities()
    x86 = said.get("architecture") == "x86_64"
    features = (
        {label: any(bool(said.get(key)) for key in keys) for label, keys in FEATURES.items()}
        if x86
        else {key: value for key, value in sorted(said.items()) if isinstance(value, bool)}
    )
    return Processor(
        name=str(said.get("cpu_name") or platform.processor() or "unknown"),
        architecture=str(said.get("architecture") or platform.machine()),
        cores=int(said.get("num_physical_cores") or os.cpu_count() or 1),
        threads=torch.get_num_threads(),
        features=features,
        used=torch.backends.cpu.get_cpu_capability(),
        limited_by={name: os.environ[name] for name in LIMITS if os.environ.get(name)},
        int8_operators=has_int8_operators(),
        bf16_products=has_bf16_instructions(),
        kernels=kernels.NAME,
    )


def devices() -> list[Device]:
    """The CPU, and each accelerator that torch was built for and finds."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found += [torch.device(str(kind), index) for index in range(torch.accelerator.device_count())]
    return [Device(device=str(each), name=_name(each), measured=measured(each)) for each in found]


def measured(device: torch.device) -> bool:
    """Whether an engine was timed on devices of this kind; see `Engine.measured_on`."""
    return any(kind_of(device) in engine.measured_on for engine in ENGINES.values())


def _name(device: torch.device) -> str:
    module = getattr(torch, device.type, None)
    named = getattr(module, "get_device_name", None)
    if named is not None:
        return str(named(device))
    return str(torch.cpu.get_capabilities().get("cpu_name") or device.type)
