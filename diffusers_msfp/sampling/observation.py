"""Calibration state of a model: `"observing"` its inputs or `"frozen"`.

While a model observes, its activations are float and each layer watches its input. A denoising run ends when the
timestep rises again after having fallen; the ranges then freeze before the new run's first step. The only thing that
knows the timestep is `RunTracker`, a forward pre-hook on the model.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..compat.diffusers import offloaded_groups
from ..compat.torch import pre_hooks, remove_hooks
from ..compat.wrappers import sees_through, unwrap
from ..errors import CheckpointError, StateError
from ..layers import QuantLayer
from ..layers.convert import prepare_layers, quant_layers
from .residual import follow_next_call, stop_following
from .timestep import Run, timestep_argument

logger = logging.getLogger(__name__)

ONE_STEP_CALLS = 32
"""After so many calls in a row at one timestep it is said how to end the observation."""
_FREEZING = threading.RLock()


@dataclass(frozen=True)
class Calibration:
    """How far a model's calibration has come; `calibration` in a checkpoint's record.

    Args:
        state (`str`): `"observing"` or `"frozen"`.
        last_timestep (`float`, *optional*): of the run that is being observed; None before its first step.
        has_fallen (`bool`): whether the timestep has fallen since observation began.
        first_timestep (`float`, *optional*): of a run that has only risen.

    Raises:
        CheckpointError: any other value.
    """

    state: str = "frozen"
    last_timestep: float | None = None
    has_fallen: bool = False
    first_timestep: float | None = None

    def __post_init__(self) -> None:
        numbers = all(isinstance(each, int | float | None) for each in (self.last_timestep, self.first_timestep))
        if self.state not in ("observing", "frozen") or not numbers or self.has_fallen not in (True, False):
            raise CheckpointError(f"`calibration` in config.json must say the state, but got {self!r}: damaged file.")

    @classmethod
    def from_dict(cls, record: object) -> "Calibration":
        """Read a record; keys that are not known are left out.

        Raises:
            CheckpointError: it is none.
        """
        if not isinstance(record, Mapping):
            raise CheckpointError(f"`calibration` in config.json must say the state, but got {record!r}.")
        return cls(**{key: value for key, value in record.items() if key in cls.__dataclass_fields__})

    def to_dict(self) -> dict:
        """In types that JSON knows; of a run only while there is one."""
        if self.state == "frozen":
            return {"state": self.state}
        return {key: value for key, value in asdict(self).items() if key != "first_timestep" or value is not None}


class RunTracker:
    """Forward pre-hook that freezes a model when its first denoising run is over.

    Some models count the timestep upwards, from the noise to the image; their run ends when it comes back to where it
    began. Threads that use one model at once have a run each.

    Args:
        last_timestep (`float`, *optional*): of the previous call; None before the first.
        has_fallen (`bool`): whether the timestep has fallen since observation began.
        first_timestep (`float`, *optional*): of a run that has only risen.
    """

    def __init__(
        self, last_timestep: float | None = None, has_fallen: bool = False, first_timestep: float | None = None
    ) -> None:
        first = last_timestep if first_timestep is None else first_timestep
        self._latest = Run(last_timestep, int(has_fallen), first, last_timestep)
        self._runs: dict[int | None, Run] = {None: self._latest}  # by thread; None: whichever calls first goes on
        self.paused = False

    def __getstate__(self) -> dict:
        return vars(self) | {"_runs": {None: self._latest}}  # threads are this process's

    @property
    def last_timestep(self) -> float | None:
        """Of the previous call."""
        return self._latest.last

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at the timestep of the coming call; a compiled model cannot change itself and is left alone."""
        if torch.compiler.is_compiling():
            return
        timestep = timestep_argument(model).of(args, kwargs)
        if self.paused or timestep is None:
            return
        now, thread = float(torch.as_tensor(timestep, device="cpu").max()), threading.get_ident()
        run = self._runs.pop(None, None) or self._runs.get(thread) or Run()
        others = [] if run.last is not None else list(self._runs.values())
        if run.is_over(now) or any(other.is_over(now, stopped=False) for other in others):
            freeze(model)
            return
        run.go_on(now)
        self._runs[thread] = self._latest = run
        if run.repeated == ONE_STEP_CALLS:
            logger.warning(
                "%s has been called %d times at timestep %g and at no other: where a sampler makes one step, the end "
                "of a run cannot be seen. Activations stay float until `freeze(pipe)` or `calibrate(pipe)`.",
                type(model).__name__,
                ONE_STEP_CALLS + 1,
                now,
            )

    def record(self) -> Calibration:
        """What a checkpoint keeps of it, to go on after loading."""
        run = self._latest
        return Calibration("observing", run.last, bool(run.falls), run.first if run.has_risen else None)


def tracker(model: nn.Module) -> RunTracker | None:
    """The model's tracker, if it is observing."""
    return next((hook for hook in pre_hooks(model) if isinstance(hook, RunTracker)), None)


def untrack(model: nn.Module) -> None:
    """Stop watching for the end of a run."""
    remove_hooks(model, lambda hook: isinstance(hook, RunTracker))
    stop_following(model)


