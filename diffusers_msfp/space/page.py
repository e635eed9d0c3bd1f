"""The page itself, in Gradio.

One visitor's run has the machine for itself, the others wait in the queue and see their place in it: the times shown
are then those of an undisturbed step. Only what the pipeline takes has an input. The keyboard reaches everything, the
line between the pictures by a slider of its own, as that of Gradio's component answers to pointers only.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import SEE_DOCTOR, ConfigError, MSFPError
from ..layers.convert import quant_layers
from .candidate import MAX_SEED, Candidate
from .markup import STOPPED, names_line
from .show import DEFAULT_STEPS, Show

CSS = Path(__file__).with_name("page.css")
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # no download
MAX_STEPS = 100
MAX_WAITING = 64  # visitors
SECONDS_FILES_STAY = 3600
SILENT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
ON_START = (
    "(...values) => { window.msfpRuns = true;"
    " document.querySelector('#msfp-pictures').scrollIntoView({block: 'nearest'}); return values }"
)
ONE_RUN = """() => {
    const guard = event => {
        const asks = event.key === 'Enter' ? event.target.matches('input, textarea')
            : event.type === 'click' && event.target.closest('#msfp-generate')
        if (asks && window.msfpRuns) event.stopImmediatePropagation()
    }
    for (const type of ['click', 'keydown', 'keypress']) document.addEventListener(type, guard, true)
}"""  # Gradio's own guard also swallows the first click after a stop
IDLE = "() => { window.msfpRuns = false }"
INTRO = "Weights{} of a diffusion model in low-bit floating point, a number format for every layer"
ACTIVATIONS = " **and activations**"
BESIDE = ", beside full precision from the same noise"
ADAPTED = " A router gives every timestep the adapter that serves it (TALoRA)."
LINKS = (
    " [How it works](https://arxiv.org/abs/2505.21591) · made with "
    "[diffusers](https://github.com/huggingface/diffusers) and `diffusers-msfp`"
)


def require_gradio() -> ModuleType:
    """The module `gradio`, an extra that takes seconds to import.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(
            f'The page needs Gradio, but it is not installed: `pip install "diffusers-msfp[space]"`. {SEE_DOCTOR}'
        ) from error
    return gradio


def build_page(title: str, quantized: Candidate, reference: Candidate | None = None) -> Any:
    """The page of a quantized pipeline, which is run once for it.

    Args:
        title (`str`): heading.
        quantized (`Candidate`): what is shown.
        reference (`Candidate`, *optional*): full precision beside it.

    Returns:
        `gradio.Blocks`: to be started by `launch`.

    Raises:
        ConfigError: Gradio is not installed.
    """
    gr = require_gradio()
    show = Show([*([reference] if reference else []), quantized])
    first = show.first_frame()
    look = {"format": "png", "interactive": False, "elem_id": "msfp-pictures", "buttons": ["fullscreen", "download"]}
    look |= {"elem_classes": ["msfp-crisp"] if quantized.draws_small else None}
    reads = any(layer.input_format is not None for _, layer in quant_layers(quantized.denoiser))
    intro = (
        INTRO.format(ACTIVATIONS if reads else "")
        + (BESIDE if reference else "")
        + "."
        + (ADAPTED if quantized.intervals else "")
        + LINKS
    )
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(SECONDS_FILES_STAY,) * 2) as page:
        history = gr.State([])
        gr.Markdown(f"# {title}\n\n{intro}", elem_id="msfp-intro")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                wishes = _inputs(gr, quantized)
                steps = gr.Slider(1, MAX_STEPS, DEFAULT_STEPS, step=1, label="Steps")
                scheduler = gr.Dropdown(list(quantized.schedulers), label="Scheduler")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=100, elem_id="msfp-generate")
                    stop = gr.Button("Stop", min_width=80)
                figures = gr.HTML(first.figures, padding=False)
            with gr.Column(scale=3, min_width=300):
                if reference:
                    gr.HTML(names_line(reference.name, quantized.name), padding=False)
                    pictures = gr.ImageSlider(first.pictures, label="Both", show_label=False, **look)
                    line = gr.Slider(0, 100, 50, step=1, label="Line between the two", buttons=[])
                    line.input(lambda at: gr.ImageSlider(slider_position=at), line, pictures, **SILENT)
                else:
                    pictures = gr.Image(first.pictures, label=quantized.name, **look)
                progress = gr.HTML(first.progress, padding=False)
                strip = gr.HTML(first.strip, padding=False, visible=bool(quantized.intervals))
        gr.Markdown("## Your results")
        gallery = gr.Gallery(
            label="Your results", show_label=False, format="png", interactive=False, elem_id="msfp-results"
        )

        def generate(past: list, scheduler: str, steps: int, *values: Any) -> Iterator[tuple]:
            try:
                for frame in show.frames(past, scheduler, steps, dict(zip(wishes, values, strict=True))):
                    yield *(gr.skip() if part is None else part for part in frame), frame.history
            except MSFPError as error:
                gr.Warning(str(error), title="That cannot be drawn")  # an error would cover the picture that is there
                yield (gr.skip(),) * 6

        submits = [box.submit for name, box in wishes.items() if name in ("prompt", "negative_prompt", "seed")]
        run = gr.on(
            [start.click, *submits],
            generate,
            [history, scheduler, steps, *wishes.values()],
            [pictures, progress, strip, figures, gallery, history],
            show_progress_on=[pictures],
            trigger_mode="multiple",
            concurrency_limit=1,
            api_name="generate",
            js=ON_START,
        )
        run.then(None, js=IDLE)
        stop.click(lambda: STOPPED, None, progress, cancels=run, js=IDLE, **SILENT)
    return page


def _inputs(gr: ModuleType, candidate: Candidate) -> dict:
    """The components for what a pipeline takes; names are those of `Candidate.request`."""
    inputs = {}
    if "prompt" in candidate.parameters:
        inputs["prompt"] = gr.Textbox(label="Prompt", placeholder="What to draw", autofocus=True)
        if "negative_prompt" in candidate.parameters:
            inputs["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="What to avoid")
    if candidate.classes:
        inputs["class_label"] = gr.Dropdown(candidate.classes, value=candidate.classes[0][1], label="Class")
    if candidate.guidance_scale is not None:
        inputs["guidance_scale"] = gr.Slider(1, 20, candidate.guidance_scale, step=0.5, label="Guidance")
    inputs["seed"] = gr.Number(0, label="Seed", info="Equal seeds give equal noise.")
    anew = gr.Button("New seed", size="sm")
    anew.click(lambda: random.randrange(MAX_SEED + 1), None, inputs["seed"], **SILENT)
    return inputs


def launch(page: Any, port: int | None = None) -> str:
    """Serve a page in the background.

    Args:
        port (`int`, *optional*): the first free one from 7860 on by default.

    Returns:
        `str`: its address.

    Raises:
        ConfigError: the port is in use.
    """
    gr = require_gradio()
    theme = gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=("ui-monospace", "monospace"))
    theme = theme.set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")  # enough contrast
    try:
        page.queue(max_size=MAX_WAITING).launch(
            server_port=port,
            css=CSS.read_text(encoding="utf-8"),
            js=ONE_RUN,
            theme=theme,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise ConfigError(
            f"The page needs a free port, but {port or 'every one from 7860 on'} is in use. Choose another: `--port N`."
        ) from error
    return page.local_url
