"""Models that call the timestep something else or count it upwards, outputs of other names, samplers of one step."""

import copy
from itertools import pairwise

import pipelines
import pytest
import torch
from conftest import ONE_BLOCK, make_unet
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    RePaintScheduler,
    UNet2DModel,
)
from torch import nn

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    RoundingConfig,
    TemporalConfig,
    calibration_state,
    finetune,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
)
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.cli import quantize
from diffusers_msfp.errors import NothingToDoError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.methods.temporal.features import temporal_features
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.sampling.denoisers import model_output
from diffusers_msfp.sampling.timestep import timestep_argument

ONE = {"num_inference_steps": 1, "num_samples": 2}


def observing(model) -> nn.Module:
    quantize_model(model, MSFPConfig("w8a8"))
    assert calibration_state(model) == "observing"
    return model


@torch.no_grad()
@pytest.mark.situation("a run of `StableCascadeUNet`, which takes a `timestep_ratio`", "right")
def test_observation_of_a_cascade_ends():
    pipe = pipelines.make_cascade()
    prior = observing(pipe.prior_prior)
    arguments = {"sample": torch.randn(1, 16, 4, 4), "clip_text_pooled": torch.randn(1, 1, 16)}
    for ratio in (1.0, 0.5):
        prior(timestep_ratio=torch.tensor([ratio]), **arguments)
    assert calibration_state(prior) == "observing"
    prior(timestep_ratio=torch.tensor([1.0]), **arguments)
    assert calibration_state(prior) == "frozen"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("sampler", ["DPM2 a Karras", "RePaint", "img2img"])
@pytest.mark.situation("samplers whose timestep rises on the way (midpoints, RePaint's jumps)", "right")
def test_a_run_is_observed_to_its_end(images, sampler):
    if sampler == "RePaint":
        scheduler = RePaintScheduler()
        scheduler.set_timesteps(50, jump_length=5, jump_n_sample=3)
        falling = [float(after) for before, after in pairwise(scheduler.timesteps) if after < before]
        steps = [float(scheduler.timesteps[0]), *falling]  # others undo steps, without the model
        lowest = min(steps)
    else:
        scheduler = KDPM2AncestralDiscreteScheduler(use_karras_sigmas=True)
        scheduler.set_timesteps(20)
        steps = [float(t) for t in scheduler.timesteps]
        lowest = steps[-1]
    assert any(after > before for before, after in pairwise(steps))
    tracked, model = [], observing(make_unet(**ONE_BLOCK))
    for timestep in steps:
        model(images, timestep)
        tracked.append(calibration_state(model))
    seen = steps[: tracked.index("frozen")] if "frozen" in tracked else steps
    assert min(seen) <= max(10 * lowest, 0.1 * steps[0])
    model(images, 300 if sampler == "img2img" else 999)
    assert calibration_state(model) == "frozen"


class Rising(nn.Module):
    """As Z-Image and Lumina: `t` counts from 0 (noise) to 1, and each sample is an output of its own."""

    def __init__(self):
        super().__init__()
        self.unet = make_unet()
        self.config, self.dtype = self.unet.config, torch.float32

    def forward(self, x, t, return_dict=True):
        return (list(self.unet(torch.stack(x), 1000 * (1 - t)).sample),)


@torch.no_grad()
@pytest.mark.situation("a model whose timestep is called `t` and rises", "right")
def test_observation_of_a_rising_timestep_ends(images, tmp_path):
    model = make_unet(**ONE_BLOCK)
    observing(model)
    for timestep in (0, 400, 800):
        model(images, timestep)
        assert calibration_state(model) == "observing"
    model.save_pretrained(tmp_path)  # it goes on after loading
    for each in (model, UNet2DModel.from_pretrained(tmp_path)):
        assert ModelRecord.of(each).calibration.first_timestep == 0
        each(images, 0)
        assert calibration_state(each) == "frozen"
    assert timestep_argument(Rising()) == ("t", 1)
    assert model_output(Rising()(list(images), 0.5)).shape == images.shape


@torch.no_grad()
@pytest.mark.situation("a denoiser that serves the beginning of runs alone, as Wan 2.2's for high noise", "right")
def test_observation_of_the_beginning_of_runs_ends(images):
    model = observing(make_unet(**ONE_BLOCK))
    for timestep in (999, 999, 960, 960, 920, 920, 880, 880):  # guidance calls it twice
        model(images, timestep)
        assert calibration_state(model) == "observing"
    model(images, 999)
    assert calibration_state(model) == "frozen"


