"""Verbs take a pipeline or a model; results are frozen and say all in `to_dict`; a wrong state is a state error."""

import copy
import dataclasses
import json

import pytest
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMPipeline

import diffusers_msfp
from diffusers_msfp import (
    FinetuneConfig,
    MSFPPipelineMixin,
    RoundingConfig,
    StateError,
    calibrate,
    calibration_state,
    dequantize,
    finetune,
    freeze,
    learn_rounding,
    quantize_pipeline,
    set_engine,
)
from diffusers_msfp.engines.choose import engines_of
from diffusers_msfp.errors import ConfigError, MSFPError, UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines, describe_checkpoint, evaluate_pipelines, layer_snr
from diffusers_msfp.evaluation.timing.speed import benchmark
from diffusers_msfp.layers.convert import Conversion, convert, quant_layers
from diffusers_msfp.results import Result, in_stage

RUN = {"num_samples": 2, "num_inference_steps": 2}


@pytest.fixture
def reference(tiny_pipe) -> DDPMPipeline:
    return tiny_pipe


def test_a_model_alone_is_compared_with_a_pipeline(reference, packed_pipe):
    alone = compare_pipelines(reference, packed_pipe.unet, **RUN)
    assert alone == compare_pipelines(reference, packed_pipe, **RUN)
    assert layer_snr(reference, packed_pipe.unet, **RUN) == layer_snr(reference, packed_pipe, **RUN)
    figures = evaluate_pipelines(reference, packed_pipe.unet, **RUN)
    assert figures.eps_mse == evaluate_pipelines(reference, packed_pipe, **RUN).eps_mse


def test_engine_state_and_speed_of_both(packed_pipe):
    for owner in (packed_pipe, packed_pipe.unet):
        set_engine(owner, "reference")
        assert set(engines_of(packed_pipe.unet)) == {"reference"}
        set_engine(owner)
        assert calibration_state(owner) == "frozen"
        freeze(owner)
    rows = [benchmark(owner, ["msfp"], repeats=2, with_floor=False) for owner in (packed_pipe, packed_pipe.unet)]
    assert [[row.provider for row in each] for each in rows] == [["bf16:cl", "msfp"]] * 2


def test_both_are_described(packed_dir):
    whole, alone = describe_checkpoint(packed_dir), describe_checkpoint(f"{packed_dir}/unet")
    assert whole.components["unet"] == alone.components["."]


def test_both_become_float_again(packed_pipe):
    one = copy.deepcopy(packed_pipe)
    for owner in (packed_pipe, one.unet):
        dequantize(owner)
    assert not list(quant_layers(packed_pipe.unet)) + list(quant_layers(one.unet))
    with pytest.raises(StateError, match="A quantized model is needed to make it float, but DDPMPipeline has none"):
        dequantize(packed_pipe)


def test_nothing_becomes_float_where_one_model_cannot(reference, packed_pipe):
    config = FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=2, rank=2, placement="merged")
    finetune(packed_pipe, reference, config)
    with pytest.raises(UnsupportedError, match="no single float weight per layer"):
        dequantize(packed_pipe)
    assert list(quant_layers(packed_pipe.unet))


ALONE = {
    "calibrate": (lambda _, model: calibrate(model), "a UNet2DModel alone cannot be sampled"),
    "quantize_pipeline": (lambda _, model: quantize_pipeline(model), "but got a UNet2DModel alone"),
    "compare": (lambda pipe, model: compare_pipelines(model, pipe), "a UNet2DModel alone draws no pictures"),
    "evaluate": (lambda pipe, model: evaluate_pipelines(model, pipe), "a UNet2DModel alone draws no pictures"),
    "finetune": (lambda pipe, model: finetune(model, pipe), "a UNet2DModel alone cannot be sampled"),
    "learn_rounding": (
        lambda pipe, model: learn_rounding(model, pipe, RoundingConfig()),
        "a UNet2DModel alone cannot be sampled",
    ),
}


