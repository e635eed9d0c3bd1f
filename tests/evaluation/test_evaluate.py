"""The whole evaluation on small pipelines: every figure, what is left out, what is refused."""

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, StableDiffusionPAGPipeline
from pipelines import make_img2img, make_small_pipe, picture

from diffusers_msfp.errors import ConfigError, NonFiniteError, ShapeError, StateError, UnsupportedError
from diffusers_msfp.evaluation import Features, compare_pipelines, evaluate_pipelines
from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.evaluation.images.samples import draw_pictures

SIZES = ["frechet_distance", "spatial_frechet_distance", "precision", "recall"]


def small_features():
    """Means of the channels, a corner with its places, and class scores."""
    return lambda images: Features(images.mean((2, 3)), images[:, 0, :2, :2].flatten(1), 9 * images.mean((2, 3)))


def pooled_features():
    return lambda images: images.mean((2, 3))


RUN = {"num_inference_steps": 2, "features": f"{__name__}:small_features"}


@pytest.fixture(scope="module")
def reference() -> DDPMPipeline:
    return DDPMPipeline(make_unet(sample_size=16), DDPMScheduler())


@pytest.fixture(scope="module")
def candidate(reference) -> DDPMPipeline:
    twin = copy.deepcopy(reference)
    twin.unet.conv_out.bias.data += 0.5
    return twin


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("real") / "real.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def result(reference, candidate, real, tmp_path_factory) -> dict:
    return evaluate_pipelines(
        reference, candidate, data=real, num_samples=60, folder=tmp_path_factory.mktemp("pictures"), seed=3, **RUN
    )


def test_every_figure_is_there(result, reference, candidate):
    figures = result.figures
    assert list(figures["candidate_to_reference"]) == [*SIZES, "psnr_db", "ssim"]
    assert list(figures["candidate_to_real"]) == list(figures["reference_to_real"]) == SIZES
    assert set(figures["classifier_score"]) == {"candidate", "reference", "real"}
    assert result.omitted == {}
    for group in figures.values():
        for figure in group.values():
            assert set(figure.to_dict()) == {"value", "low", "high", "bias"}
            assert figure.low <= figure.value <= figure.high
    assert figures["candidate_to_reference"]["frechet_distance"].value > 0
    pictures = [draw_pictures(pipe, num_samples=60, num_inference_steps=2, seed=3) for pipe in (reference, candidate)]
    expected = psnr_db(*(images.float() for images in pictures)).mean().item()
    assert figures["candidate_to_reference"]["psnr_db"].value == pytest.approx(expected, rel=1e-9)
    compared = compare_pipelines(reference, candidate, num_inference_steps=2, seed=3)
    assert result.eps_mse == compared.eps_mse == pytest.approx(0.25, rel=1e-5)
    assert result.eps_rel_l2_by_timestep == compared.eps_rel_l2_by_timestep
    assert not hasattr(result, "image_psnr_db"), "that of fewer pictures"
    assert result.layers["conv_out"].snr_db < 60
    assert result.layers["conv_in"].snr_db == 100
    assert result.settings["data"] == {"pictures": 70, "source": "real.npz", "adapted": "as they are"}
    assert result.settings["scheduler"] == "DDIMScheduler"
    assert {"machine", "torch", "diffusers", "diffusers_msfp"} <= set(result.origin)
    json.dumps(result.to_dict())


def test_a_pipeline_against_itself(reference):
    figures = evaluate_pipelines(reference, reference, num_samples=60, **RUN).figures
    assert set(figures) == {"candidate_to_reference", "classifier_score"}
    values = {name: figure.value for name, figure in figures["candidate_to_reference"].items()}
    assert values == pytest.approx(
        dict.fromkeys(SIZES[:2], 0) | dict.fromkeys(SIZES[2:], 1) | {"psnr_db": 100, "ssim": 1}, abs=1e-6
    )


def test_what_too_few_pictures_do_not_allow_is_named(tiny_pipe):
    result = evaluate_pipelines(tiny_pipe, tiny_pipe, num_samples=4, num_inference_steps=1, features=RUN["features"])
    few = "needs 50 pictures in each set for neighbourhoods, but got 4"
    assert result.omitted == {
        "candidate_to_reference.spatial_frechet_distance": "needs more than 4 pictures in each set, but got 4",
        "candidate_to_reference.precision": few,
        "candidate_to_reference.recall": few,
        "candidate_to_reference.ssim": "needs sides of 11 pixels, but got (3, 8, 8)",
    }
    assert list(result.figures["candidate_to_reference"]) == ["frechet_distance", "psnr_db"]
    omitted = evaluate_pipelines(
        tiny_pipe, tiny_pipe, num_samples=4, num_inference_steps=1, features=f"{__name__}:pooled_features"
    ).omitted
    assert omitted["candidate_to_reference.spatial_frechet_distance"] == "these features have no spatial part"
    assert omitted["classifier_score"] == "these features have no logits"


