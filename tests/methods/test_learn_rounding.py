"""Learned rounding of whole pipelines."""

import copy
import dataclasses

import pytest
import torch
from conftest import equal_state, make_condition_unet, make_dit, make_dit_pipe, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from pipelines import ATTENDING, make_teacher

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    RoundingConfig,
    TemporalConfig,
    finetune,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
)
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.errors import ConfigError, NonFiniteError, ShapeError, StateError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.methods.blocks import reconstruction_units
from diffusers_msfp.methods.rounding.learn import Reconstructor
from diffusers_msfp.methods.rounding.parts import Examples, RoundedLayer, RoundedPart
from diffusers_msfp.numerics.rounding import local_step
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.solvers import with_ddim
from diffusers_msfp.sampling.trajectory import DenoisingStep, Trajectories

SHORT = {"iterations": 10, "num_samples": 8, "num_inference_steps": 4, "batch_size": 4, "learning_rate": 0.1}


@pytest.fixture
def teacher() -> DDPMPipeline:
    return make_teacher()


@pytest.fixture(scope="module")
def _packed() -> DDPMPipeline:
    """What `packed_pipe` is a copy of."""
    return quantize_pipeline(make_teacher(), "w4a4", num_samples=4, num_inference_steps=3)


@pytest.fixture(scope="module")
def by_default(_packed) -> DDPMPipeline:
    """Rounded with the default settings; not to be changed."""
    pipe = copy.deepcopy(_packed)
    learn_rounding(pipe, make_teacher(), RoundingConfig(**SHORT))
    return pipe


