"""Pipelines in turns: what is shown is what the pipeline itself would draw, for every visitor."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_condition_unet, make_dit_pipe, make_unet, make_vae
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline

from diffusers_msfp.errors import ConfigError
from diffusers_msfp.sampling.calls import unseen
from diffusers_msfp.space.candidate import SOLVERS, Candidate, require_comparable
from diffusers_msfp.space.denoise import denoise, side_by_side


def text_pipe() -> StableDiffusionPipeline:
    """Takes prompts, but has no text encoder to read them; enough to be asked what it takes."""
    return StableDiffusionPipeline(
        make_vae(), None, None, make_condition_unet(), PNDMScheduler(), None, None, requires_safety_checker=False
    )


def call(seed: int = 0, steps: int = 4) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"generator": generator, "num_inference_steps": steps, "output_type": "np", "batch_size": 1}


@pytest.mark.parametrize("scheduler", [*SOLVERS.values(), PNDMScheduler], ids=lambda s: s.__name__)
def test_steps_end_in_the_pipelines_own_picture(packed_pipe, scheduler):
    before = packed_pipe.scheduler
    steps = list(denoise(packed_pipe, scheduler, call()))
    assert [step.index for step in steps] == list(range(1, steps[-1].total + 1))
    assert [step.finished for step in steps] == [False] * (len(steps) - 1) + [True]
    assert all(step.picture.shape == (8, 8, 3) and 0 <= step.picture.min() <= step.picture.max() <= 1 for step in steps)
    assert all(step.seconds > 0 for step in steps)
    assert steps[0].timestep > steps[-1].timestep
    assert packed_pipe.scheduler is before
    assert "step" not in vars(before)
    own = DDPMPipeline(packed_pipe.unet, scheduler.from_config(before.config))
    step = own.scheduler.step
    own.scheduler.step = lambda *args, **_: step(*args)  # not all take a generator
    own.set_progress_bar_config(disable=True)
    assert np.array_equal(steps[-1].picture, own(**call()).images[0])


@pytest.mark.parametrize("scheduler", SOLVERS.values(), ids=lambda s: s.__name__)
def test_previews_are_the_denoised_sample_not_the_noise(embedded, scheduler):
    """Halfway, the estimate is nearer to the end than the noisy sample can be."""
    steps = list(denoise(embedded, scheduler, call(steps=8)))
    distance = [np.square(step.picture - steps[-1].picture).mean() for step in steps]
    assert distance[4] < 0.5 * distance[0]
    dark = steps[-1].picture < 0.05  # the background: noise would light half of it
    assert steps[4].picture[dark].mean() < 0.1


def test_both_see_the_same_noise_and_take_turns(packed_pipe):
    turns = list(side_by_side([packed_pipe, packed_pipe], SOLVERS["DDIM"], call))
    assert len(turns) == 4
    for first, second in turns:
        assert (first.index, first.timestep) == (second.index, second.timestep)
        assert np.array_equal(first.picture, second.picture)


def test_visitors_at_once_get_what_they_get_alone(packed_pipe):
    """One model, several threads; pictures are bit for bit those of a run alone."""

    def draw(seed: int) -> np.ndarray:
        *_, last = side_by_side([packed_pipe], SOLVERS["DDIM"], lambda: call(seed, steps=6))
        return last[0].picture

    alone = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as visitors:
        together = list(visitors.map(draw, range(4)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not np.array_equal(alone[0], alone[1])


def test_leaving_early_ends_the_threads(packed_pipe):
    before = threading.active_count()
    run = side_by_side([packed_pipe, packed_pipe], SOLVERS["DDIM"], lambda: call(steps=500))
    next(run)
    assert threading.active_count() == before + 2
    run.close()
    assert threading.active_count() == before


def test_errors_of_a_pipeline_reach_the_visitor(packed_pipe):
    with pytest.raises(TypeError, match="nonsense"):
        list(denoise(packed_pipe, SOLVERS["DDIM"], {"nonsense": 1}))


def test_latents_are_decoded_a_few_times():
    pipe = make_dit_pipe()
    candidate = Candidate(pipe)
    make_call = candidate.request(seed=1, num_inference_steps=12, class_label=7, guidance_scale=2.0)
    steps = list(denoise(pipe, DPMSolverMultistepScheduler, make_call()))
    shown = [step.index for step in steps if step.picture is not None]
    assert shown == [3, 6, 9, 12]
    assert {step.picture.shape for step in steps if step.picture is not None} == {steps[-1].picture.shape}
    assert not candidate.draws_small


def test_inputs_are_what_the_pipeline_takes(tiny_pipe, packed_pipe):
    plain, by_class, by_text = Candidate(tiny_pipe), Candidate(make_dit_pipe()), Candidate(text_pipe())
    assert (plain.classes, plain.guidance_scale, "prompt" in plain.parameters) == ([], None, False)
    assert list(plain.schedulers) == ["DDIM", "DPM-Solver++", "UniPC"]
    assert plain.draws_small
    assert (len(by_class.classes), by_class.guidance_scale) == (1000, 4.0)
    assert (by_text.classes, by_text.guidance_scale) == ([], 7.5)
    assert list(by_text.schedulers) == ["PNDM", "DDIM", "DPM-Solver++", "UniPC"]
    made = by_text.request(seed=3, num_inference_steps=2, prompt="a fox", negative_prompt="rain", guidance_scale=5.0)()
    assert (made["prompt"], made["negative_prompt"], made["guidance_scale"]) == (["a fox"], ["rain"], 5.0)
    assert made["generator"].initial_seed() == unseen(3)  # not the noise that fine-tuning with this seed has seen
    assert by_class.request(seed=3, num_inference_steps=2, class_label=5)()["class_labels"] == [5]
    assert (plain.name, Candidate(packed_pipe).name) == ("float32", "w4a4")
    assert plain.weight_bytes > 3 * Candidate(packed_pipe).weight_bytes


def test_named_classes_are_listed_by_name():
    pipe = make_dit_pipe()
    pipe.labels = {"zebra": 340, "ant": 310}
    assert Candidate(pipe).classes == [("ant", 310), ("zebra", 340)]


@pytest.mark.parametrize(
    ("make", "wishes", "message"),
    [
        (None, {"seed": -1}, "seed must be a whole number from 0 to 4294967295, but got -1"),
        (None, {"seed": 1.5}, "seed must be a whole number"),
        (None, {"seed": None}, "seed must be a whole number from 0 to 4294967295, but got None"),
        (None, {"seed": 2**32}, "seed must be a whole number"),
        (None, {"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, but got 0"),
        (make_dit_pipe, {"class_label": 1000}, "class must be one of the list, but got 1000"),
        (make_dit_pipe, {}, "class must be one of the list, but got None"),
        (text_pipe, {"prompt": " "}, "prompt must say what to draw, but it is empty"),
    ],
)
def test_wishes_that_cannot_be_met(tiny_pipe, make, wishes, message):
    candidate = Candidate(make() if make else tiny_pipe)
    with pytest.raises(ConfigError, match=message):
        candidate.request(**{"seed": 0, "num_inference_steps": 2} | wishes)


def test_only_like_is_compared_with_like(tiny_pipe):
    other = DDPMPipeline(make_unet(in_channels=1, out_channels=1), DDPMScheduler())
    require_comparable(Candidate(tiny_pipe), Candidate(tiny_pipe))
    with pytest.raises(ConfigError, match="must be a DDPMPipeline with 3 channels at 8.* with 1 channels at 8"):
        require_comparable(Candidate(tiny_pipe), Candidate(other))