def track(model: nn.Module, run: Calibration | None = None) -> None:
    """Watch for the end of a denoising run, and find what reads residual sums, if any layer of the model is observing.

    Args:
        run (`Calibration`, *optional*): as far as it has come.
    """
    untrack(model)
    if calibration_state(model) == "frozen":
        return
    follow_next_call(model)
    hook = RunTracker(run.last_timestep, run.has_fallen, run.first_timestep) if run else RunTracker()
    model.register_forward_pre_hook(hook, with_kwargs=True)


def calibration_of(model: nn.Module) -> Calibration:
    """How far the calibration of a model has come."""
    hook = tracker(model)
    return Calibration(calibration_state(model)) if hook is None else hook.record()


def quantized_models(model_or_pipe: object) -> Iterator[nn.Module]:
    """The model itself, or the components of a pipeline, that have quantized layers, without wrappers around them."""
    components = getattr(model_or_pipe, "components", None)
    candidates = components.values() if isinstance(components, dict) else [model_or_pipe]
    for part in candidates:
        model = unwrap(part) if isinstance(part, nn.Module) else None
        if model is not None and any(isinstance(m, QuantLayer) for m in model.modules()):
            yield model


def _require_quantized(model_or_pipe: object) -> list[nn.Module]:
    models = list(quantized_models(model_or_pipe))
    if not models:
        raise StateError(
            f"A model with quantized layers is needed, but {type(model_or_pipe).__name__} has none. Load it with "
            f"`quantization_config=MSFPConfig()` or call `quantize_pipeline(pipe, scheme)`."
        )
    return models


def calibration_state(model: nn.Module | DiffusionPipeline) -> str:
    """`"observing"` while activation ranges are being observed, `"frozen"` afterwards or where there are none.

    Args:
        model (`nn.Module` or pipeline): with quantized layers.

    Raises:
        StateError: it has none.

    Example:
        ```py
        assert calibration_state(pipe.unet) == "frozen"
        ```
    """
    models = _require_quantized(model)
    observing = any(layer.observing for m in models for _, layer in quant_layers(m))
    return "observing" if observing else "frozen"


@sees_through
def freeze(model: nn.Module) -> None:
    """End the observation now: choose every input's format, scale and zero point from what was seen.

    Args:
        model (`nn.Module` or pipeline): with quantized layers; nothing happens if it is already frozen.

    Raises:
        StateError: it has no quantized layers, quantizing it was stopped, or no input was ever seen.

    Example:
        ```py
        pipe = DiffusionPipeline.from_pretrained("model", quantization_config=MSFPConfig("w4a4"))
        pipe(num_inference_steps=20)
        freeze(pipe.unet)
        ```
    """
    with _FREEZING:
        _freeze(model)


def require_in_memory(model: nn.Module) -> None:
    """Refuse to set the ranges of layers that are offloaded: they would be lost."""
    elsewhere = offloaded_groups(model) in ("disk", "pinned")
    away = [name for name, layer in quant_layers(model) if elsewhere or layer.weight_scale.is_meta]
    if away and any(layer.scheme and layer.scheme.activation for _, layer in quant_layers(model)):
        raise StateError(f"Ranges are set in memory, but `{away[0]}` is offloaded. Calibrate first, and offload then.")


def require_finished(model: nn.Module, done: str) -> None:
    """Refuse a model of which some layers are still float because quantizing it was stopped.

    Args:
        done (`str`): what is to be done with the model, for the message.

    Raises:
        StateError: see above.
    """
    left = getattr(getattr(model, "hf_quantizer", None), "unfinished", None)
    if left:
        number = len(dict(quant_layers(model)))
        raise StateError(
            f"All layers of a {type(model).__name__} must have quantized weights for it to be {done}, but "
            f"{number} of {number + left} have: quantizing it was stopped. Call `quantize_pipeline` again with the "
            f"same scheme, which goes on, or `dequantize(pipe)`."
        )


def _freeze(model: nn.Module | DiffusionPipeline) -> None:
    models = _require_quantized(model)
    for m in models:
        require_finished(m, "frozen")
    for m in models:
        observing = [(name, layer) for name, layer in quant_layers(m) if layer.observing]
        if not observing:
            continue
        require_in_memory(m)
        if not any(int(layer.observation.count) for _, layer in observing if layer.observation is not None):
            raise StateError(
                f"Ranges need data, but no input of {type(m).__name__} has been seen. Run the pipeline once, or call "
                f"`calibrate(pipe)`."
            )
        if any(layer.sum_unknown and int(layer.observation.count) for _, layer in observing if layer.observation):
            logger.warning(
                "%s was compiled before its calibration, or not called as a whole, so layers that read residual sums "
                "could not be found, and get as few bits as the others. Call `calibrate(pipe)` before compiling.",
                type(m).__name__,
            )
        unseen = [name for name, layer in observing if not layer.freeze()]
        if unseen:
            logger.warning("%d layers were never used and keep a float input: %s.", len(unseen), ", ".join(unseen))
        untrack(m)
        prepare_layers(m)
        logger.info("%s: activation ranges of %d layers are frozen.", type(m).__name__, len(observing) - len(unseen))
