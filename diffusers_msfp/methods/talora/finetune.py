"""`finetune`: every quantized denoiser of a pipeline, one after the other."""

from typing import Any

from diffusers import DiffusionPipeline

from ...compat.wrappers import sees_through
from ...sampling.denoisers import ByDenoiser, by_denoiser, each_quantized, work_folders
from .config import FinetuneConfig, Finetuned
from .finetuner import Finetuner


@sees_through
def finetune(
    pipe: DiffusionPipeline, teacher: DiffusionPipeline, config: FinetuneConfig | None = None, **arguments: Any
) -> Finetuned | ByDenoiser:
    """Fine-tune a quantized pipeline in place, with timestep-aware adapters (TALoRA) and an aligned loss (DFA).

    Args:
        pipe (`DiffusionPipeline`): quantized and calibrated, without timestep-aware adapters.
        teacher (`DiffusionPipeline`): the full-precision original; its scheduler draws the examples.
        config (`FinetuneConfig`, *optional*): settings.
        **arguments: further ones of `Finetuner`: `work_dir`, `prompts`, `on_progress`, `on_preview`, and those of the
            pipeline, e.g. `guidance_scale=…`.

    Returns:
        `Finetuned`; where several denoisers are quantized, which learn one after the other, a `ByDenoiser` of these.

    Raises:
        ConfigError: settings or pipelines that do not fit.
        StateError: the model is observing, offloaded, or has what this method forbids; the teacher is quantized.
        ShapeError: the teacher is another model. Nothing is changed after these.
        NonFiniteError: the loss is not finite; the model is as it was.

    Source:
        arXiv 2505.21591 (TALoRA and DFA) and 2310.03270 (distillation without data), as reconstructed.

    Example:
        ```py
        pipe = DiffusionPipeline.from_pretrained("model-w4a4")
        finetune(pipe, DiffusionPipeline.from_pretrained("model"), FinetuneConfig(minutes=30))
        pipe.save_pretrained("model-w4a4-talora")
        ```
    """
    views, on_preview = each_quantized(pipe, teacher), arguments.pop("on_preview", None)
    folders = work_folders(arguments.pop("work_dir", None), views)
    for view in list(views.values())[:-1]:  # all are checked before the first is changed; the last one below
        Finetuner(*view, config, **arguments).student.abandon()
    results = {}
    for name, view in reversed(views.items()):
        run = Finetuner(*view, config, work_dir=folders[name], on_preview=on_preview, **arguments)
        results[name] = run.run()
    return by_denoiser(dict(reversed(results.items())))
