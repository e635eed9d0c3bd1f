"""Fine-tuning of layers whose input has a scale and zero point for each timestep."""

import copy

import pytest
import torch
from conftest import equal_state, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline

from diffusers_msfp import FinetuneConfig, TemporalConfig, finetune, maintain_temporal, quantize_pipeline, set_engine
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.layers.convert import layers_by_name
from diffusers_msfp.methods.talora.student import Student

STEPS = 4
MERGED = {"placement": "merged", "num_adapters": 1, "train_steps": 6, "num_inference_steps": STEPS, "batch_size": 4}


@pytest.fixture(scope="module")
def teacher() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def _pipe(teacher) -> DDPMPipeline:
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a4", num_samples=2, num_inference_steps=STEPS)
    config = TemporalConfig(num_inference_steps=STEPS, iterations=0, cache_above=None, fsc="all", num_samples=2)
    maintain_temporal(pipe, teacher, config)
    return pipe


@pytest.fixture
def pipe(_pipe) -> DDPMPipeline:
    return copy.deepcopy(_pipe)


def sets_of(pipe) -> dict[str, torch.Tensor]:
    return {name: layer.input_scale.clone() for name, layer in layers_by_name(pipe.unet).items() if layer.num_sets}


def test_before_training_each_sample_has_its_own_timestep_s_parameters(pipe, teacher):
    set_engine(pipe, "reference")
    layers = dict(layers_by_name(pipe.unet))
    student = Student(pipe.unet, teacher.unet, num_timesteps=1000, num_adapters=1, rank=0, placement="merged", seed=0)
    timesteps = torch.tensor([750, 0, 250, 750])
    student.choose(timesteps)
    entries = pipe.unet.temporal_set.nearest(timesteps).tolist()
    assert entries == [3, 0, 1, 3]
    trainees = [trainee for trainee in student.trainees() if trainee.layer.num_sets]
    assert len(trainees) > 10
    for trainee in trainees:
        layer = layers[trainee.layer.module_name]
        shape = layer.logical_shape
        tall = (4, shape[1] * getattr(layer, "groups", 1), 6, 6) if len(shape) == 4 else (4, 5, shape[1])
        x = torch.randn(tall, generator=torch.Generator().manual_seed(0))
        for given in (x, x.to(memory_format=torch.channels_last)) if len(shape) == 4 else (x,):
            expected = torch.cat([layer.run(given[i : i + 1], 0, entry) for i, entry in enumerate(entries)])
            torch.testing.assert_close(trainee(given), expected, rtol=1e-5, atol=1e-5)
    student.abandon()


def test_scales_of_all_timesteps_learn_and_are_kept(pipe, teacher, tmp_path):
    before, formats = sets_of(pipe), {n: layer.input_format for n, layer in layers_by_name(pipe.unet).items()}
    block = set(ModelRecord.of(pipe.unet).parts["temporal"].block)
    result = finetune(pipe, teacher, FinetuneConfig(**MERGED))
    assert result.usage == [[1.0]]
    after = sets_of(pipe)
    assert after.keys() == before.keys()
    assert block
    for name, scale in after.items():
        assert (scale != before[name]).any(), name  # nothing of the block was reconstructed or stored
        assert scale.shape == (STEPS,)
    assert any(len(set((after[name] / before[name]).tolist())) == STEPS for name in after), "each learns by itself"
    assert formats == {n: layer.input_format for n, layer in layers_by_name(pipe.unet).items()}
    parts = ModelRecord.of(pipe.unet).parts
    assert "adapters" not in parts or parts["adapters"] is None
    assert parts["temporal"].training["finetuning"]["updates"] == MERGED["train_steps"]

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert equal_state(again.unet, pipe.unet)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(run(again.unet, x, 500), run(pipe.unet, x, 500))


@pytest.mark.slow
def test_they_lower_the_error(embedded):
    pipe = quantize_pipeline(copy.deepcopy(embedded), "w4a4", num_samples=4, num_inference_steps=5)
    config = TemporalConfig(num_inference_steps=5, iterations=0, cache_above=None, fsc="all", num_samples=4)
    maintain_temporal(pipe, embedded, config)
    asked = {"num_samples": 4, "num_inference_steps": 5}
    before = compare_pipelines(embedded, pipe, **asked).traj_rel_l2
    finetune(pipe, embedded, FinetuneConfig(**MERGED | {"train_steps": 40, "num_inference_steps": 5}))
    assert compare_pipelines(embedded, pipe, **asked).traj_rel_l2 < 0.95 * before


@pytest.mark.parametrize("settings", [{"placement": "side"}, {"num_adapters": 2}])
def test_other_adapters_are_refused_and_nothing_is_changed(pipe, teacher, settings):
    state = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(ConfigError, match="learn with `placement='merged'` and `num_adapters=1`"):
        finetune(pipe, teacher, FinetuneConfig(**MERGED | settings))
    now = pipe.unet.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], state[key]) for key in state)


def test_adapters_of_any_kind_learn_beside_a_block_that_alone_has_sets(teacher):
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a4", num_samples=2, num_inference_steps=STEPS)
    settings = {"num_inference_steps": STEPS, "iterations": 0, "cache_above": None, "num_samples": 2}
    maintain_temporal(pipe, teacher, TemporalConfig(**settings))
    before, block = sets_of(pipe), set(pipe.unet.temporal_set.plan.block)
    assert set(before) <= block
    finetune(pipe, teacher, FinetuneConfig(train_steps=1, num_inference_steps=STEPS, batch_size=2, rank=2))
    after = sets_of(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ModelRecord.of(pipe.unet, 2).parts["adapters"]
    merged = FinetuneConfig(**MERGED | {"train_steps": 1})
    other = quantize_pipeline(copy.deepcopy(teacher), "w4a4", num_samples=2, num_inference_steps=STEPS)
    maintain_temporal(other, teacher, TemporalConfig(**settings))
    finetune(other, teacher, merged)
    learned = sets_of(other)
    assert any(not torch.equal(learned[name], before[name]) for name in learned)
