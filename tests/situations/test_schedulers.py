"""Samplers: put in a pipeline's place, with noise of their own, with learned variances, with zero terminal SNR."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import make_dit_pipe, make_unet
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from pipelines import make_sd3, make_sdxl, make_small_pipe

from diffusers_msfp import quantize_pipeline
from diffusers_msfp.errors import ConfigError, NonFiniteError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.evaluation.layers import layer_snr
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.methods.correction.fit import CorrectionConfig, correct_output
from diffusers_msfp.methods.rounding.config import RoundingConfig
from diffusers_msfp.methods.rounding.learn import learn_rounding
from diffusers_msfp.methods.talora.config import FinetuneConfig
from diffusers_msfp.methods.talora.finetune import finetune
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.denoising_factor import denoising_factors
from diffusers_msfp.sampling.solvers import require_finite_steps, with_ddim, with_parts, with_sampler
from diffusers_msfp.sampling.trajectory import rollout
from diffusers_msfp.sampling.used_output import used_channels

TINY = {"block_out_channels": (16, 32), "attention_head_dim": 16}


def make_learned() -> DDPMPipeline:
    """Its UNet puts out a variance beside its prediction."""
    return DDPMPipeline(make_unet(**TINY, out_channels=6), DDPMScheduler(variance_type="learned_range"))


def make_doubled() -> DDPMPipeline:
    """A DiT, whose pipeline takes the first half of what it puts out."""
    return make_dit_pipe(out_channels=8, patch_size=2)


LEARNED = pytest.mark.parametrize(
    ("make", "last"), [(make_learned, "unet.conv_out"), (make_doubled, "transformer.proj_out_2")], ids=["unet", "dit"]
)


def unused_rows(pipe, last: str) -> torch.Tensor:
    """Output channels of the last layer that are not the prediction."""
    rows = torch.arange(layer_at(pipe, last).weight.shape[0])
    return rows[3:] if last.startswith("unet") else rows.view(4, 8)[:, 4:].flatten()


def layer_at(pipe, last: str) -> torch.nn.Module:
    model, _, name = last.partition(".")
    return getattr(pipe, model).get_submodule(name)


@pytest.mark.parametrize("make", [make_small_pipe, lambda: DDIMPipeline(make_unet(**TINY), DDIMScheduler())])
@pytest.mark.situation("a pipeline is compared with itself at `eta` 1, with noise in every step", "right")
def test_eta(make):
    pipe = make()
    noisy, calm = (
        compare_pipelines(pipe, pipe, num_samples=2, num_inference_steps=3, eta=eta, on_pictures=lambda *_: None)
        for eta in (1.0, 0.0)
    )
    assert noisy.image_psnr_db == calm.image_psnr_db == 100


@pytest.mark.situation("`eta` 1 puts noise into the steps of every pipeline, whatever its own default is", "right")
def test_eta_is_taken():
    pipe, drawn = DDIMPipeline(make_unet(**TINY), DDIMScheduler()), {}
    for eta in (0.0, 1.0):
        other = with_ddim(pipe, eta)
        generator = torch.Generator().manual_seed(0)
        drawn[eta] = other(generator=generator, num_inference_steps=3, output_type="np").images
    assert abs(drawn[0.0] - drawn[1.0]).max() > 0.05


@pytest.mark.situation("`eta` for a pipeline whose scheduler DDIM cannot replace", "refused")
def test_eta_of_a_flow():
    pipe = make_small_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="`eta` is DDIM's, but StableDiffusionPipeline keeps its own FlowMatchEuler"):
        compare_pipelines(pipe, pipe, eta=1.0)


@pytest.mark.situation("a pipeline with a config of its own (SDXL's empty prompts) is put on another sampler", "right")
def test_config_is_kept():
    pipe = make_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.set_progress_bar_config(leave=False)
    pipe.mine, before = object(), dict(pipe.config)
    other = with_ddim(pipe)
    assert type(other) is type(pipe)
    assert other.mine is pipe.mine
    assert other._progress_bar_config == {"leave": False}
    assert other.config.force_zeros_for_empty_prompt is False
    assert other.scheduler is not pipe.scheduler
    assert dict(pipe.config) == before
    assert all(other.components[name] is part for name, part in pipe.components.items() if name != "scheduler")
    small = with_ddim(make_small_pipe())
    assert small.config.requires_safety_checker is False
    assert small.config.scheduler == ("diffusers", "DDIMScheduler")


@pytest.mark.situation("fine-tuning draws previews with the student's pipeline on the teacher's sampler", "right")
def test_preview_keeps_the_config(packed_pipe, tiny_pipe):
    packed_pipe.mine = object()
    packed_pipe.set_progress_bar_config(leave=False)
    run = Finetuner(
        packed_pipe,
        with_ddim(tiny_pipe),
        FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2),
    )
    assert run.preview().shape == (8, 8, 8, 3)
    assert run._previewed.mine is packed_pipe.mine
    assert packed_pipe._progress_bar_config == {"leave": False}
    assert type(packed_pipe.scheduler) is DDIMScheduler
    run.student.abandon()


@pytest.mark.situation("a latent sampler that does not clip gives way to DDIM, which would by default", "right")
def test_ddim_clips_only_if_the_original_does():
    assert with_ddim(make_small_pipe()).scheduler.config.clip_sample is False
    assert with_ddim(DDPMPipeline(make_unet(**TINY), DDPMScheduler())).scheduler.config.clip_sample is True
    pipe = make_small_pipe()
    pipe.scheduler = EulerDiscreteScheduler()
    assert with_ddim(pipe).scheduler.config.clip_sample is False


@pytest.mark.parametrize(
    "scheduler",
    [
        LCMScheduler(),
        CogVideoXDDIMScheduler(),
        DDPMScheduler(beta_schedule="sigmoid"),
        EulerDiscreteScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        DDPMScheduler(variance_type="learned"),
        EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.situation("schedulers with DDIM's settings that DDIM does not stand for keep their place", "right")
def test_kept_schedulers(scheduler):
    pipe = DDPMPipeline(make_unet(**TINY), DDPMScheduler())
    pipe.scheduler = scheduler
    assert with_ddim(pipe) is pipe


@LEARNED
@pytest.mark.situation("a model that learns variances: only its prediction counts in errors", "right")
def test_learned_variance_in_errors(make, last):
    pipe = make()
    other, rows = copy.deepcopy(pipe), unused_rows(pipe, last)
    with torch.no_grad():
        layer_at(other, last).weight[rows] += 0.3
    found = compare_pipelines(pipe, other, num_samples=2, num_inference_steps=2)
    assert found.eps_mse == 0
    layers = layer_snr(pipe, other, num_samples=1, num_inference_steps=2)
    assert layers[last.partition(".")[2]].snr_db == 100
    with torch.no_grad():
        layer_at(other, last).weight[rows.min() - 1] += 0.3
    assert compare_pipelines(pipe, other, num_samples=2, num_inference_steps=2).eps_mse > 0
    assert layer_snr(pipe, other, num_samples=1, num_inference_steps=2)[last.partition(".")[2]].snr_db < 60


@LEARNED
@pytest.mark.situation("a model that learns variances: quantized, rounded, fine-tuned by its prediction alone", "right")
def test_learned_variance_in_losses(make, last):
    teacher = make()
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a4", num_samples=2, num_inference_steps=2)
    model, _, name = last.partition(".")
    step = rollout(teacher, call_arguments(teacher, None, 2, {}), 0, 1, 0)[0]
    assert step.output.shape[1] == (3 if model == "unet" else 4)
    used = used_channels(teacher, getattr(teacher, model), step.args, step.kwargs)
    assert used.layer == name
    expected = set(range(layer_at(teacher, last).weight.shape[0])) - set(unused_rows(teacher, last).tolist())
    assert set(used.channels.tolist()) == expected
    layer, rows = layer_at(pipe, last), unused_rows(teacher, last)
    before = layer.dequantize_weight()
    config = RoundingConfig(iterations=10, penalty=0, num_samples=2, num_inference_steps=2, batch_size=2)
    learn_rounding(pipe, teacher, config)
    assert torch.equal(layer.dequantize_weight()[rows], before[rows])

    def losses(shifted: torch.Tensor, blockwise: bool) -> list[float]:
        student = copy.deepcopy(pipe)
        with torch.no_grad():
            layer_at(student, last).bias[shifted] += 0.3
        config = FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2, blockwise=blockwise)
        return finetune(student, teacher, config).losses

    none, predicted = rows[:0], rows.min() - 1
    for blockwise in (False, True):
        assert losses(rows, blockwise) == losses(none, blockwise)
    assert losses(predicted, blockwise=False) != losses(none, blockwise=False)


@pytest.mark.situation("the denoising factor of a sampler with learned variances", "right")
def test_factor_of_learned_variance():
    learned, fixed = (DDPMScheduler(variance_type=kind) for kind in ("learned_range", "fixed_small"))
    assert denoising_factors(learned, 5) == denoising_factors(fixed, 5)


def zero_snr(cls: type = DDIMScheduler, **changes):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    return cls(**settings | changes)


@pytest.mark.situation("a candidate whose scheduler is set otherwise is compared on the reference's", "right")
def test_both_are_led_by_one_scheduler(caplog):
    pipe = make_sd3()
    pipe.set_progress_bar_config(disable=True)
    other, same = (copy.deepcopy(pipe) for _ in range(2))
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    same.scheduler.register_to_config(_use_default_values=["in", "any", "order"])
    arguments = {"num_samples": 1, "num_inference_steps": 2, "prompts": ["a hat"]}
    assert compare_pipelines(pipe, same, **arguments).image_psnr_db == 100
    assert not caplog.records
    for candidate in (other, with_parts(pipe, scheduler=LCMScheduler())):
        assert compare_pipelines(pipe, candidate, **arguments).image_psnr_db == 100
        assert "is set otherwise than the reference's FlowMatchEulerDiscreteScheduler" in caplog.text
        caplog.clear()
    assert other.scheduler.config.shift == 6


@pytest.mark.situation("timesteps of a user's own: on the pipeline's scheduler, which takes them", "right")
def test_own_timesteps():
    pipe = make_sdxl()
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    run = {"num_samples": 1, "num_inference_steps": 2, "prompts": ["a hat"], "timesteps": [900, 300]}
    result = compare_pipelines(pipe, pipe, **run)
    assert result.sampler == "EulerDiscreteScheduler"
    assert list(result.eps_rel_l2_by_timestep) == ["900", "300"]
    assert with_sampler(pipe, arguments={"sigmas": [1.0, 0.5]}) is pipe
    assert type(with_sampler(pipe, arguments={"sigmas": None}).scheduler) is DDIMScheduler
    corrected = quantize_pipeline(copy.deepcopy(pipe), "w4a8", **run)
    config = CorrectionConfig(num_samples=1, num_inference_steps=2)
    found = correct_output(corrected, pipe, config, prompts=["a hat"], timesteps=[900, 300])
    assert found.timesteps == [300, 900]


@pytest.mark.parametrize("more", [{"sampler": "ddim"}, {"eta": 1.0}])
@pytest.mark.situation("timesteps of a user's own for DDIM, which takes none", "refused")
def test_own_timesteps_for_ddim(more):
    pipe = make_sdxl()
    with pytest.raises(ConfigError, match="`timesteps` need a scheduler that takes them, but DDIMScheduler does not"):
        compare_pipelines(pipe, pipe, num_samples=1, timesteps=[900, 300], **more)


@pytest.mark.situation("zero terminal SNR where torch's default device is another one", "refused")
def test_zero_snr_on_another_default_device():
    with torch.device("meta"), pytest.raises(NonFiniteError, match="at timestep 999 it divides by zero"):
        require_finite_steps(zero_snr(), 3)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
@pytest.mark.situation("zero terminal SNR with a model that predicts the noise", "refused")
def test_zero_snr(cls):
    pipe = DDPMPipeline(make_unet(**TINY), zero_snr(cls))
    said = "at timestep 999 it divides by zero: it is set to `rescale_betas_zero_snr=True` with `prediction_type='eps"
    with pytest.raises(NonFiniteError, match=said):
        denoising_factors(pipe.scheduler, 3)
    with pytest.raises(NonFiniteError, match=said):
        quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=3)
    assert not any(isinstance(module, QuantLayer) for module in pipe.unet.modules())
    with pytest.raises(NonFiniteError, match=said):
        compare_pipelines(pipe, pipe, num_samples=1, num_inference_steps=3)


@pytest.mark.parametrize(
    "scheduler",
    [
        zero_snr(prediction_type="v_prediction"),
        zero_snr(timestep_spacing="leading"),
        zero_snr(clip_sample=True),
    ],
    ids=["v", "not visited", "clipped"],
)
@pytest.mark.situation("zero terminal SNR with v-prediction, or where its timestep is not visited or clipped", "right")
def test_finite_samplers(scheduler):
    pipe = DDPMPipeline(make_unet(**TINY), scheduler)
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=3)
    if not getattr(scheduler.config, "clip_sample", False):
        factors = denoising_factors(scheduler, 3)
        assert all(0 <= factor < float("inf") for factor in factors.values())


class Drawing(DDIMScheduler):
    """Its step draws from torch's own generator, as that of `DPMSolverSDEScheduler` does."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):  # noqa: ARG002
        made = super().step(model_output, timestep, sample)
        made.prev_sample = made.prev_sample + 0.1 * torch.randn(sample.shape)
        return made if return_dict else (made.prev_sample,)


@pytest.mark.situation("a pipeline is compared with itself on a sampler that draws from torch's own generator", "right")
def test_samplers_that_draw_from_the_global_generator():
    pipe = DDPMPipeline(make_unet(**TINY), Drawing())
    pipe.set_progress_bar_config(disable=True)
    result = compare_pipelines(pipe, pipe, sampler="own", num_samples=2, num_inference_steps=2)
    assert result.image_psnr_db == 100
    unclip = SimpleNamespace(prior_scheduler=pipe.scheduler, decoder_scheduler=pipe.scheduler)
    assert with_ddim(unclip) is unclip
