"""The page itself, in Gradio.

One visitor's run has the machine for itself, the others wait in the queue and see their place in it: the times shown
are then those of an undisturbed step. Only what the pipeline takes has an input.
"""

import importlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from ..errors import ConfigError, MSFPError
from ..evaluation.compare import psnr_db
from .contender import MAX_SEED, Contender
from .denoise import Step, side_by_side
from .markup import adapter_at, adapter_strip, beside, enlarge, figures_table, progress_line

# On ZeroGPU this must come before the first use of CUDA; elsewhere there is no need for it.
zero_gpu = importlib.import_module("spaces") if os.environ.get("SPACES_ZERO_GPU") else None

CSS = Path(__file__).with_name("page.css")
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # no download
KEPT_RESULTS = 12
MAX_STEPS = 100
DEFAULT_STEPS = 25
SECONDS_BETWEEN_PICTURES = 0.1
INTRO = """\
# {title}

Weights **and activations** of a diffusion model in 4-bit floating point, beside full precision, from the same noise.
Every layer has the number format that fits it; with timestep-aware adapters (TALoRA), every timestep has the adapter
that serves it. [How it works](https://arxiv.org/abs/2505.21591) · made with
[diffusers](https://github.com/huggingface/diffusers) and `diffusers-msfp`
"""


def require_gradio():
    """The module `gradio`, an extra that takes seconds to import.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(
            'The page needs Gradio, but it is not installed: `pip install "diffusers-msfp[space]"`.'
        ) from error
    return gradio


class Show:
    """What happens when a visitor presses a button.

    Args:
        contenders (`list[Contender]`): the reference, if there is one, and the quantized pipeline last.
    """

    def __init__(self, contenders: list[Contender]) -> None:
        self.contenders, self.quantized = contenders, contenders[-1]
        self.run = zero_gpu.GPU(self.steps) if zero_gpu else self.steps

    def steps(self, scheduler: str, steps: int, wishes: dict) -> Iterator[tuple[Step, ...]]:
        """The run of all contenders; on ZeroGPU this is what gets the GPU."""
        make_call = self.quantized.request(steps=steps, **wishes)
        pipes = [contender.pipe for contender in self.contenders]
        yield from side_by_side(pipes, self.quantized.schedulers[scheduler], make_call)

    def generate(self, history: list, scheduler: str, steps: int, wishes: dict) -> Iterator[tuple]:
        """Values of pictures, progress, strip, figures, gallery and the visitor's history while a run goes on.

        Args:
            history (`list`): the visitor's results so far, `(picture, caption)`, latest first.
            scheduler (`str`): a name in the contender's `schedulers`.
            steps (`int`): denoising steps.
            wishes (`dict`): the other arguments of `Contender.request`.

        Raises:
            ConfigError: wishes that cannot be met.
        """
        if scheduler not in self.quantized.schedulers:
            choices = ", ".join(self.quantized.schedulers)
            raise ConfigError(f"The scheduler must be one of {choices}, but {scheduler!r} came.")
        visited, seconds, shown_at = [], [[] for _ in self.contenders], 0.0
        for step in self.run(scheduler, steps, wishes):
            now = step[-1]
            visited.append(now.timestep)
            for own, each in zip(seconds, step, strict=True):
                own.append(each.seconds)
            if now.finished:
                results = [each.picture for each in step]
                caption = f"seed {int(wishes['seed'])} · {scheduler}, {steps} steps"
                history = [(beside(results), caption), *history][:KEPT_RESULTS]
                pictures = self.pictures(step)
                yield pictures, progress_line(now, [], closeness(results)), self.strip(), self.figures(seconds), history
            elif perf_counter() - shown_at > SECONDS_BETWEEN_PICTURES:
                shown_at = perf_counter()
                adapters = [adapter_at(intervals, now.timestep) for intervals in self.quantized.intervals]
                yield self.pictures(step), progress_line(now, adapters), self.strip(visited), None, history

    def pictures(self, step: tuple[Step, ...]):
        """For the slider, or for one picture; None where there is no news."""
        if any(each.picture is None for each in step):
            return None
        images = tuple(enlarge(each.picture) for each in step)
        return images if len(images) > 1 else images[0]

    def strip(self, visited: list[float] = ()) -> str:
        """Adapters over timesteps; nothing where there are none."""
        return adapter_strip(self.quantized.intervals, visited) if self.quantized.intervals else ""

    def figures(self, seconds: list[list[float]] = ()) -> str:
        """The table; the first step's time is left out, as it includes reading the prompt."""
        times = [median(own[1:] or own) for own in seconds] or [None] * len(self.contenders)
        return figures_table(
            {c.name: (c.weight_bytes, c.memory_bytes, t) for c, t in zip(self.contenders, times, strict=True)}
        )


