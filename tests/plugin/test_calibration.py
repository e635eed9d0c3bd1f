"""Observation, freezing and calibration of whole models."""

import copy
import logging

import pytest
import torch
from conftest import ONE_BLOCK, equal_state, make_dit_pipe, make_unet, run
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

import diffusers_msfp
from diffusers_msfp import MSFPConfig, calibrate, calibration_state, freeze, quantize_pipeline, set_engine
from diffusers_msfp.calibration.observer import CAPACITY
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.cli.shared.store import write_checkpoint
from diffusers_msfp.errors import ConfigError, StateError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin.quantize import quantize_model


def observing_unet(scheme: str = "w4a4", **changes) -> UNet2DModel:
    unet = make_unet(**changes)
    quantize_model(unet, MSFPConfig(scheme=scheme))
    return unet


def test_first_complete_run_calibrates_and_the_next_is_quantized(images):
    unet = observing_unet()
    for timestep in (900, 500, 500, 100):
        run(unet, images, timestep)
        assert calibration_state(unet) == "observing"
    float_activations = run(unet, images, 100)
    y = run(unet, images, 900)
    assert calibration_state(unet) == "frozen"
    assert ModelRecord.of(unet).to_dict()["calibration"] == {"state": "frozen"}
    assert torch.equal(run(unet, images, 900), y)
    assert not torch.equal(run(unet, images, 100), float_activations)


def test_a_rising_trajectory_does_not_end_a_run(images):
    unet = observing_unet()
    for timestep in (10, 500, 900):
        run(unet, images, torch.tensor([timestep, timestep]))
    assert calibration_state(unet) == "observing"
    run(unet, images, 100)
    run(unet, images, 101)
    assert calibration_state(unet) == "observing"
    run(unet, images, 900)
    assert calibration_state(unet) == "frozen"


def test_activations_are_float_while_observing(images):
    observed, weights_only = observing_unet("w4a4"), observing_unet("w4a16")
    for unet in (observed, weights_only):
        set_engine(unet, "reference")
    assert torch.equal(run(observed, images), run(weights_only, images))
    assert calibration_state(weights_only) == "frozen"


def test_freeze_at_once_and_twice(images):
    unet = observing_unet()
    with pytest.raises(StateError, match="no input of UNet2DModel has been seen"):
        freeze(unet)
    run(unet, images)
    freeze(unet)
    state = copy.deepcopy(unet.state_dict())
    freeze(unet)
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    with pytest.raises(StateError, match="quantized layers is needed, but UNet2DModel has none"):
        freeze(make_unet())


def test_saving_while_observing_goes_on_after_reload(images, tmp_path):
    unet = observing_unet()
    run(unet, images, 900)
    run(unet, images, 500)
    unet.save_pretrained(tmp_path)
    assert calibration_state(unet) == "observing"
    again = UNet2DModel.from_pretrained(tmp_path)
    assert calibration_state(again) == "observing"
    assert equal_state(unet, again)
    for model in (unet, again):
        run(model, images, 100)
        run(model, images, 900)
        assert calibration_state(model) == "frozen"
    assert equal_state(unet, again)


def test_unused_layers_are_reported_and_stay_float(images, caplog):
    unet = make_unet()
    unet.spare = torch.nn.Linear(2, 2)
    quantize_model(unet, MSFPConfig(scheme="w4a4"))
    run(unet, images)
    freeze(unet)
    assert "1 layers were never used and keep a float input: spare" in caplog.text
    assert unet.spare.input_format is None


def test_on_the_fly_calibration_is_announced_once(tiny_dir, caplog):
    with caplog.at_level(logging.WARNING):
        DDPMPipeline.from_pretrained(tiny_dir, quantization_config=MSFPConfig())
    assert caplog.text.count("first complete denoising run") == 1


