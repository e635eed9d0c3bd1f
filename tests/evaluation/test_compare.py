"""The comparison's figures are what their definitions say, and the real model's are as expected."""

import copy
import math

import pytest
import torch
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_msfp import quantize_pipeline
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.sampling.solvers import with_ddim


def noisy_twin(pipe, scale: float):
    twin = copy.deepcopy(pipe)
    twin.unet.conv_out.bias.data += scale
    return twin


def test_a_constant_shift_of_the_output_is_measured_exactly(tiny_pipe):
    result = compare_pipelines(tiny_pipe, noisy_twin(tiny_pipe, 0.5), num_samples=3, num_inference_steps=4)
    assert result.eps_mse == pytest.approx(0.25, rel=1e-5)
    scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config)
    scheduler.set_timesteps(4)
    x = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    energy, count = {}, 0
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            eps = tiny_pipe.unet(x, timestep).sample
            energy[f"{float(timestep):g}"] = eps.double().square().sum().item()
            count += eps.numel()
            x = scheduler.step(eps, timestep, x, eta=0.0).prev_sample
    assert result.eps_rel_l2 == pytest.approx(math.sqrt(0.25 * count / sum(energy.values())), rel=1e-4)
    assert list(result.eps_rel_l2_by_timestep) == list(energy)
    for timestep, value in result.eps_rel_l2_by_timestep.items():
        assert value == pytest.approx(math.sqrt(0.25 * (count / 4) / energy[timestep]), rel=1e-4)


def test_equal_pipelines(tiny_pipe):
    steps = []
    result = compare_pipelines(
        tiny_pipe, tiny_pipe, num_samples=2, num_inference_steps=2, on_progress=lambda *step: steps.append(step)
    )
    assert result.eps_mse == 0
    assert result.image_psnr_db == 100
    assert steps == [(1, 2), (2, 2)]


def test_psnr():
    a = torch.zeros(2, 4, 4, 1)
    b = a.clone()
    b[1] += 0.1
    assert psnr_db(a, b).tolist() == pytest.approx([100, 20], rel=1e-6)


def test_eta_adds_noise_and_other_predictions_keep_their_scheduler(tiny_pipe):
    candidate = noisy_twin(tiny_pipe, 0.1)
    still, noisy = (
        compare_pipelines(tiny_pipe, candidate, num_samples=1, num_inference_steps=3, eta=e) for e in (0, 1)
    )
    assert still.image_psnr_db != noisy.image_psnr_db
    flow = DDPMPipeline(make_unet(), FlowMatchEulerDiscreteScheduler())
    assert with_ddim(flow) is flow
    assert isinstance(with_ddim(tiny_pipe).scheduler, DDIMScheduler)
    assert isinstance(tiny_pipe.scheduler, DDPMScheduler)


def test_bad_requests_are_refused(tiny_pipe):
    other = DDPMPipeline(make_unet(out_channels=6), DDPMScheduler())
    with pytest.raises(ConfigError, match="Both denoisers must give the same shape"):
        compare_pipelines(tiny_pipe, other, num_samples=1, num_inference_steps=1)
    with pytest.raises(ConfigError, match="`num_samples` must be at least 1"):
        compare_pipelines(tiny_pipe, tiny_pipe, num_samples=0)


def test_the_real_model(embedded):
    """The order of the schemes on the embedded model, with room for other machines; figures are in model_cards."""
    errors = {}
    for scheme in ("w8a8", "w4a8", "w4a4", "w4a4-signed", "int-w4a4"):
        pipe = quantize_pipeline(copy.deepcopy(embedded), scheme, num_samples=8, num_inference_steps=10)
        result = compare_pipelines(embedded, pipe, num_samples=4, num_inference_steps=10)
        errors[scheme] = result.eps_rel_l2
        if scheme == "w8a8":
            assert result.image_psnr_db > 30
    assert errors["w8a8"] < 0.02
    assert errors["w4a8"] < 0.08
    assert errors["w4a4"] < 0.9 * errors["w4a4-signed"]
    assert errors["w4a4"] < errors["int-w4a4"] < 0.3