def layers_of(model) -> dict[str, QuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def differing(a, b) -> set[str]:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return {key for key in left if not torch.equal(left[key], right[key])}


def test_it_lowers_the_error_of_a_trained_model(embedded, tmp_path):
    teacher = with_ddim(embedded)
    pipe = with_ddim(copy.deepcopy(embedded))
    pipe.set_progress_bar_config(disable=True)
    quantize_pipeline(pipe, "w4a8", num_samples=4, num_inference_steps=5)
    nearest = copy.deepcopy(pipe.unet)
    before = compare_pipelines(teacher, pipe, num_samples=4, num_inference_steps=5).eps_mse
    result = learn_rounding(
        pipe, teacher, RoundingConfig(iterations=20, num_samples=16, num_inference_steps=5, batch_size=8)
    )
    after = compare_pipelines(teacher, pipe, num_samples=4, num_inference_steps=5).eps_mse
    assert after < 0.85 * before
    assert all(part["after"] <= part["before"] for part in result.parts)
    assert sum(part["layers"] for part in result.parts) == len(layers_of(pipe.unet))
    assert 0.005 < result.changed < 0.5
    assert 0 < result.sparsity_before < 0.3
    assert 0.5 < result.maxval_over_amax < 1.5
    zeros = [(layer.dequantize_weight() == 0).float().sum() for layer in layers_of(pipe.unet).values()]
    assert result.sparsity == pytest.approx(sum(zeros).item() / result.weights)

    assert {key.rsplit(".", 1)[1] for key in differing(nearest, pipe.unet)} <= {"packed_weight", "weight_error"}
    for name, layer in layers_of(pipe.unet).items():
        other, original = layers_of(nearest)[name], embedded.unet.get_submodule(name).weight
        assert layer.weight_error >= other.weight_error  # nearest is nearest
        # Every weight stays within one local step of its float value, unless it is beyond the range.
        unit = layer.weight_qparams().unit
        y = (original.flatten(1) / unit).clamp(-layer.weight_format.lattice_max, layer.weight_format.lattice_max)
        moved = (layer.dequantize_weight().flatten(1) / unit - y).abs()
        assert (moved <= local_step(y, layer.weight_format)[0] * (1 + 1e-5)).all()

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert equal_state(again.unet, pipe.unet)
    x, timesteps = torch.randn(3, 1, 32, 32), torch.tensor([10, 900, 400])
    assert torch.equal(run(again.unet, x, timesteps), run(pipe.unet, x, timesteps))


def test_parts_are_residual_blocks_in_the_order_of_running():
    def units(model, *inputs, layerwise=False, **kwargs) -> dict:
        quantize_model(model, MSFPConfig(scheme="w4a16"))
        pipe_step = DenoisingStep(torch.zeros(1), inputs, kwargs, torch.zeros(1))
        return reconstruction_units(model, pipe_step, layerwise=layerwise)

    x, t = torch.randn(1, 3, 8, 8), torch.tensor([3])
    unet = make_unet()
    found = units(unet, x, t)
    assert list(found)[:4] == [
        "time_embedding",
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0",
    ]
    assert list(found)[4:8] == [
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
    ]
    assert list(found)[-1] == "conv_out"
    assert found["down_blocks.0.resnets.0"] == [
        f"down_blocks.0.resnets.0.{name}" for name in ("conv1", "time_emb_proj", "conv2")
    ]
    inner = [name for names in found.values() for name in names]
    assert sorted(inner) == sorted(layers_of(unet))

    single = units(make_unet(), x, t, layerwise=True)
    assert all(names == [name] for name, names in single.items())
    assert sorted(single) == sorted(inner)

    found = units(make_condition_unet(), torch.randn(1, 4, 8, 8), t, torch.randn(1, 5, 16))
    block = "down_blocks.0.attentions.0"
    kinds = [name.removeprefix(f"{block}.") for name in found if name.startswith(block)]
    assert kinds == ["proj_in", "transformer_blocks.0", "proj_out"]
    found = units(make_dit(), torch.randn(1, 4, 4, 4), timestep=t, class_labels=torch.tensor([1]))
    assert "transformer_blocks.0" in found


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": "layer"}, {"scale_aware": False}, {"penalty": 0.0}, {"exclude": ("time_emb*", "conv_out")}],
    ids=lambda settings: next(iter(settings), "defaults"),
)
def test_options_run_and_change_codes_only(packed_pipe, teacher, by_default, settings):
    before = copy.deepcopy(packed_pipe.unet)
    seen = []
    config = RoundingConfig(**SHORT | settings)
    result = learn_rounding(
        packed_pipe, teacher, config, on_progress=lambda *part, **info: seen.append((*part, info["part"]))
    )
    assert [name for *_, name in seen] == [part["part"] for part in result.parts]
    assert seen[-1][0] == seen[-1][1] == len(result.parts)
    assert result.changed > 0
    differ = differing(before, packed_pipe.unet)
    assert {key.rsplit(".", 1)[1] for key in differ} == {"packed_weight", "weight_error"}
    changed = {key.removesuffix(".packed_weight") for key in differ if key.endswith(".packed_weight")}
    assert changed <= set(layers_of(before))
    if "scale_aware" not in settings:  # evenly drawn weights take E1M2, all of whose steps are equal
        assert bool(differing(by_default.unet, packed_pipe.unet)) == bool(settings)
    if "exclude" in settings:
        assert not any(name.startswith("time_emb") or name == "conv_out" for name in changed)
    assert not any(isinstance(module, RoundedLayer) for module in packed_pipe.unet.modules())


def test_equal_seeds_give_equal_codes_and_an_interrupted_run_goes_on(packed_pipe, teacher, tmp_path):
    whole, untouched = copy.deepcopy(packed_pipe), copy.deepcopy(packed_pipe)
    other = copy.deepcopy(packed_pipe)
    flags = [parameter.requires_grad for parameter in packed_pipe.unet.parameters()]
    assert any(flags)
    expected = learn_rounding(whole, teacher, RoundingConfig(**SHORT))

    def stop(done: int, *_, **__) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_rounding(packed_pipe, teacher, RoundingConfig(**SHORT), work_dir=tmp_path, on_progress=stop)
    assert equal_state(packed_pipe.unet, untouched.unet)
    assert [parameter.requires_grad for parameter in packed_pipe.unet.parameters()] == flags
    finished = sorted(tmp_path.glob("part-*.safetensors"))
    assert len(finished) == 3
    stamps = [file.stat().st_mtime_ns for file in finished]

    result = learn_rounding(packed_pipe, teacher, RoundingConfig(**SHORT), work_dir=tmp_path)
    assert [file.stat().st_mtime_ns for file in finished] == stamps
    assert equal_state(packed_pipe.unet, whole.unet)
    assert result.parts == expected.parts
    assert not equal_state(packed_pipe.unet, untouched.unet)

    with pytest.raises(ConfigError, match=r"run with other settings \(seed\)"):
        learn_rounding(other, teacher, RoundingConfig(**SHORT, seed=1), work_dir=tmp_path)
    layer = next(each for each in other.unet.modules() if isinstance(each, QuantLayer) and each.input_format)
    layer.input_scale.mul_(1.5)
    with pytest.raises(ConfigError, match=r"run with other settings \(model\)"):
        learn_rounding(other, teacher, RoundingConfig(**SHORT), work_dir=tmp_path)
    layer.input_scale.div_(1.5)
    learn_rounding(other, teacher, RoundingConfig(**SHORT, seed=1))
    assert not equal_state(other.unet, whole.unet)