def test_calibrate_is_deterministic_and_bounded(tiny_dir):
    def make(seed):
        pipe = DDPMPipeline.from_pretrained(tiny_dir, quantization_config=MSFPConfig(scheme="w4a4"))
        calibrate(pipe, num_samples=3, num_inference_steps=4, seed=seed)
        return pipe.unet

    one, two, three = make(0), make(0), make(1)
    assert calibration_state(one) == "frozen"
    assert equal_state(one, two)
    assert not equal_state(one, three)


def test_observation_holds_bounded_memory(images):
    unet = observing_unet()
    layer = unet.mid_block.resnets[0].conv1
    sizes = []
    for _ in range(300):
        layer(torch.randn(64, layer.in_channels, 4, 4))
        sizes.append(len(layer.state_dict()["observed_sample"]))
    assert max(sizes) == sizes[-1] == CAPACITY


def test_calibrate_sees_the_whole_trajectory_and_reports_progress(tiny_pipe):
    seen, steps = [], []
    quantize_model(tiny_pipe.unet, MSFPConfig(scheme="w4a4"))
    tiny_pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    calibrate(tiny_pipe, num_samples=20, num_inference_steps=5, on_progress=lambda *step: steps.append(step))
    assert set(seen) == {800, 600, 400, 200, 0}
    assert steps == [(i, 10) for i in range(1, 11)]


def test_the_pipeline_s_own_progress_bar_is_shown_and_can_be_silenced(packed_pipe, capfd):
    calibrate(packed_pipe, num_samples=1, num_inference_steps=2)
    assert "calibrating: 100%" in capfd.readouterr().err
    packed_pipe.set_progress_bar_config(disable=True)
    calibrate(packed_pipe, num_samples=1, num_inference_steps=2)
    assert capfd.readouterr().err == ""


def test_frozen_pipelines_are_calibrated_anew(packed_pipe):
    before = copy.deepcopy(packed_pipe.unet)
    calibrate(packed_pipe, num_samples=4, num_inference_steps=3, seed=7)
    assert calibration_state(packed_pipe) == "frozen"
    assert not equal_state(before, packed_pipe.unet)


SCHEDULERS = (
    DDPMScheduler,
    DDIMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)


class NoisePipeline(DDIMPipeline):
    """The simplest loop that any scheduler accepts."""

    def __init__(self, unet, scheduler):
        super(DDIMPipeline, self).__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, batch_size=1, generator=None, num_inference_steps=5, output_type="np"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(batch_size, 3, 8, 8, generator=generator) * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            noise = self.unet(self.scheduler.scale_model_input(x, timestep), timestep).sample
            x = self.scheduler.step(noise, timestep, x).prev_sample
        return x


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
def test_any_scheduler(scheduler):
    pipe = NoisePipeline(make_unet(**ONE_BLOCK), scheduler())
    assert quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=5) is pipe
    assert calibration_state(pipe) == "frozen"
    on_the_fly = NoisePipeline(observing_unet(**ONE_BLOCK), scheduler())
    with torch.no_grad():
        on_the_fly()
        assert calibration_state(on_the_fly) == "observing"
        on_the_fly()
    assert calibration_state(on_the_fly) == "frozen"


def test_class_labels():
    pipe = make_dit_pipe(out_channels=8)
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    assert calibration_state(pipe) == "frozen"
    assert not any(isinstance(m, QuantLayer) for m in pipe.vae.modules())
    both = MSFPConfig(scheme="w8a8", components_to_quantize=["vae"])
    quantize_pipeline(pipe, both, num_samples=1, num_inference_steps=2)
    assert pipe.vae.decoder.conv_out.input_format is not None
    assert calibration_state(pipe.vae) == "frozen"


