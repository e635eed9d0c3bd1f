"""Pipelines with more than one denoiser: all of them, or the one that stays float is named."""

import copy
import functools
import json
import logging

import pipelines
import pytest
import torch
from conftest import make_unet
from diffusers import DiffusionPipeline, KandinskyV22CombinedPipeline
from safetensors.torch import load_file

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    MSFPPipelineMixin,
    RoundingConfig,
    SplitConfig,
    TemporalConfig,
    calibrate,
    calibration_state,
    finetune,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
    split_shortcuts,
)
from diffusers_msfp.cli import compare, quantize
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.evaluation import compare as comparison
from diffusers_msfp.evaluation import compare_pipelines, layer_snr
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.report import collect_report
from diffusers_msfp.sampling.denoisers import denoisers_of, focus, is_quantized, scheduler_of
from diffusers_msfp.sampling.denoising_factor import RunFactors
from diffusers_msfp.sampling.solvers import with_sampler

RUN = {"num_samples": 1, "num_inference_steps": 4}
KINDS = {
    "Stable Cascade": (pipelines.make_cascade, pipelines.SMALL_CASCADE | {"prompts": ["a hat"]}),
    "Kandinsky": (pipelines.make_kandinsky, pipelines.SMALL_KANDINSKY | {"prompts": ["a hat"]}),
    "Wan": (pipelines.make_wan, pipelines.small_wan()),
}
NAMES = {
    "Stable Cascade": ["decoder", "prior_prior"],
    "Kandinsky": ["unet", "prior_prior"],
    "Wan": ["transformer", "transformer_2"],
}


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """Kind, float pipeline, quantized pipeline, arguments of a run."""
    make, arguments = KINDS[request.param]
    pipe = make()
    return request.param, pipe, quantize_pipeline(copy.deepcopy(pipe), "w8a8", **RUN, **arguments), arguments


def packed_tensors(pipe) -> dict:
    return {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in denoisers_of(pipe).items()
    }


def changed(pipe, before: dict) -> list[str]:
    now = packed_tensors(pipe)
    return [
        name
        for name in now
        if now[name].keys() != before[name].keys()
        or any(not torch.equal(value, now[name][key]) for key, value in before[name].items())
    ]


@pytest.mark.situation("Wan 2.2, Stable Cascade and Kandinsky: two denoisers are quantized and calibrated", "right")
def test_all_are_quantized_and_reported(made):
    kind, pipe, quantized, arguments = made
    assert list(denoisers_of(quantized)) == NAMES[kind]
    assert calibration_state(quantized) == "frozen"
    for name in NAMES[kind]:
        layers = [module for module in getattr(quantized, name).modules() if isinstance(module, QuantLayer)]
        assert any(layer.input_format is not None for layer in layers), name
    report = MSFPPipelineMixin.attach(copy.deepcopy(quantized)).quantization_report()
    assert set(report) == set(NAMES[kind])


@pytest.mark.situation("comparing pipelines with two denoisers", "right")
def test_all_are_compared(made, monkeypatch):
    kind, pipe, quantized, arguments = made
    samplers = []
    monkeypatch.setattr(comparison, "RunFactors", lambda *run: samplers.append(RunFactors(*run)) or samplers[-1])
    result = compare_pipelines(pipe, quantized, **RUN, **arguments)
    own = [type(scheduler_of(focus(with_sampler(pipe), name))) for name in NAMES[kind]]
    assert [type(each.scheduler) for each in samplers] == own
    monkeypatch.undo()
    assert list(result.denoisers) == NAMES[kind]
    for figures in result.denoisers.values():
        assert 0 < figures.eps_rel_l2 < 0.3
        assert figures.quantized
    errors = [figures.eps_mse for figures in result.denoisers.values()]
    assert min(errors) <= result.eps_mse <= max(errors)
    one = copy.copy(quantized)
    name = NAMES[kind][1]
    vars(one)[name] = getattr(pipe, name)  # the second stays float
    figures = compare_pipelines(pipe, one, **RUN, **arguments).denoisers
    assert figures[name].eps_rel_l2 == 0
    assert not figures[name].quantized
    assert {key.partition(":")[0] for key in layer_snr(pipe, quantized, **RUN, **arguments)} == set(NAMES[kind])


TRAINING = {
    "temporal": (maintain_temporal, TemporalConfig(num_inference_steps=4, iterations=1, cache_above=None), "timesteps"),
    "rounding": (
        learn_rounding,
        RoundingConfig(num_inference_steps=4, num_samples=2, batch_size=2, iterations=1),
        "parts",
    ),
    "finetune": (finetune, FinetuneConfig(num_inference_steps=4, batch_size=1, train_steps=1, rank=1), "usage"),
}