def test_a_part_is_finished_early_where_nothing_improves(packed_pipe, teacher):
    result = learn_rounding(packed_pipe, teacher, RoundingConfig(**SHORT | {"learning_rate": 0.0}, patience=2))
    assert {part["iterations"] for part in result.parts} == {2}
    assert result.changed == 0
    assert all(part["before"] == part["after"] for part in result.parts)


def test_examples_stay_within_the_memory_given(packed_pipe, teacher):
    trajectories = Trajectories(teacher, call_arguments(teacher, None, 4, {}), 4, seed=0)
    steps = [trajectories[number] for number in range(4)]
    arguments = packed_pipe.unet, teacher.unet, "mid_block.resnets.0", steps
    every, few = Examples.collect(*arguments, 4, 2**30), Examples.collect(*arguments, 4, 1)
    assert (len(every), len(few)) == (16, 4)
    (args, kwargs), targets, timesteps = every.batch(torch.tensor([9, 1]))
    block = teacher.unet.mid_block.resnets[0]
    assert args[0].shape[0] == args[1].shape[0] == targets[0].shape[0] == 2
    assert kwargs == {}
    assert timesteps.tolist() == torch.cat([step.timesteps for step in steps])[[9, 1]].tolist()
    with torch.no_grad():
        error = (block(*args) - targets[0]).square().mean() / targets[0].square().mean()
    assert 0 < error < 0.5  # the inputs are the quantized model's


JUDGES = {  # samples, batch size, which trajectories judge and teach, and by how many examples; of few, single ones
    "one rollout": (12, 4, {0}, {1, 2, 3}, 3),
    "a sample at a time": (40, 1, {0}, set(range(1, 10)), 4),
    "five trajectories": (20, 1, {0}, {1, 2, 3, 4}, 4),
    "one trajectory": (4, 1, None, {0}, 1),
    "three trajectories": (12, 1, None, {0, 1, 2}, 1),
    "two at a time": (8, 2, None, {0, 1}, 1),
}