def test_only_named_labels_are_drawn_and_their_names_stay(tmp_path):
    """A model may know more labels than it was trained on."""
    pipe = make_dit_pipe()
    pipe.labels = {"puppy": 5, "dog": 5, "ship": 8}
    pipe.save_pretrained(tmp_path / "float")
    heard = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, _args, kwargs: heard.extend(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    quantize_pipeline(pipe, "w4a4", num_samples=8, num_inference_steps=1)
    hook.remove()
    assert set(heard) == {5, 8, 1000}
    pipe.save_pretrained(tmp_path / "packed")
    write_checkpoint(DiffusionPipeline.from_pretrained(tmp_path / "packed"), tmp_path / "again")
    DiffusionPipeline.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "once more")
    for folder in ("packed", "again", "once more"):
        assert DiffusionPipeline.from_pretrained(tmp_path / folder).labels == pipe.labels
    assert DiffusionPipeline.from_pretrained(tmp_path / "float").labels == {}, "what plain diffusers does"


def test_names_of_labels_stay_where_a_first_run_calibrates(tmp_path):
    pipe = make_dit_pipe()
    pipe.register_to_config(id2label={"5": "dog, puppy", "8": "ship"})
    pipe.save_pretrained(tmp_path / "float")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=MSFPConfig("w4a4"))
    for _ in range(2):  # the second run ends the first one
        pipe([5], num_inference_steps=2, output_type="np")
    assert calibration_state(pipe.transformer) == "frozen"
    pipe.save_pretrained(tmp_path / "packed")
    assert DiffusionPipeline.from_pretrained(tmp_path / "packed").labels == {"dog": 5, "puppy": 5, "ship": 8}


def test_what_else_is_called_labels_stays():
    """Some pipeline of someone's may have a list of this name."""
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pipe.labels = ["a", "b"]
    quantize_pipeline(pipe, "w4a4", num_samples=1, num_inference_steps=1)
    assert pipe.labels == ["a", "b"]
    assert "id2label" not in pipe.config


def test_a_refused_or_failed_calibration_does_not_stick(packed_pipe, monkeypatch):
    before = copy.deepcopy(packed_pipe.unet)
    with pytest.raises(ConfigError, match="non-empty list of strings"):
        calibrate(packed_pipe, prompts=[])
    assert equal_state(before, packed_pipe.unet)
    step, calls = packed_pipe.scheduler.step, []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:  # the first is the trial's
            raise RuntimeError("broken")
        return step(*args, **kwargs)

    monkeypatch.setattr(packed_pipe.scheduler, "step", None)
    with pytest.raises(ConfigError, match="fails in its first step, before anything is changed: TypeError"):
        calibrate(packed_pipe, num_samples=1, num_inference_steps=2)
    assert equal_state(before, packed_pipe.unet)
    packed_pipe.scheduler.set_timesteps(2)
    monkeypatch.setattr(packed_pipe.scheduler, "step", fail_later)
    with pytest.raises(ConfigError, match="RuntimeError: broken. The weights are quantized already"):
        calibrate(packed_pipe, num_samples=1, num_inference_steps=2)
    for timestep in (900, 100, 900):
        run(packed_pipe.unet, torch.randn(1, 3, 8, 8), timestep)
    assert calibration_state(packed_pipe) == "frozen"


def test_bad_requests_are_refused(tiny_pipe, packed_pipe):
    with pytest.raises(StateError, match="DDPMPipeline has none. Load it with"):
        calibrate(tiny_pipe)
    with pytest.raises(ConfigError, match="a UNet2DModel alone cannot be sampled"):
        calibrate(packed_pipe.unet)
    with pytest.raises(ConfigError, match="`num_samples` must be at least 1, but got 0"):
        calibrate(packed_pipe, num_samples=0)
    weights_only = quantize_pipeline(copy.deepcopy(tiny_pipe), "w4a16")
    with pytest.raises(StateError, match="weights only"):
        calibrate(weights_only)
    with pytest.raises(ConfigError, match="must have a component to quantize"):
        quantize_pipeline(tiny_pipe, MSFPConfig(components_to_quantize=["vae"]))
    with pytest.raises(ConfigError, match="Unknown scheme"):
        quantize_pipeline(tiny_pipe, "w5a5")
    assert not any(isinstance(m, QuantLayer) for m in tiny_pipe.unet.modules())
    assert diffusers_msfp.calibration_state(packed_pipe) == "frozen"
