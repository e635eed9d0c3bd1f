"""Everything random follows the seed, and the user's own random numbers stay as they are."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import make_dit_pipe, make_unet
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionImg2ImgPipeline,
)
from pipelines import make_small_pipe, picture

from diffusers_msfp import (
    CorrectionConfig,
    RoundingConfig,
    calibrate,
    correct_output,
    learn_rounding,
    quantize_pipeline,
)
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.evaluation import compare_pipelines, sample_images
from diffusers_msfp.evaluation.images.samples import draw_pictures
from diffusers_msfp.evaluation.layers import layer_snr
from diffusers_msfp.methods.talora.config import FinetuneConfig
from diffusers_msfp.methods.talora.finetune import finetune
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.sampling.calls import Call, call_arguments
from diffusers_msfp.sampling.denoisers import say_unnamed
from diffusers_msfp.sampling.trajectory import rollout


class GloballyDrawn(DDPMPipeline):
    """A pipeline that takes no generator and draws from all global ones."""

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, num_inference_steps: int = 3, output_type: str = "np"):
        x = torch.randn(batch_size, 3, 8, 8)
        x += torch.from_numpy(np.random.rand(batch_size, 1, 1, 1)).float() + random.random()
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.step(self.unet(x, timestep).sample, timestep, x).prev_sample
        return type("Output", (), {"images": (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()})


SMALL = {"block_out_channels": (16, 32), "attention_head_dim": 16}


def make_consistency() -> ConsistencyModelPipeline:
    unet = make_unet(**SMALL, num_class_embeds=10, resnet_time_scale_shift="scale_shift")
    return ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())


def make_global() -> GloballyDrawn:
    return GloballyDrawn(make_unet(**SMALL), DDIMScheduler())


def disturb(number: int) -> None:
    """Another state of all global generators."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def states() -> tuple:
    """Of all global generators, comparable."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()


MAKERS = pytest.mark.parametrize("make", [make_consistency, make_global])


def calibrated(make, disturbance: int) -> dict:
    pipe = make()
    disturb(disturbance)
    quantize_pipeline(pipe, "w4a4", num_samples=4, num_inference_steps=2)
    return pipe.unet.state_dict()


@MAKERS
@pytest.mark.situation("pipelines that draw labels or noise from global generators are calibrated", "right")
def test_calibration(make):
    one, other = calibrated(make, 1), calibrated(make, 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


@MAKERS
@pytest.mark.situation("such a pipeline is compared with itself", "right")
def test_compare_with_itself(make):
    pipe = make()
    assert compare_pipelines(pipe, pipe, num_samples=3, num_inference_steps=2).image_psnr_db == 100


@MAKERS
@pytest.mark.situation("such a pipeline is sampled, evaluated and rolled out twice with one seed", "right")
def test_samples(make):
    pipe, drawn = make(), []
    for disturbance in (1, 2):
        disturb(disturbance)
        images = torch.from_numpy(sample_images(pipe, num_samples=2, num_inference_steps=2, seed=3))
        pictures = draw_pictures(pipe, num_samples=2, num_inference_steps=2, seed=3)
        steps = rollout(pipe, call_arguments(pipe, None, 2, {}), 0, 2, 3)
        drawn.append([images, pictures, *(step.output for step in steps)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.situation("other seeds give other labels and other noise", "right")
def test_other_seeds():
    pipe = make_global()
    one, other = (sample_images(pipe, num_samples=1, num_inference_steps=2, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.situation("a class-conditional UNet gets class labels, equal for both of a comparison", "right")
def test_class_labels():
    make = call_arguments(make_consistency(), None, 2, {})
    call = make(0, 8, torch.Generator().manual_seed(0))
    labels = call.arguments["class_labels"]
    assert len(labels) == call.arguments["batch_size"] == 8
    assert set(labels) <= set(range(10))
    assert len(set(labels)) > 1
    singles = [make(i, 1, [torch.Generator().manual_seed(i)]).arguments["class_labels"] for i in range(3)]
    together = make(0, 3, [torch.Generator().manual_seed(i) for i in range(3)]).arguments["class_labels"]
    assert [label for one in singles for label in one] == together
    dit = call_arguments(make_dit_pipe(), None, 2, {})(0, 2, torch.Generator().manual_seed(0))
    assert len(dit.arguments["class_labels"]) == 2
    assert "batch_size" not in dit.arguments


LITTLE = {"num_samples": 4, "num_inference_steps": 2}
IMPROVED = {
    "correct_output": lambda *pair: correct_output(*pair, CorrectionConfig(**LITTLE)),
    "learn_rounding": lambda *pair: learn_rounding(*pair, RoundingConfig(iterations=1, **LITTLE)),
    "finetune": lambda *pair: finetune(
        *pair, FinetuneConfig(train_steps=1, rank=2, num_inference_steps=2, preview_every=1)
    ),
}


@pytest.mark.parametrize("verb", IMPROVED)
@pytest.mark.parametrize("keeps", ["teacher", "student"])
@pytest.mark.situation("student or teacher has lost the names of its classes: only named ones are asked for", "right")
def test_only_named_classes_are_asked_for(verb, keeps, caplog):
    teacher = make_dit_pipe()
    teacher.labels = {"dog": 7, "frog": 3}
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a4", num_samples=1, num_inference_steps=1)
    (pipe if keeps == "teacher" else teacher).labels = {}
    heard = []
    for each in (pipe, teacher):
        each.transformer.register_forward_pre_hook(
            lambda _, _args, kwargs: heard.extend(kwargs["class_labels"].tolist()), with_kwargs=True
        )
    IMPROVED[verb](pipe, teacher)
    assert 0 < len(set(heard) & {3, 7}) == len(set(heard) - {1000})
    assert "names no classes" not in caplog.text


def test_that_no_class_has_a_name_is_said_once(caplog):
    say_unnamed.cache_clear()
    for _ in range(2):
        call_arguments(make_dit_pipe(), None, 2, {})
    call_arguments(make_dit_pipe(), None, 2, {"class_labels": [3]})
    assert caplog.text.count("DiTPipeline names no classes (`id2label`), so labels are drawn from all 1000 that") == 1


@pytest.mark.situation("img2img encodes its image with a posterior's noise: compared with itself", "right")
def test_image_to_image():
    pipe = StableDiffusionImg2ImgPipeline(**make_small_pipe().components, requires_safety_checker=False)
    found = compare_pipelines(pipe, pipe, num_samples=2, num_inference_steps=2, image=picture(), strength=1.0)
    assert found.image_psnr_db == 100


@pytest.mark.situation("the user's own random numbers go on as if nothing had been sampled", "right")
def test_global_states_untouched():
    teacher = make_global()
    pipe = copy.deepcopy(teacher)
    disturb(5)
    before = states()
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    compare_pipelines(teacher, pipe, num_samples=2, num_inference_steps=2)
    layer_snr(teacher, pipe, num_samples=1, num_inference_steps=2)
    sample_images(pipe, num_samples=1, num_inference_steps=2)
    draw_pictures(pipe, num_samples=1, num_inference_steps=2)
    finetune(pipe, teacher, FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2))
    assert states() == before


@pytest.mark.situation("the pipeline fails in the middle: the user's random numbers go on all the same", "right")
def test_global_states_after_an_error():
    disturb(5)
    before = states()

    def fail(**_):
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Call({}, 0).run(fail)
    assert states() == before


@pytest.mark.situation("fine-tuning twice, between other draws of the user's", "right")
def test_finetune():
    found = []
    for disturbance in (1, 2):
        teacher = make_global()
        pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a4", num_samples=2, num_inference_steps=2)
        config = FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2)
        disturb(disturbance)
        run = Finetuner(pipe, teacher, config)
        step = run.trajectories[0]
        found.append([step.output, *run.student.trainable_state().values(), torch.from_numpy(run.preview())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"generator": torch.Generator()}, "`generator` cannot be passed on.*follows `seed`"),
        ({"batch_size": 3}, "`batch_size` cannot be passed on"),
        ({"colour": "red"}, "must be among those of DDPMPipeline, but got `colour`"),
    ],
)
@pytest.mark.situation("arguments that would undo the seed or the number of samples", "refused")
def test_refused_arguments(packed_pipe, arguments, said):
    before = {name: tensor.clone() for name, tensor in packed_pipe.unet.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        calibrate(packed_pipe, **arguments)
    assert all(torch.equal(before[name], tensor) for name, tensor in packed_pipe.unet.state_dict().items())


@pytest.mark.situation("a checkpoint is measured with the seed that it was calibrated and fine-tuned with", "right")
def test_a_checkpoint_is_not_measured_on_noise_that_it_was_made_with():
    pipe = DDPMPipeline(make_unet(**SMALL), DDIMScheduler())
    reference, measured, made = copy.deepcopy(pipe), [], []

    def keep(into):
        return lambda _module, args, kwargs: into.append((args or tuple(kwargs.values()))[0].clone())

    pipe.unet.register_forward_pre_hook(keep(made), with_kwargs=True)
    quantize_pipeline(pipe, "w4a4", num_samples=4, num_inference_steps=2, seed=1)
    finetune(pipe, reference, FinetuneConfig(train_steps=2, batch_size=2, num_inference_steps=2, seed=1))
    made = torch.cat(made)
    reference.unet.register_forward_pre_hook(keep(measured), with_kwargs=True)
    compare_pipelines(reference, pipe, num_samples=2, num_inference_steps=2, seed=1)
    layer_snr(reference, pipe, num_samples=2, num_inference_steps=2, seed=1)
    measured = torch.cat(measured)
    assert len(made)
    assert len(measured)
    assert not (made[:, None] == measured).flatten(2).all(2).any()
