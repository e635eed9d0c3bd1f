"""`diagnose`: all that the doctor looks at, and what follows from it."""

from dataclasses import dataclass

import torch

from ..errors import SEE_DOCTOR, UnsupportedError
from ..plugin.adapters.versions import MINIMA, require_peft
from ..results import OnProgress, Result
from .caches import Cache, caches, has_token
from .engines import LAYER, EngineTrial, try_engines
from .machine import Device, Processor, devices, processor
from .packages import DISTRIBUTION, Package, packages, what_extras_bring

_WHAT_FOR = {
    "cpu": "Numba's kernels, without which integers are slow",
    "onnx": "`export --to onnx`, and what runs it",
    "openvino": "the engine of that name, and `export --to openvino`",
    "eval": "`evaluate` and plots",
    "space": "the page in the browser",
    "train": "TensorBoard's logs",
}


@dataclass(frozen=True, kw_only=True)
class Remedy(Result):
    """Something that is missing or does not fit.

    Args:
        what (`str`): is wrong, and what it costs.
        command (`str`, *optional*): that puts it right; None where no command can.
        serious (`bool`): the package does not work as it was tested; otherwise something is slower or left out.
    """

    what: str
    command: str | None
    serious: bool


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Result):
    """What `diagnose` found.

    Args:
        fits (`bool`): nothing serious is among the remedies.
        packages (`list[Package]`): with their supported ranges; empty where the metadata is not installed.
        processor (`Processor`), devices (`list[Device]`): of this machine.
        layer (`str`): on which the engines were tried.
        engines (`list[EngineTrial]`): every engine on every device, and torch's float layers.
        caches (`list[Cache]`): with their sizes.
        hub_token (`bool`): whether there is one; never what it is.
        remedies (`list[Remedy]`): what is missing, and the commands that bring it, the serious ones first.
    """

    fits: bool
    packages: list[Package]
    processor: Processor
    devices: list[Device]
    layer: str
    engines: list[EngineTrial]
    caches: list[Cache]
    hub_token: bool
    remedies: list[Remedy]


def diagnose(*, timed: bool = True, on_progress: OnProgress | None = None) -> Diagnosis:
    """Look at versions, processor, devices, engines and caches of this machine; nothing is sent anywhere.

    Kernels that were never compiled here are compiled, which takes half a minute once.

    Args:
        timed (`bool`): also time the engines on one layer, a second or two.
        on_progress (`OnProgress`, *optional*): called with (done, total, part=…) after each engine.

    Example:
        >>> from diffusers_msfp.doctor import diagnose
        >>> diagnose(timed=False).fits
        True
    """
    found, machine, present = packages(), processor(), devices()
    engines = try_engines([torch.device(each.device) for each in present], timed=timed, on_progress=on_progress)
    kept = caches()
    remedies = _remedies(found, machine, present, engines, kept)
    return Diagnosis(
        fits=not any(remedy.serious for remedy in remedies),
        packages=found or [],
        processor=machine,
        devices=present,
        layer=LAYER,
        engines=engines,
        caches=kept,
        hub_token=has_token(),
        remedies=sorted(remedies, key=lambda remedy: not remedy.serious),
    )


def _remedies(
    found: list[Package] | None,
    machine: Processor,
    present: list[Device],
    engines: list[EngineTrial],
    kept: list[Cache],
) -> list[Remedy]:
    remedies = []
    if found is None:
        what = f"{DISTRIBUTION} is on the path but was never installed, so its supported versions are not known"
        remedies.append(Remedy(what=what, command="pip install -e .", serious=True))
    for package in found or ():
        if not package.fits and package.name == "python":
            what = f"Python must be {package.supported}, but is {package.installed}"
            remedies.append(Remedy(what=what, command=None, serious=True))
        elif not package.fits:
            actual = package.installed if package.installed else "missing or damaged"
            what = f"{package.name} must be {package.supported or 'installed'}, but is {actual}"
            remedies.append(Remedy(what=what, command=package.command, serious=package.required))
    for extra, missing in what_extras_bring(found or []).items():
        names = ", ".join(package.name for package in missing)
        what = f"{names} not installed: {_WHAT_FOR.get(extra, f'what the extra `{extra}` brings')}"
        remedies.append(Remedy(what=what, command=missing[0].command, serious=False))
    for library in MINIMA:
        try:
            require_peft(library)
        except UnsupportedError as error:
            what = str(error).partition(f" {SEE_DOCTOR}")[0].rstrip(".")
            remedies.append(Remedy(what=what, command=None, serious=False))
    if not machine.int8_operators:
        what = "this build of torch has no 8-bit operators of oneDNN, so 4-bit layers run as bfloat16 or float32"
        remedies.append(Remedy(what=what, command=None, serious=False))
    for name, value in machine.limited_by.items():
        what = f"{name}={value} holds torch or oneDNN to these instructions, and layers to their speed"
        remedies.append(Remedy(what=what, command=f"unset {name}", serious=False))
    for device in present:
        if not device.measured:
            what = f"{device.device} ({device.name}) is a kind of device that was never measured: expect no speed there"
            remedies.append(Remedy(what=what, command=None, serious=False))
    for trial in engines:
        if trial.failed:
            what = f"{trial.engine} on {trial.device} {trial.refusal}"
            remedies.append(Remedy(what=what, command=None, serious=trial.engine == "reference"))
    for cache in kept:
        if not cache.writable:
            what = f"{cache.path} cannot be written, so each process makes anew: {cache.what}"
            remedies.append(Remedy(what=what, command=None, serious=False))
    return remedies