@torch.no_grad()
@pytest.mark.situation("a few calls by hand before the first run", "right")
def test_calls_before_a_run_do_not_end_it(images):
    model = observing(make_unet(**ONE_BLOCK))
    for timestep in (10, 500, 999, 600, 300):
        model(images, timestep)
    assert calibration_state(model) == "observing"
    model(images, 999)
    assert calibration_state(model) == "frozen"


def lcm():
    pipe = pipelines.make_pipe(pipelines.SMALL | {"time_cond_proj_dim": 8})
    pipe.scheduler = LCMScheduler(num_train_timesteps=1000)
    return pipe


def turbo():
    pipe = pipelines.make_small_pipe()
    pipe.scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    return pipe


ONE_STEP = {
    "LCM": (lcm, {"prompts": ["a hat"]}),
    "turbo": (turbo, {"prompts": ["a hat"], "guidance_scale": 0.0}),
    "consistency": (lambda: ConsistencyModelPipeline(make_unet(**ONE_BLOCK), CMStochasticIterativeScheduler()), {}),
    "a single step of DDIM": (lambda: DDPMPipeline(make_unet(**ONE_BLOCK), pipelines.DDIMScheduler()), {}),
}


@pytest.mark.parametrize("kind", ONE_STEP)
@pytest.mark.situation("every verb on a sampler of one step (LCM, turbo, consistency)", "right")
def test_one_step(kind):
    make, arguments = ONE_STEP[kind]
    teacher = make()
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a4", **ONE, **arguments)
    assert calibration_state(pipe) == "frozen"
    before = compare_pipelines(teacher, pipe, **ONE, **arguments)
    assert len(before.eps_rel_l2_by_timestep) == 1
    config = TemporalConfig(num_inference_steps=1, iterations=4, cache_above=0.0)
    if kind == "LCM":  # its embedding depends on the guidance too
        with pytest.raises(NothingToDoError, match="there is nothing to maintain"):
            maintain_temporal(pipe, teacher, config, **arguments)
    else:
        figures = maintain_temporal(pipe, teacher, config, **arguments)
        assert len(figures.timesteps) == 1
        errors = temporal_features(teacher, pipe, num_inference_steps=1, **arguments)
        assert max(max(by_timestep.values()) for by_timestep in errors.values()) < 2e-3
    rounding = RoundingConfig(num_inference_steps=1, num_samples=2, batch_size=2, iterations=2)
    assert learn_rounding(pipe, teacher, rounding, **arguments).parts
    tuning = FinetuneConfig(train_steps=2, batch_size=2, num_inference_steps=1, rank=2)
    assert finetune(pipe, teacher, tuning, **arguments).updates == 2
    assert compare_pipelines(teacher, pipe, **ONE, **arguments).eps_rel_l2 < 2 * before.eps_rel_l2


@pytest.mark.situation(
    "`quantize --recipe full --num-inference-steps 1`, also where nothing depends on the timestep alone", "right"
)
@pytest.mark.parametrize("kind", ["LCM", "a single step of DDIM"])
def test_full_recipe_of_one_step(kind, tmp_path):
    ONE_STEP[kind][0]().save_pretrained(tmp_path / "float")
    short = {"rounding": {"iterations": 2, "num_samples": 2, "batch_size": 2}, "talora": {"train_steps": 2}}
    short["talora"] |= {"batch_size": 2, "rank": 2}
    short["temporal"] = {"iterations": 2}
    source, out, prompts = str(tmp_path / "float"), tmp_path / "out", ["a hat"] if kind == "LCM" else None
    result = quantize(
        source, out, scheme="w4a4", recipe="full", settings=short, num_samples=2, num_inference_steps=1, prompts=prompts
    )
    assert [stage["stage"] for stage in result.stages] == ["temporal", "rounding", "talora", "correction"]
    assert ("left_out" in result.stages[0]["figures"]) == (kind == "LCM")
    assert calibration_state(DiffusionPipeline.from_pretrained(out)) == "frozen"


@torch.no_grad()
@pytest.mark.situation("a one-step sampler without `calibrate`: no end of a run can be seen", "right")
def test_endless_observation_is_told(images, caplog):
    model = observing(make_unet(**ONE_BLOCK))
    for _ in range(40):
        model(images[:1], 999)
    assert caplog.text.count("where a sampler makes one step, the end of a run cannot be seen") == 1
