"""Signal-to-noise ratios of layers are each layer's own."""

import copy

import pytest
import torch
from conftest import make_dit_pipe, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline
from peft import LoraConfig, inject_adapter_in_model

from diffusers_msfp import FinetuneConfig, TemporalConfig, finetune, maintain_temporal
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.evaluation import layer_snr
from diffusers_msfp.evaluation.layers import snr_db
from diffusers_msfp.layers.convert import quant_layers

RUN = {"num_samples": 2, "num_inference_steps": 2}


@pytest.fixture
def float_pipe() -> DDPMPipeline:
    return DDPMPipeline(make_unet(), DDIMScheduler())


def test_a_layer_that_is_ten_percent_off(float_pipe):
    candidate = copy.deepcopy(float_pipe)
    layer = candidate.unet.down_blocks[0].resnets[0].conv1
    layer.weight.data *= 1.1
    layer.bias.data *= 1.1
    steps = []
    found = layer_snr(float_pipe, candidate, **RUN, on_progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    changed = found.pop("down_blocks.0.resnets.0.conv1")
    assert changed.snr_db == pytest.approx(20, abs=1e-3)
    assert changed.by_timestep == pytest.approx({"500": 20, "0": 20}, abs=1e-3)
    assert {entry.snr_db for entry in found.values()} == {100}, "no error of the layers before"
    assert set(layer_snr(float_pipe, float_pipe, **RUN)) == {*found, "down_blocks.0.resnets.0.conv1"}


def test_quantized_and_reduced_precision(float_pipe, packed_pipe):
    found = layer_snr(float_pipe, packed_pipe, **RUN)
    assert set(found) == {name for name, _ in quant_layers(packed_pipe.unet)}
    assert all(8 < entry.snr_db < 60 and not entry.adapted for entry in found.values())
    half = DDPMPipeline(copy.deepcopy(float_pipe.unet).to(torch.bfloat16), float_pipe.scheduler)
    assert all(40 < entry.snr_db < 60 for entry in layer_snr(float_pipe, half, **RUN).values())


def test_adapters_follow_the_timestep(float_pipe, packed_pipe):
    finetune(packed_pipe, float_pipe, FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2))
    router = packed_pipe.unet.timestep_router
    router.table.copy_(torch.arange(1000)[None] >= 250)
    layer = packed_pipe.unet.down_blocks[0].resnets[0].conv1
    with torch.no_grad():
        layer.adapters.up[1].fill_(10.0)
        layer.adapters.down[1].fill_(10.0)
    layers = layer_snr(float_pipe, packed_pipe, **RUN)
    assert {name for name, entry in layers.items() if entry.adapted} == set(router.plan.rank_of())
    found = layers["down_blocks.0.resnets.0.conv1"].by_timestep
    assert found["500"] < 0 < 8 < found["0"]


@pytest.mark.parametrize("called_before", [False, True])
def test_stored_features_and_parameters_are_those_of_the_timestep(float_pipe, packed_pipe, called_before):
    maintain_temporal(packed_pipe, float_pipe, TemporalConfig(num_inference_steps=2, cache_above=0.0, iterations=2))
    cached = packed_pipe.unet.temporal_set.plan.cached_layers()
    assert cached
    if called_before:
        run(packed_pipe.unet, torch.randn(1, 3, 8, 8), 500)
    found = layer_snr(float_pipe, packed_pipe, **RUN)
    assert all(min(found[name].by_timestep.values()) > 50 for name in cached), "each as exact as float16"


def test_users_adapters_on_the_block_are_measured_not_its_stored_features(float_pipe, packed_pipe):
    maintain_temporal(packed_pipe, float_pipe, TemporalConfig(num_inference_steps=2, cache_above=0.0, iterations=2))
    name = next(iter(packed_pipe.unet.temporal_set.plan.cached_layers()))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[name]), packed_pipe.unet)
    assert max(layer_snr(float_pipe, packed_pipe, **RUN)[name].by_timestep.values()) < 50


def test_limits(float_pipe):
    assert snr_db(0, 0) == 100
    assert snr_db(0, 1) == -100
    assert snr_db(100, 1) == pytest.approx(20)
    with pytest.raises(ConfigError, match="none of them: the candidate is not a quantized version"):
        layer_snr(float_pipe, make_dit_pipe(), **RUN)
    with pytest.raises(ConfigError, match="`num_samples` must be at least 1"):
        layer_snr(float_pipe, float_pipe, num_samples=0)