@pytest.mark.parametrize("kind", JUDGES)
def test_what_judges_is_of_other_trajectories_than_what_teaches(packed_pipe, teacher, monkeypatch, kind):
    """A neighbour in time, or the other half of guidance, would teach the answer."""
    number, batch, *expected, judges = JUDGES[kind]
    judged, taught = set(), set()
    loss = RoundedPart.loss

    def watch(self, call, targets, timesteps):
        seen = judged if next(iter(self.layers.values())).hardened else taught
        seen.update(float(row.sum()) for row in targets[0])
        return loss(self, call, targets, timesteps)

    monkeypatch.setattr(RoundedPart, "loss", watch)
    settings = {"num_samples": number, "num_inference_steps": 4, "batch_size": batch, "iterations": 240 // batch}
    exclude = ("down_blocks.*", "up_blocks.*", "mid_block.resnets.1*", "time_embedding.*", "conv_*")
    learner = Reconstructor(packed_pipe, teacher, RoundingConfig(**settings, exclude=exclude))
    learner.run()
    (name,) = learner.parts
    examples = Examples.collect(packed_pipe.unet, teacher.unet, name, learner.steps, batch, 2**30, length=4)
    sums = [float(row.sum()) for row in examples.targets[0]]
    own = [
        {int(sample) for sample, each in zip(examples.samples, sums, strict=True) if each in seen}
        for seen in (judged, taught)
    ]
    assert own[1] == expected[1]
    assert own[0] == expected[0] or expected[0] is None
    assert len(judged) == judges
    assert not judged & taught


def test_a_tensor_that_all_share_is_never_cut(packed_pipe, teacher):
    trajectories = Trajectories(teacher, call_arguments(teacher, None, 4, {}), 4, seed=0)
    steps = [trajectories[number] for number in range(4)]
    examples = Examples.collect(packed_pipe.unet, teacher.unet, "mid_block.resnets.0", steps, 4, 2**30)
    shared = torch.arange(float(len(examples)))
    examples = dataclasses.replace(
        examples, leaves=[*examples.leaves[:-1], shared], per_example=[*examples.per_example[:-1], False]
    )
    (args, kwargs), *_ = examples.batch(torch.tensor([9, 1]))
    assert any(value is shared for value in (*args, *kwargs.values()))


@pytest.mark.parametrize(("scheme", "fsc"), [("w8a16", "block"), ("w4a8", None)])
def test_what_temporal_maintenance_has_rounded_stays(teacher, scheme, fsc):
    pipe = copy.deepcopy(teacher)
    quantize_pipeline(pipe, scheme, num_samples=2, num_inference_steps=2)
    settings = {"num_inference_steps": 4, "iterations": 5, "cache_above": None, "fsc": fsc}
    block = maintain_temporal(pipe, teacher, TemporalConfig(**settings)).block
    before = {name: pipe.unet.get_submodule(name).packed_weight.clone() for name in block}
    learn_rounding(pipe, teacher, RoundingConfig(**SHORT))
    assert block
    assert all(torch.equal(pipe.unet.get_submodule(name).packed_weight, weight) for name, weight in before.items())
    finetune(pipe, teacher, FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=4, rank=2))
    adapted = {name for names in ModelRecord.of(pipe.unet).parts["adapters"].ranks.values() for name in names}
    assert adapted
    assert not adapted & set(block)


def test_one_pattern_may_be_a_string_and_may_not_exclude_all(packed_pipe, teacher):
    assert RoundingConfig(exclude="conv_in").exclude == ("conv_in",)
    with pytest.raises(ConfigError, match="Some layer must be left to learn, but `exclude`"):
        learn_rounding(packed_pipe, teacher, RoundingConfig(**SHORT | {"exclude": "*"}))


def test_labels_and_guidance_are_the_pipeline_s():
    pipe, teacher = make_dit_pipe(), make_dit_pipe()
    quantize_pipeline(pipe, "w4a8", num_samples=2, num_inference_steps=2)
    result = learn_rounding(pipe, teacher, RoundingConfig(**SHORT), guidance_scale=4.0)
    assert result.changed > 0
    assert {part["examples"] for part in result.parts} == {16}  # guidance asks twice


def test_bad_input_is_refused(packed_pipe, teacher, tmp_path):
    for settings, message in (
        ({"granularity": "model"}, "`granularity` must be one of block, layer, but got 'model'"),
        ({"iterations": 0}, "`iterations` must be at least 1, but got 0"),
        ({"penalty": float("nan")}, "`penalty` must be finite and ≥ 0, but got nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            RoundingConfig(**settings)
    config = RoundingConfig(**SHORT)
    with pytest.raises(ConfigError, match="Every pattern in `exclude` must match"):
        learn_rounding(packed_pipe, teacher, RoundingConfig(exclude=("nothing",)))
    wider = DDPMPipeline(make_unet(**ATTENDING | {"block_out_channels": (16,)}), DDIMScheduler())
    with pytest.raises(ShapeError, match="not the model that was quantized"):
        learn_rounding(packed_pipe, wider, config)
    broken = copy.deepcopy(teacher)
    broken.unet.mid_block.resnets[0].conv1.bias.data.fill_(float("nan"))
    state = copy.deepcopy(packed_pipe.unet)
    with pytest.raises(NonFiniteError, match="must be finite"):
        learn_rounding(packed_pipe, broken, config)
    assert equal_state(packed_pipe.unet, state)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="must be JSON, but it is not"):
        learn_rounding(packed_pipe, teacher, config, work_dir=tmp_path)
    finetune(packed_pipe, teacher, FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2))
    with pytest.raises(StateError, match="has adapters already"):
        learn_rounding(packed_pipe, teacher, config)
