"""`bench`: how fast a model's step is in several ways; `warmup`: what its first one would have to wait for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ..checkpoint.digest import fingerprint
from ..engines import kernels, openvino, tuning
from ..engines.choose import set_engine
from ..engines.kernels.ahead import compile_kernels
from ..errors import UnsupportedError
from ..evaluation.timing.shapes import SHAPES
from ..evaluation.timing.speed import Timing, benchmark, example_inputs
from ..methods.routes import distinct_timesteps
from ..results import Result
from ..sampling.calls import require_positive
from ..sampling.observation import quantized_models
from ..sampling.timestep import timestep_argument
from .shared.load import SourceError, load_any, loading_in, require_variant
from .shared.terminal import progress, stderr

DEFAULT_PROVIDERS = ("fp32", "bf16", "w4a4", "w4a8")


@dataclass(frozen=True, kw_only=True)
class Bench(Result):
    """What `bench` timed.

    Args:
        model (`str`): as it was named.
        checkpoint (`str`, *optional*): its `fingerprint`; None for a float model.
        threads (`int`): of torch.
        rows (`list[Timing]`): the baseline first.
        measured (`Mapping[str, Mapping[str, float]]`): what was asked of this machine, now or before, to choose the
            fastest way of computing a layer, a norm or attention → way → seconds.
    """

    model: str
    checkpoint: str | None
    threads: int
    rows: list[Timing]
    measured: Mapping[str, Mapping[str, float]]


def bench(
    model: str = "ddpm-cifar10",
    providers: list[str] | None = None,
    *,
    batch: int = 1,
    size: int | None = None,
    num_inference_steps: int = 1,
    repeats: int = 7,
    variant: str | None = None,
    skip_missing: bool = False,
) -> Bench:
    """Time one denoising step.

    Args:
        model (`str`): a name in `SHAPES`, or a folder or Hub id of a pipeline or model, float or quantized.
        providers (`list[str]`, *optional*): see `evaluation.timing.providers`.
        batch, size: of the samples.
        num_inference_steps (`int`): denoising steps that are timed as one.
        repeats (`int`): timed rounds.
        variant (`str`, *optional*): of the weights of a folder or Hub id.
        skip_missing (`bool`): leave out peers that are not installed or cannot run the model, instead of refusing.

    Raises:
        MSFPError: an unknown model or provider.
    """
    with stderr.status(f"preparing {model}"):
        loaded = _load(model, variant)
    measured = fingerprint(quantized_models(loaded))
    names = providers or (("msfp",) if measured else DEFAULT_PROVIDERS)
    with progress("timing steps") as report:
        rows = benchmark(
            loaded,
            names,
            batch=batch,
            size=size,
            num_inference_steps=num_inference_steps,
            repeats=repeats,
            skip_missing=skip_missing,
            on_progress=report,
        )
    return Bench(
        model=model,
        checkpoint=measured,
        threads=torch.get_num_threads(),
        rows=rows,
        measured=tuning.measured(),
    )


@dataclass(frozen=True, kw_only=True)
class Warmup(Result):
    """What `warmup` compiled and timed.

    Args:
        kernels (`str`): `"numba"`, or `"torch"`, which has nothing to compile.
        seconds (`float`): of all of them.
        seconds_by_kernel (`Mapping[str, float]`): next to nothing where a kernel had been compiled before.
        steps (`Mapping[str, Mapping[str, float]]`): denoiser → `"layers"` or `"openvino"` → seconds of a step; empty
            without a model, or where there is nothing to choose from.
        refused (`Mapping[str, str]`): denoiser → why OpenVINO cannot run it as a graph, or why that is not known.
    """

    kernels: str
    seconds: float
    seconds_by_kernel: Mapping[str, float]
    steps: Mapping[str, Mapping[str, float]]
    refused: Mapping[str, str]


def warmup(model: str | None = None, *, batch: int = 1, size: int | None = None, dtype: str = "float32") -> Warmup:
    """Compile the CPU kernels now, for this user on this machine, so that no first picture waits for it.

    With a quantized model, what its steps are computed by is measured too; if OpenVINO is installed, also whether they
    are faster as a graph of it, which is compiled. Such models take the faster way when they are loaded in this dtype.

    Args:
        model (`str`, *optional*): folder or Hub id of a quantized pipeline or model.
        batch (`int`): samples of a step; with guidance, two for each picture.
        size (`int`, *optional*): of the samples, height and width as the denoiser sees them; by default its own.
        dtype (`str`): that the model will run in.

    Raises:
        MSFPError: no such model, or none that is quantized.
    """
    require_positive(batch=batch)
    in_dtype = loading_in(dtype)
    with progress("compiling kernels") as report:
        seconds = compile_kernels(report)
    steps, refused = {}, {}
    for denoiser in denoisers_in(model, **in_dtype) if model else ():
        name, inputs = type(denoiser).__name__, example_inputs(denoiser, batch, size)
        if isinstance(denoiser, UNet2DModel | UNet2DConditionModel):  # whose pipelines give one for all samples
            inputs["timestep"] = inputs["timestep"][0]
        inputs = {key: x.to(denoiser.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
        set_engine(denoiser, "auto")  # whatever the environment says: for that the answers are kept
        with stderr.status(f"timing {name}"), torch.no_grad():
            denoiser(**inputs)
            tuning.store()
            if openvino.why_missing() is not None:
                continue
            try:
                steps[name] = openvino.compare(denoiser, inputs, distinct_timesteps(denoiser))
            except UnsupportedError as reason:  # adapters that read floats, hooks: its layers are warm all the same
                refused[name] = str(reason)
    return Warmup(
        kernels=kernels.NAME, seconds=sum(seconds.values()), seconds_by_kernel=seconds, steps=steps, refused=refused
    )


def denoisers_in(model: str, **loading: Any) -> list[Any]:
    """Quantized models that take a timestep."""
    found = [each for each in quantized_models(load_any(model, **loading)) if timestep_argument(each).name is not None]
    if not found:
        raise SourceError(f"`warmup` times quantized denoisers, but {model} has none. Quantize it, or leave it out.")
    return found


def _load(model: str, variant: str | None) -> Any:
    if model in SHAPES:
        torch.manual_seed(0)
        return SHAPES[model]().eval()
    require_variant(variant, model)
    return load_any(model, variant=variant)