@pytest.mark.parametrize("verb", ALONE)
def test_verbs_that_need_a_pipeline_say_so(verb, packed_pipe):
    call, message = ALONE[verb]
    with pytest.raises(ConfigError, match=message):
        call(packed_pipe, packed_pipe.unet)


def observing() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    convert(pipe.unet, Conversion.plan(pipe.unet, "w4a4"))
    return pipe


STATES = {
    "not quantized: calibrate": (lambda pipe, _: calibrate(pipe), "has none. Load it with"),
    "not quantized: set_engine": (lambda pipe, _: set_engine(pipe), "needs a quantized model"),
    "not quantized: freeze": (lambda pipe, _: freeze(pipe), "with quantized layers is needed"),
    "quantized already": (lambda _, packed: quantize_pipeline(packed, "w8a8"), "can be quantized once"),
    "observing: evaluate": (lambda pipe, _: evaluate_pipelines(pipe, observing()), "still observes its ranges"),
    "observing: finetune": (lambda pipe, _: finetune(observing(), pipe), "Only a calibrated model can be improved"),
    "nothing seen: freeze": (lambda *_: freeze(observing()), "Ranges need data"),
    "the teacher is quantized": (lambda _, packed: finetune(packed, copy.deepcopy(packed)), "full-precision original"),
    "no adapters": (lambda _, packed: MSFPPipelineMixin.attach(packed).disable_talora(), "must have timestep-aware"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_wrong_state_is_a_state_error(case, tiny_pipe, packed_pipe):
    call, message = STATES[case]
    with pytest.raises(StateError, match=message) as raised:
        call(tiny_pipe, packed_pipe)
    assert isinstance(raised.value, MSFPError)
    assert not isinstance(raised.value, ConfigError)


def results() -> list[type]:
    """All kinds of results of the package."""
    found, queue = [], [Result]
    while queue:
        queue += (kinds := queue.pop().__subclasses__())
        found += [kind for kind in kinds if kind.__module__.startswith(diffusers_msfp.__name__)]
    return found


def test_results_are_frozen_dataclasses():
    assert len(results()) > 20
    for kind in results():
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen, kind
        assert kind.__doc__
        assert not kind.__doc__.startswith(f"{kind.__name__}("), kind


def test_a_result_is_plain_data_in_to_dict(reference, packed_pipe, packed_dir):
    compared = compare_pipelines(reference, packed_pipe, **RUN)
    made = compared.to_dict()
    errors = ["traj_rel_l2", "eps_mse", "eps_rel_l2", "eps_rel_l2_by_timestep"]
    assert list(made) == [*errors, "image_psnr_db", "image_psnr_db_interval", "sampler"]
    for result in (compared, describe_checkpoint(packed_dir), *layer_snr(reference, packed_pipe, **RUN).values()):
        assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        compared.eps_mse = 0


def test_callbacks_have_one_signature(reference, tiny_pipe):
    told = []

    def on_progress(done: int, total: int, **info: object) -> None:
        assert 0 < done <= total
        told.append(info.get("stage"))

    pipe = quantize_pipeline(copy.deepcopy(tiny_pipe), "w4a4", **RUN, on_progress=on_progress)
    assert list(dict.fromkeys(told)) == ["weights of unet", "calibration"]
    more = {"train_steps": 1, "num_inference_steps": 2, "batch_size": 2, "rank": 2}
    settings = {"num_inference_steps": 2, "num_samples": 2, "batch_size": 2, "iterations": 1}
    calibrate(pipe, **RUN, on_progress=on_progress)
    learn_rounding(pipe, reference, RoundingConfig(**settings), on_progress=on_progress)
    compare_pipelines(reference, pipe, **RUN, on_progress=on_progress)
    evaluate_pipelines(reference, pipe, **RUN, on_progress=on_progress)
    benchmark(pipe, ["msfp"], repeats=2, with_floor=False, on_progress=on_progress)
    finetune(pipe, reference, FinetuneConfig(**more), on_progress=on_progress)
    assert {"pictures of the reference", "denoisers", "layers"} <= set(told)
    assert in_stage(None, "layers") is None
