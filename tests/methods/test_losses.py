"""The denoising factor: closed forms, and what every scheduler says of itself."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from reference import ddim_factor, ddpm_factor

from diffusers_msfp import denoising_factors
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.methods.losses import loss_weights, squared_error
from diffusers_msfp.sampling.denoising_factor import RunFactors, clipped_factors, clips

STEPS = 10


def alphas(scheduler) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Timesteps, and the cumulative alphas before and after each step."""
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.tolist()
    abar = scheduler.alphas_cumprod[timesteps]
    return timesteps, abar, torch.cat([abar[1:], torch.ones(1)])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_says_its_closed_form(eta):
    scheduler = DDIMScheduler()
    timesteps, now, after = alphas(scheduler)
    found = denoising_factors(scheduler, STEPS, eta=eta)
    assert list(found) == timesteps
    assert torch.allclose(torch.tensor(list(found.values())), ddim_factor(now, after, eta), atol=1e-5)


def test_ddpm_says_its_closed_form():
    scheduler = DDPMScheduler()
    found = denoising_factors(scheduler, 1000)
    expected = ddpm_factor(scheduler.alphas_cumprod)
    assert torch.allclose(torch.tensor([found[float(t)] for t in range(1000)]), expected, atol=1e-5)


def test_the_known_figures_of_the_linear_schedule():
    values = list(denoising_factors(DDIMScheduler(), 20).values())
    assert values[-1] == pytest.approx(0.01, abs=1e-4)
    assert (min(values[:-1]), max(values[:-1])) == (pytest.approx(0.164, abs=1e-3), pytest.approx(0.596, abs=1e-3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_follow_from_epsilon_s(prediction):
    """`eps = (x - sqrt(abar) x0) / sqrt(1 - abar)` and `eps = sqrt(abar) v + sqrt(1 - abar) x`."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    _, now, after = alphas(scheduler)
    slope = {"epsilon": torch.ones(STEPS), "v_prediction": now.sqrt(), "sample": (now / (1 - now)).sqrt()}[prediction]
    found = torch.tensor(list(denoising_factors(scheduler, STEPS).values()))
    assert torch.allclose(found, ddim_factor(now, after) * slope, rtol=1e-3, atol=1e-5)


def test_flow_matching_uses_the_output_as_much_as_sigma_falls():
    scheduler = FlowMatchEulerDiscreteScheduler()
    found = list(denoising_factors(scheduler, STEPS).values())
    scheduler.set_timesteps(STEPS)
    assert torch.allclose(torch.tensor(found), -scheduler.sigmas.diff(), atol=1e-6)


def test_euler_s_unscaled_samples_count_as_the_model_sees_them():
    arguments = {"timestep_spacing": "leading", "steps_offset": 0}
    euler = denoising_factors(EulerDiscreteScheduler(**arguments), STEPS)
    ddim = denoising_factors(DDIMScheduler(**arguments), STEPS)
    for timestep in list(ddim)[:-1]:
        assert euler[timestep] == pytest.approx(ddim[timestep], rel=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler, LCMScheduler],
    ids=lambda s: s.__name__,
)
def test_any_scheduler_can_be_asked_and_is_not_changed(scheduler):
    probed = scheduler()
    probed.set_timesteps(7)
    before = probed.timesteps.clone()
    found = denoising_factors(probed, STEPS)
    assert all(0 <= value < 10 for value in found.values())
    assert sum(found.values()) > 0
    assert torch.equal(probed.timesteps, before)


def test_clipping_does_not_hide_the_coefficient():
    clipped, free = (denoising_factors(DDIMScheduler(clip_sample=c), STEPS) for c in (True, False))
    assert clipped == free


def test_a_scheduler_that_cannot_step_is_refused_with_the_way_out():
    class Broken(DDIMScheduler):
        def step(self, *args, **kwargs):
            raise ValueError("needs a brownian tree")

    with pytest.raises(ConfigError, match=r"Broken must make a step .* needs a brownian tree. Turn .* \(exponent 0\)"):
        denoising_factors(Broken(), STEPS)


def test_weights_have_mean_one_a_floor_and_an_exponent():
    factors = {900.0: 4.0, 500.0: 2.0, 0.0: 0.0}
    assert loss_weights(factors) == pytest.approx({900.0: 2.0, 500.0: 1.0, 0.0: 0.0})
    assert set(loss_weights(factors, exponent=0).values()) == {1.0}
    squared = loss_weights(factors, exponent=2)
    assert squared[900.0] / squared[500.0] == pytest.approx(4)
    floored = loss_weights(factors, floor=0.25)
    assert floored[0.0] / floored[500.0] == pytest.approx(0.25)
    for weights in (squared, floored):
        assert sum(weights.values()) == pytest.approx(3)
    for bad in ({}, {0.0: 0.0}, {0.0: float("nan")}):
        with pytest.raises(ConfigError, match="finite and positive"):
            loss_weights(bad)
    with pytest.raises(ConfigError, match="must be ≥ 0, but got -1 and 0.0"):
        loss_weights(factors, exponent=-1)


def test_squared_error_is_per_sample():
    output, target = torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    assert squared_error(output, target).tolist() == [2.0, 0.0]
    assert squared_error(output, target, relative=True).tolist() == pytest.approx([2 / 4.75, 0.0])


def test_factors_of_a_sampler_that_clips_are_the_real_steps():
    """Where nothing is clipped the linear ones, elsewhere the derivative of the step that is made."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 4, 4)

    def calls(least: float, scheduler=None) -> list[tuple]:
        scheduler = scheduler or DDIMScheduler()
        scheduler.set_timesteps(STEPS)
        noise = torch.randn(shape, generator=generator)
        found = []
        for t in scheduler.timesteps.tolist():
            abar = scheduler.alphas_cumprod[t]
            image = least + 0.5 * torch.rand(shape, generator=generator)
            sample = abar.sqrt() * image + (1 - abar).sqrt() * noise
            found.append((float(t), sample, noise, torch.randn(shape, generator=generator)))
        return found

    linear = denoising_factors(DDIMScheduler(), STEPS)
    inside = clipped_factors(DDIMScheduler(clip_sample=True), STEPS, calls(0.0))
    assert list(inside) == list(linear)
    assert torch.allclose(torch.tensor(list(inside.values())), torch.tensor(list(linear.values())), rtol=1e-3)
    outside = clipped_factors(DDIMScheduler(clip_sample=True), STEPS, calls(9.0))
    direct = {}
    for t, previous in zip(linear, [*list(linear)[1:], None], strict=True):
        abar = DDIMScheduler().alphas_cumprod[int(previous)] if previous is not None else torch.tensor(1.0)
        direct[t] = (1 - abar).sqrt().item()
    assert torch.allclose(
        torch.tensor(list(outside.values())), torch.tensor(list(direct.values())), rtol=1e-3, atol=1e-6
    )
    assert clips(DDIMScheduler())
    assert not clips(DDIMScheduler(clip_sample=False))
    for ancestral, given in ((DDPMScheduler(), {}), (DDIMScheduler(), {"eta": 1.0})):  # equal noise in both steps
        before, made = torch.get_rng_state(), calls(0.0, ancestral)
        found, again = (clipped_factors(ancestral, STEPS, made, **given) for _ in range(2))
        assert found == again
        assert list(found.values()) == pytest.approx(
            list(denoising_factors(ancestral, STEPS, **given).values()), rel=1e-3, abs=1e-6
        )
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spell", [lambda t: t, lambda t: t / 1000, lambda t: (1000 - t) / 1000, round])
def test_a_run_has_the_factors_of_what_the_pipeline_sets(spell):
    """Whatever way it tells its denoiser the timesteps."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.3])
    run = RunFactors(scheduler, STEPS)
    before = copy.deepcopy(vars(scheduler))
    run.look()
    assert all(torch.equal(vars(scheduler)[name], before[name]) for name in ("timesteps", "sigmas"))
    told = [spell(float(t)) for t in scheduler.timesteps]
    scheduler.set_timesteps(5)
    run.look()  # only the first time counts
    assert run.of(told) == run.required(told)
    assert list(run.of(told).values()) == pytest.approx([0.2, 0.5, 0.3], abs=1e-5)
    assert list(run.of(told[1:]).values()) == pytest.approx([0.5, 0.3], abs=1e-5)
    with pytest.raises(ConfigError, match=r"must be called with timesteps of its sampler, .*given \[7, 5\]"):
        run.required([7, 5])


def test_a_run_of_image_to_image_begins_where_it_begins():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    whole = denoising_factors(scheduler, STEPS)
    scheduler.set_begin_index(6)
    scheduler.scale_model_input(torch.zeros(1), scheduler.timesteps[6])
    run, timesteps = RunFactors(scheduler, STEPS), scheduler.timesteps[6:].tolist()
    run.look()
    assert run.of(timesteps) == pytest.approx({t: whole[t] for t in timesteps})