def test_without_features_the_rest_is_computed(reference, candidate, real, tiny_pipe):
    """RGB pictures of a shape that only `inception` fits, whose weights are not there."""
    result = evaluate_pipelines(reference, candidate, data=real, num_samples=4, num_inference_steps=1)
    assert list(result.figures) == ["candidate_to_reference"]
    assert list(result.figures["candidate_to_reference"]) == ["psnr_db", "ssim"]
    assert result.eps_rel_l2 > 0
    assert result.layers
    assert result.settings["features"] is None
    pairs = ("candidate_to_reference", "candidate_to_real", "reference_to_real")
    assert set(result.omitted) == {f"{pair}.{name}" for pair in pairs for name in SIZES} | {"classifier_score"}
    assert all("`inception` need the package torch-fidelity" in reason for reason in result.omitted.values())
    assert set(
        evaluate_pipelines(tiny_pipe, tiny_pipe, num_samples=2, num_inference_steps=1).figures["candidate_to_reference"]
    ) == {"psnr_db"}


def test_reduced_precision(reference):
    half = DDPMPipeline(copy.deepcopy(reference.unet).to(torch.bfloat16), DDIMScheduler())
    result = evaluate_pipelines(reference, half, num_samples=4, **RUN)
    assert 0 < result.eps_rel_l2 < 0.03
    assert result.figures["candidate_to_reference"]["psnr_db"].value > 35
    assert evaluate_pipelines(half, half, num_samples=4, **RUN).eps_mse == 0


def test_pictures_that_are_no_numbers(tiny_pipe):
    broken = copy.deepcopy(tiny_pipe)
    broken.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="3 of 3 that the candidate made hold NaN"):
        evaluate_pipelines(tiny_pipe, broken, num_samples=3, **RUN)


def test_bad_requests_are_refused(tiny_pipe, reference, packed_pipe, monkeypatch, real):
    with pytest.raises(ConfigError, match="`num_samples` must be at least 2, but got 1"):
        evaluate_pipelines(tiny_pipe, tiny_pipe, num_samples=1)
    with pytest.raises(ConfigError, match=r"pictures of one shape, but got \(3, 8, 8\) and \(3, 16, 16\)"):
        evaluate_pipelines(tiny_pipe, reference, **RUN)
    with pytest.raises(UnsupportedError, match="`inception` need the package torch-fidelity"):
        evaluate_pipelines(tiny_pipe, tiny_pipe, features="inception")
    with pytest.raises(ShapeError, match=r"shape \(3, 8, 8\) of the pipeline's"):
        evaluate_pipelines(tiny_pipe, tiny_pipe, data=real, **RUN)
    with pytest.raises(ConfigError, match="Several processes must share a `folder`"):
        evaluate_pipelines(tiny_pipe, tiny_pipe, process=SimpleNamespace(num_processes=2), **RUN)
    layer = packed_pipe.unet.conv_out
    layer.start_observing(("fp4_e2m1",))
    with pytest.raises(StateError, match="the candidate still observes its ranges"):
        evaluate_pipelines(tiny_pipe, packed_pipe, **RUN)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UnsupportedError, match=r'pip install "diffusers-msfp\[eval\]"'):
        evaluate_pipelines(tiny_pipe, tiny_pipe, **RUN)


def test_pipelines_that_begin_at_a_picture():
    pipe = make_img2img()
    run = {"num_samples": 2, "num_inference_steps": 4, "features": RUN["features"], "prompts": ["a hat"]}
    result = evaluate_pipelines(pipe, pipe, image=picture(), strength=0.5, **run)
    assert result.eps_mse == 0
    assert len(result.eps_rel_l2_by_timestep) == 2


def test_what_cannot_be_compared_is_refused_before_pictures_are_drawn():
    parts = make_small_pipe().components
    pipe = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    stages = set()
    with pytest.raises(UnsupportedError, match="perturbed-attention guidance"):
        evaluate_pipelines(
            pipe,
            pipe,
            num_samples=60,
            on_progress=lambda *_, stage: stages.add(stage),
            prompts=["a hat"],
            **RUN,
        )
    assert not any(stage.startswith("pictures") for stage in stages)