def closeness(results: list) -> float | None:
    """PSNR of two pictures; None for one."""
    if len(results) < 2:
        return None
    first, second = (torch.from_numpy(picture)[None] for picture in results)
    return psnr_db(first, second).item()


def build_page(title: str, quantized: Contender, reference: Contender | None = None):
    """The page of a quantized pipeline.

    Args:
        title (`str`): heading.
        quantized (`Contender`): what is shown.
        reference (`Contender`, *optional*): full precision beside it.

    Returns:
        `gradio.Blocks`: to be started by `launch`.

    Raises:
        ConfigError: Gradio is not installed.
    """
    gr = require_gradio()
    show = Show([*([reference] if reference else []), quantized])
    crisp = ["msfp-crisp"] if quantized.draws_small else None
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        history = gr.State([])
        gr.Markdown(INTRO.format(title=title), elem_id="msfp-intro")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                wishes = _inputs(gr, quantized)
                steps = gr.Slider(1, MAX_STEPS, DEFAULT_STEPS, step=1, label="Steps")
                scheduler = gr.Dropdown(list(quantized.schedulers), label="Scheduler")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="msfp-generate")
                    stop = gr.Button("Stop", variant="stop")
            with gr.Column(scale=3, min_width=320):
                if reference:
                    label = f"{reference.name} (left) and {quantized.name} (right): drag the line"
                    pictures = gr.ImageSlider(label=label, format="png", interactive=False, elem_classes=crisp)
                else:
                    pictures = gr.Image(label=quantized.name, format="png", interactive=False, elem_classes=crisp)
                progress = gr.HTML(progress_line(None, []))
                strip = gr.HTML(show.strip(), visible=bool(quantized.intervals))
                figures = gr.HTML(show.figures())
        gallery = gr.Gallery(label="Your results", columns=4, object_fit="contain", interactive=False)

        def generate(past: list, scheduler: str, steps: int, *values) -> Iterator[tuple]:
            try:
                wanted = dict(zip(wishes, values, strict=True))
                for pictures, *texts, figures, results in show.generate(past, scheduler, steps, wanted):
                    news = [gr.skip() if value is None else value for value in (pictures, *texts, figures)]
                    yield *news, results, results
            except MSFPError as error:
                raise gr.Error(str(error), title="That cannot be drawn", print_exception=False) from error

        submits = [box.submit for name, box in wishes.items() if name in ("prompt", "negative_prompt", "seed")]
        run = gr.on(
            [start.click, *submits],
            generate,
            [history, scheduler, steps, *wishes.values()],
            [pictures, progress, strip, figures, gallery, history],
            show_progress_on=[pictures],
            trigger_mode="once",
            concurrency_limit=1,
            api_name="generate",
        )
        stop.click(None, cancels=run)
    return page


def _inputs(gr, contender: Contender) -> dict:
    """The components for what a pipeline takes; names are those of `Contender.request`."""
    inputs = {}
    if "prompt" in contender.parameters:
        inputs["prompt"] = gr.Textbox(label="Prompt", placeholder="What to draw", autofocus=True)
        if "negative_prompt" in contender.parameters:
            inputs["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="What to avoid")
    if contender.classes:
        inputs["class_label"] = gr.Dropdown(contender.classes, value=contender.classes[0][1], label="Class")
    if contender.guidance_scale is not None:
        inputs["guidance_scale"] = gr.Slider(1, 20, contender.guidance_scale, step=0.5, label="Guidance")
    inputs["seed"] = gr.Number(0, label="Seed", info="The same seed gives the same noise to both.")
    gr.Button("New seed", size="sm").click(lambda: random.randrange(MAX_SEED + 1), None, inputs["seed"], queue=False)
    return inputs


def launch(page, port: int | None = None) -> str:
    """Serve a page in the background.

    Args:
        port (`int`, *optional*): the first free one from 7860 on by default.

    Returns:
        `str`: its address.

    Raises:
        ConfigError: the port is in use.
    """
    gr = require_gradio()
    theme = gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=("ui-monospace", "monospace"))
    try:
        page.queue(max_size=64).launch(
            server_port=port, css=CSS.read_text(encoding="utf-8"), theme=theme, show_error=True, quiet=True,
            prevent_thread_lock=True, footer_links=[],
        )  # fmt: skip
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise ConfigError(
            f"The page needs a free port, but {port or 'every one from 7860 on'} is in use. Choose another with "
            f"`--port`."
        ) from error
    return page.local_url
