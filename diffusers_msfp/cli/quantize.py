"""`quantize`: from a float checkpoint to a packed one."""

import time
from pathlib import Path

from ..errors import ConfigError
from ..integration.config import MSFPConfig
from ..integration.in_memory import components_of, quantize_model
from ..schemes import DEFAULT_SCHEME
from ..workflow import calibrate, calibration_state
from ..workflow.convert import quant_layers
from ..workflow.sampling import require_positive
from .load import load_component, load_pipeline, model_bytes, refuse_quantized
from .store import check_target, peak_rss_bytes, write_checkpoint
from .terminal import progress, stderr


def quantize(
    source: str,
    out: str | Path,
    *,
    scheme: str = DEFAULT_SCHEME,
    calibration_samples: int = 64,
    steps: int = 20,
    seed: int = 0,
    prompts: list[str] | None = None,
    modules_to_not_convert: list[str] | None = None,
    scheme_overrides: dict[str, str] | None = None,
    components: list[str] | None = None,
    config: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Quantize a checkpoint and write the packed one.

    Weights are quantized layer by layer; then the pipeline's own sampler sets the activation ranges. A component on
    its own cannot be sampled, so its activations go on observing: they freeze after its first denoising run.

    Args:
        source (`str`): folder of a float pipeline or of one model, a Hub id, or a single-file checkpoint.
        out (`str` or `Path`): folder to write; appears only when everything has succeeded.
        scheme (`str`): name in `SCHEMES`.
        calibration_samples, steps, seed: for `calibrate`.
        prompts (`list[str]`, *optional*): for pipelines that take prompts.
        modules_to_not_convert, scheme_overrides, components: as in `MSFPConfig`.
        config (`str`, *optional*): folder or Hub id with the configs of a single file.
        overwrite (`bool`): replace `out` if it exists.

    Returns:
        `dict`: `scheme`, `components`, `layers`, `weight_bits_per_param` (packed codes and scales of the quantized
        weights), `bytes_before` and `bytes_after` (weight files of the quantized components), `seconds`,
        `seconds_calibration`, `seconds_search` (search and packing of the weights), `peak_rss_bytes`,
        `calibration_state`, `out`.

    Raises:
        MSFPError: `out` exists, or `source` cannot be quantized.
    """
    started = time.perf_counter()
    out = check_target(out, overwrite)
    require_positive(calibration_samples=calibration_samples, steps=steps)
    request = MSFPConfig(
        scheme=scheme,
        modules_to_not_convert=modules_to_not_convert,
        scheme_overrides=scheme_overrides,
        components_to_quantize=components,
    )
    refuse_quantized(source)
    path = Path(source)
    alone = path.is_dir() and not (path / "model_index.json").is_file()
    if alone and components:
        raise ConfigError(f"`components` selects parts of a pipeline, but {source} is a single model.")

    with stderr.status(f"loading {source}"):
        loaded = load_component(path) if alone else load_pipeline(source, config=config)
    models = {".": loaded} if alone else components_of(loaded, request)
    bytes_before = sum(model_bytes(source, model, name) for name, model in models.items())
    search_started = time.perf_counter()
    with progress("searching and packing weights") as report:
        for model in models.values():
            quantize_model(model, request, on_layer=report)
    seconds_search = time.perf_counter() - search_started

    calibration_started = time.perf_counter()
    if not alone and calibration_state(loaded) == "observing":
        with progress("calibrating activations") as report:
            calibrate(
                loaded,
                num_samples=calibration_samples,
                num_inference_steps=steps,
                prompts=prompts,
                seed=seed,
                on_step=report,
            )
    seconds_calibration = time.perf_counter() - calibration_started
    state = calibration_state(loaded)
    if state == "observing":
        stderr.print(
            "This model is no pipeline, so its activations could not be calibrated: they stay float during its first "
            "denoising run after loading, which sets their ranges."
        )
    layers = [layer for model in models.values() for _, layer in quant_layers(model)]
    bits = 8 * sum(layer.weight.numel() + 4 * layer.weight_scale.numel() for layer in layers)
    parameters = sum(rows * length for rows, length in (layer.matrix_shape for layer in layers))
    write_checkpoint(loaded, out)
    return {
        "scheme": scheme,
        "components": list(models),
        "layers": len(layers),
        "weight_bits_per_param": bits / parameters,
        "bytes_before": bytes_before,
        "bytes_after": sum(model_bytes(str(out), model, name) for name, model in models.items()),
        "seconds": time.perf_counter() - started,
        "seconds_calibration": seconds_calibration,
        "seconds_search": seconds_search,
        "peak_rss_bytes": peak_rss_bytes(),
        "calibration_state": state,
        "out": str(out),
    }