@pytest.mark.parametrize("verb", TRAINING)
@pytest.mark.situation("training with two denoisers: both are changed, or neither with an error", "right")
def test_all_are_trained(made, verb):
    kind, pipe, quantized, arguments = made
    run, config, key = TRAINING[verb]
    student = copy.deepcopy(quantized)
    before = packed_tensors(student)
    if kind == "Wan" and verb == "rounding":  # takes one video at a time here
        config = RoundingConfig(num_inference_steps=4, num_samples=1, batch_size=1, iterations=1)
    if kind == "Stable Cascade" and verb == "finetune":  # its timesteps lie between 0 and 1
        with pytest.raises(ConfigError, match="which it cannot tell apart"):
            run(student, pipe, config, **arguments)
        assert changed(student, before) == []
        return
    result = run(student, pipe, config, **arguments)
    assert list(result.denoisers) == NAMES[kind]
    assert all(len(getattr(figures, key)) > 0 for figures in result.denoisers.values())
    assert list(result.to_dict()) == NAMES[kind]
    assert changed(student, before) == NAMES[kind]


@pytest.mark.situation("`Finetuner` with two denoisers", "refused")
def test_a_finetuner_takes_one_denoiser():
    make, arguments = KINDS["Wan"]
    pipe = make()
    student = quantize_pipeline(copy.deepcopy(pipe), "w8a8", **RUN, **arguments)
    before = packed_tensors(student)
    with pytest.raises(ConfigError, match="One denoiser learns at a time, .* transformer, transformer_2. Call `fine"):
        Finetuner(student, pipe, FinetuneConfig(train_steps=1), **arguments)
    assert changed(student, before) == []
    split = split_shortcuts(student, pipe, SplitConfig(num_samples=1, num_inference_steps=4), **arguments)
    assert split.denoisers["transformer_2"].split == {}


@pytest.mark.situation("only one of two denoisers is to be quantized: the other is named", "right")
def test_the_float_one_is_named(caplog, tmp_path):
    make, arguments = KINDS["Wan"]
    pipe, config = make(), MSFPConfig("w8a16", components_to_quantize=["transformer"])
    with caplog.at_level(logging.WARNING):
        one = quantize_pipeline(copy.deepcopy(pipe), config)
    assert "the denoiser `transformer_2` stays float" in caplog.text
    assert not is_quantized(one.transformer_2)
    caplog.clear()
    result = learn_rounding(
        one, pipe, RoundingConfig(num_inference_steps=4, num_samples=1, batch_size=1, iterations=1), **arguments
    )
    assert result.parts
    assert caplog.text.count("`transformer_2` stays float") == 1
    pipe.save_pretrained(tmp_path)
    caplog.clear()
    loaded = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert is_quantized(loaded.transformer)
    assert not is_quantized(loaded.transformer_2)
    assert caplog.text.count("the denoiser `transformer_2` stays float") == 1
    both = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=MSFPConfig("w8a16"))
    assert is_quantized(both.transformer_2)


@pytest.mark.situation("a second denoiser that is never called in calibration", "refused")
def test_a_denoiser_that_is_never_called():
    make, arguments = KINDS["Wan"]
    pipe = make()
    pipe.register_to_config(boundary_ratio=0.0)
    with pytest.raises(ConfigError, match="`transformer_2` was not with these arguments and this number of steps"):
        quantize_pipeline(pipe, "w8a8", **RUN, **arguments)
    pipe.register_to_config(boundary_ratio=0.8)
    calibrate(pipe, **RUN, **arguments)
    assert calibration_state(pipe) == "frozen"


@pytest.mark.situation("`quantize` and `compare` on the command line with two denoisers", "right")
def test_command_line(tmp_path, monkeypatch):
    call = KandinskyV22CombinedPipeline.__call__

    @functools.wraps(call)
    def small(self, **arguments):
        return call(self, **arguments | pipelines.SMALL_KANDINSKY)

    monkeypatch.setattr(KandinskyV22CombinedPipeline, "__call__", small)
    pipelines.make_kandinsky().save_pretrained(tmp_path / "float")
    made = quantize(
        str(tmp_path / "float"),
        tmp_path / "out",
        scheme="w8a8",
        num_samples=1,
        num_inference_steps=2,
        prompts=["a hat"],
    )
    assert set(made.components) == {"unet", "prior_prior"}
    for name in ("unet", "prior_prior"):
        record = json.loads((tmp_path / "out" / name / "config.json").read_text(encoding="utf-8"))
        assert record["quantization_config"]["calibration"]["state"] == "frozen"
        assert any(
            tensor.dtype == torch.uint8
            for tensor in load_file(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors").values()
        )
    result = compare(
        str(tmp_path / "float"), str(tmp_path / "out"), num_samples=1, num_inference_steps=2, prompts=["a hat"]
    )
    assert set(result.denoisers) == {"unet", "prior_prior"}
    assert result.bytes_quantized < result.bytes_reference


@pytest.mark.situation("the report on a pipeline with two denoisers names the one that it does not show", "right")
def test_report_names_the_other(packed_pipe):
    packed_pipe.super_res_first = make_unet()
    data = collect_report(packed_pipe, num_samples=1, num_inference_steps=1, with_speed=False)
    assert data.component == "unet"
    assert "the pipeline also has super_res_first" in data.missing["denoisers"]
