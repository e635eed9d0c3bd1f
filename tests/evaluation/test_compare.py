"""The comparison's figures are what their definitions say, and the real model's are as expected."""

import copy
import math

import pytest
import torch
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from matrix import SMALL
from pipelines import make_flux

from diffusers_msfp import denoising_factors, quantize_pipeline
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.evaluation.output_errors import OutputErrors
from diffusers_msfp.sampling.calls import unseen
from diffusers_msfp.sampling.denoising_factor import RunFactors
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
    x = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(unseen(0)))
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


SCHEMES = ("w8a8", "w4a4", "w4a4-signed", "int-w4a4")


@pytest.mark.parametrize("more", [(), pytest.param(("w8a8-wide", "w4a8", "w4a4-pure"), marks=pytest.mark.slow)])
def test_the_real_model(embedded, more):
    """The order of the schemes on the embedded model, with room for other machines; figures are in model_cards."""
    errors = {}
    for scheme in (*SCHEMES, *more):
        pipe = quantize_pipeline(copy.deepcopy(embedded), scheme, num_samples=4, num_inference_steps=5)
        result = compare_pipelines(embedded, pipe, num_samples=2, num_inference_steps=5)
        errors[scheme] = result.eps_rel_l2
        if scheme.startswith("w8a8"):
            assert result.image_psnr_db > 30
    assert errors["w8a8"] < 0.04
    assert errors["w4a4"] < 0.9 * errors["w4a4-signed"]
    assert errors["w4a4"] < errors["int-w4a4"] < 0.3
    if more:
        assert errors["w8a8-wide"] < 0.02
        assert errors["w4a8"] < 0.08
        assert errors["w4a4"] < 0.9 * errors["w4a4-pure"]


def test_the_trajectory_counts_errors_by_what_the_sampler_makes_of_them(tiny_pipe):
    """A model that is wrong at one timestep alone, by a constant."""

    def wrong_at(timestep: int) -> DDPMPipeline:
        other = copy.deepcopy(tiny_pipe)

        def distort(_model, args, kwargs, output):
            output.sample = output.sample + (1.0 if int(args[1]) == timestep else 0.0)
            return output

        other.unet.register_forward_hook(distort, with_kwargs=True)
        return other

    run = {"num_samples": 2, "num_inference_steps": 4}
    factors = denoising_factors(with_ddim(tiny_pipe).scheduler, 4)
    early, late = (compare_pipelines(tiny_pipe, wrong_at(t), **run) for t in (750, 0))
    assert early.eps_mse == pytest.approx(late.eps_mse, rel=1e-4)
    assert early.traj_rel_l2 / late.traj_rel_l2 == pytest.approx(factors[750.0] / factors[0.0], rel=1e-3)


def test_flux_is_weighted_though_it_tells_shares_of_the_timesteps():
    pipe = make_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # else all steps are equally long
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.1)
    result = compare_pipelines(pipe, other, num_samples=1, num_inference_steps=4, prompts=["a hat"], **SMALL)
    assert abs(result.traj_rel_l2 / result.eps_rel_l2 - 1) > 1e-3


def test_denoisers_are_weighted_each_by_its_own_sampler():
    parts, sums = [], torch.zeros(2, dtype=torch.float64)
    for scheduler, size in ((DDIMScheduler(), 1.0), (FlowMatchEulerDiscreteScheduler(), 3.0)):
        part = OutputErrors(RunFactors(scheduler, 4))
        part.sampler.look()
        for timestep, factor in denoising_factors(scheduler, 4).items():
            expected = torch.randn(2, 3, dtype=torch.float64)
            part.add(timestep, expected, expected + size)
            sums += factor**2 * torch.tensor([6 * size**2, expected.square().sum()])
        parts.append(part)
    never = OutputErrors(RunFactors(DDIMScheduler(), 4))
    assert never.result()["traj_rel_l2"] is None
    pooled = OutputErrors.pooled([*parts, never])
    assert pooled["traj_rel_l2"] == pytest.approx((sums[0] / sums[1]).sqrt().item())
    assert pooled["eps_mse"] == pytest.approx(5)
    unknown = OutputErrors(RunFactors(DDIMScheduler(), 4))
    unknown.add(77.0, torch.ones(2), torch.ones(2))
    assert OutputErrors.pooled([*parts, unknown])["traj_rel_l2"] is None


def test_pictures_have_an_interval_and_samplers_a_name(tiny_pipe):
    other = quantize_pipeline(copy.deepcopy(tiny_pipe), "w4a4", num_samples=2, num_inference_steps=2)
    run = {"num_inference_steps": 2}
    default = compare_pipelines(tiny_pipe, other, num_samples=4, **run)
    low, high = default.image_psnr_db_interval
    assert low <= default.image_psnr_db <= high
    assert default.sampler == "DDIMScheduler"
    assert compare_pipelines(tiny_pipe, other, num_samples=1, **run).image_psnr_db_interval is None
    for name, cls in (("dpmsolver++", "DPMSolverMultistepScheduler"), ("euler", "EulerDiscreteScheduler")):
        result = compare_pipelines(tiny_pipe, other, num_samples=1, sampler=name, **run)
        assert result.sampler == cls
        assert result.traj_rel_l2 > 0
    assert compare_pipelines(tiny_pipe, other, num_samples=1, sampler="own", **run).sampler == "DDPMScheduler"
    assert type(tiny_pipe.scheduler) is DDPMScheduler
    with pytest.raises(ConfigError, match="`sampler` must be one of ddim, dpmsolver"):
        compare_pipelines(tiny_pipe, other, sampler="heun", **run)
    with pytest.raises(ConfigError, match="`eta` is DDIM's, but got 0.5 with the sampler 'euler'"):
        compare_pipelines(tiny_pipe, other, sampler="euler", eta=0.5, **run)
    with pytest.raises(ConfigError, match="whose place it cannot take. Use `own`"):
        compare_pipelines(make_flux(), make_flux(), sampler="euler", **run)
