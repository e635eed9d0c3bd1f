"""Temporal feature maintenance on whole pipelines: what it does, what is stored, what else works with it."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from conftest import ONE_BLOCK, equal_state, inputs_of_layers, make_dit_pipe, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, EulerDiscreteScheduler, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    MSFPPipelineMixin,
    TemporalConfig,
    calibrate,
    finetune,
    maintain_temporal,
    quantize_pipeline,
    set_engine,
)
from diffusers_msfp.calibration.watch import watching_calls
from diffusers_msfp.cli import inspect
from diffusers_msfp.cli.app import app
from diffusers_msfp.errors import CheckpointError, ConfigError, ShapeError, StateError
from diffusers_msfp.layers.convert import layers_by_name
from diffusers_msfp.methods.routes import finite_set_of
from diffusers_msfp.methods.temporal import BlockLayer, TemporalBlock
from diffusers_msfp.methods.temporal.attach import plan_of
from diffusers_msfp.methods.temporal.features import temporal_features
from diffusers_msfp.methods.temporal.maintain import choose_cached
from diffusers_msfp.methods.temporal.reconstruct import neighbourhoods
from diffusers_msfp.numerics import Codes

SET = (800, 600, 400, 200, 0)
STEPS = {"num_inference_steps": len(SET), "num_samples": 2}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VARIANTS = {
    "fsc": {"iterations": 0, "cache_above": None},
    "tiar": {"iterations": 400, "cache_above": None},
    "cache": {"iterations": 0, "cache_above": 0.0},
    "all": {"iterations": 0, "cache_above": None, "fsc": "all"},
}
MIXED = torch.tensor([800, 123])


@pytest.fixture(scope="session")
def teacher(_packed) -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(), _packed.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def made(_packed, teacher) -> dict:
    """Variant → pipeline and figures."""
    result = {}
    for name, settings in VARIANTS.items():
        pipe = copy.deepcopy(_packed)
        result[name] = pipe, maintain_temporal(pipe, teacher, TemporalConfig(**STEPS, **settings))
    return result


@pytest.fixture(params=VARIANTS)
def maintained(request, made) -> DDPMPipeline:
    return copy.deepcopy(made[request.param][0])


@pytest.fixture
def cached(made) -> DDPMPipeline:
    return copy.deepcopy(made["cache"][0])


def worst(errors: dict) -> float:
    return max(max(by_timestep.values()) for by_timestep in errors.values())


def mean(errors: dict) -> float:
    values = [value for by_timestep in errors.values() for value in by_timestep.values()]
    return sum(values) / len(values)


# ── what it does ─────────────────────────────────────────────────────────────────────────────────────────────


def test_every_stage_brings_the_features_closer(made, teacher, packed_pipe):
    errors = {"ptq": temporal_features(teacher, packed_pipe, num_inference_steps=len(SET))}
    for name, (pipe, figures) in made.items():
        errors[name] = temporal_features(teacher, pipe, num_inference_steps=len(SET))
        assert list(errors[name]) == figures.block
        assert tuple(errors[name][figures.block[0]]) == SET
    assert mean(errors["fsc"]) < mean(errors["ptq"])
    assert mean(errors["tiar"]) < 0.9 * mean(errors["fsc"])
    assert worst(errors["cache"]) < 1e-3
    assert errors["all"] == errors["fsc"]


def test_figures_say_what_was_done(made, packed_pipe):
    figures = made["cache"][1]
    assert figures.timesteps == sorted(map(float, SET))
    assert figures.cached == figures.block == figures.sets
    layers = dict(packed_pipe.unet.named_modules())
    assert figures.cache_bytes == sum(2 * 5 * layers[name].out_features for name in figures.cached)
    assert figures.sets_bytes == 8 * 5 * len(figures.sets)
    quantized = [m for m in layers.values() if getattr(m, "input_format", None) is not None]
    assert len(made["all"][1].sets) == len(quantized) > len(figures.sets)
    errors = made["tiar"][1].errors[figures.block[-1]]
    assert errors["reconstructed"] < errors["ptq"]


def test_weights_stay_neighbours_on_their_grid(made, packed_pipe, teacher):
    name = made["tiar"][1].block[-1]
    before, after = (pipe.unet.get_submodule(name) for pipe in (packed_pipe, made["tiar"][0]))
    weight = teacher.unet.get_submodule(name).weight
    assert torch.equal(before.weight_scale, after.weight_scale)
    moved = after.dequantize_weight() != before.dequantize_weight()
    assert 0.02 < moved.float().mean() < 0.9
    assert after.weight_error > before.weight_error  # further from the weights, nearer to the features
    step = after.weight_scale[:, None] * after.weight_format.step
    largest = step * after.weight_format.lattice_max
    inside = weight.abs() < largest
    assert ((after.dequantize_weight() - weight).abs() <= step * after.weight_format.lattice_max / 2)[inside].all()


def test_engines_agree_layer_by_layer(maintained, images):
    unet, seen = maintained.unet, {}
    layers = [m for m in unet.modules() if getattr(m, "num_sets", 0)]
    for layer in layers:
        layer.register_forward_hook(lambda m, args, y: seen.update({m: (args[0], y)}))
    set_engine(unet, "reference")
    run(unet, images, MIXED)
    expected = dict(seen)
    for engine in ("int8", "bf16", "auto"):
        set_engine(unet, engine)
        with unet.temporal_set.at(MIXED), torch.no_grad():
            for layer, (x, y) in expected.items():
                assert (layer(x) - y).norm() <= 1e-5 * y.norm()


def test_samples_of_a_batch_are_independent(maintained, images):
    together = run(maintained.unet, images, MIXED)
    for row, timestep in enumerate(MIXED.tolist()):
        for given in (timestep, float(timestep), torch.tensor([timestep])):
            alone = run(maintained.unet, images[row : row + 1], given)[0]
            assert (alone - together[row]).norm() < 0.1 * alone.norm()


def test_fused_norms_quantize_for_the_running_timestep(made, images, monkeypatch):
    unet = copy.deepcopy(made["all"][0].unet)
    layer = unet.down_blocks[0].resnets[0].conv1
    read = inputs_of_layers(monkeypatch)
    for timestep in (800, 0, 800):
        run(unet, images, timestep)
    codes = [x for each, x in read if each is layer]
    assert all(isinstance(each, Codes) for each in codes)
    first, other, again = (each.bytes() for each in codes)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    run(unet, images, MIXED)
    assert not isinstance([x for each, x in read if each is layer][-1], Codes)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_any_number_of_steps_of_another_scheduler(cached, steps):
    pipe = DDPMPipeline(cached.unet, EulerDiscreteScheduler(timestep_spacing="linspace"))
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(1, 3, 8, 8)
    for timestep in pipe.scheduler.timesteps:
        assert torch.isfinite(run(pipe.unet, x, timestep)).all()
        entry = pipe.unet.temporal_set.route()
        assert SET[::-1][entry.uniform] == min(SET, key=lambda known: abs(known - float(timestep)))
        assert entry.certainly == (float(timestep) in SET)


def test_a_cached_block_is_not_computed(cached, images, monkeypatch):
    block, computed = plan_of(cached.unet).block, []
    for name in block:
        layer = cached.unet.get_submodule(name)
        monkeypatch.setattr(layer, "run", lambda *args, run=layer.run: computed.append(1) or run(*args))
    run(cached.unet, images, 800)
    assert not computed
    run(cached.unet, images, 799)
    assert len(computed) == len(block)


def test_users_adapters_on_the_block_switch_the_cache_off(cached, images):
    unet, name = cached.unet, "time_embedding.linear_2"
    expected, unseen = run(unet, images, 800), run(unet, images, 799)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[name], init_lora_weights=False), unet)
    assert not torch.allclose(run(unet, images, 800), expected, rtol=1e-3)
    assert not unet.temporal_set.route().certainly
    assert unseen.shape == expected.shape


HOOKS = {
    "a container before the block": lambda unet, hook: unet.time_embedding.register_forward_hook(hook),
    "a layer of the block": lambda unet, hook: unet.time_embedding.linear_2.register_forward_hook(hook),
    "a block around a layer": lambda unet, _: unet.mid_block.resnets[0].register_forward_pre_hook(
        lambda _, args: (args[0], args[1] + 1)
    ),
    "a module without tensors": lambda unet, _: unet.time_proj.register_forward_hook(lambda _m, _a, y: y + 0.1),
    "an activation": lambda unet, hook: unet.mid_block.resnets[0].nonlinearity.register_forward_hook(hook),
    "a forward of its own, and offloading": lambda unet, hook: (
        HOOKS["a forward of its own"](unet, hook),
        cpu_offload(unet, execution_device=torch.device("cpu")),
    ),
    "a forward of its own": lambda unet, hook: vars(unet.time_embedding).update(
        forward=lambda *args, forward=unet.time_embedding.forward: hook(None, None, forward(*args))
    ),
}


@pytest.mark.parametrize("case", HOOKS)
def test_hooks_before_the_block_switch_the_cache_off(cached, images, case):
    plain = copy.deepcopy(cached.unet)
    timestep = float(finite_set_of(plain).timesteps[1])
    assert_features_are_used(cached.unet, images, timestep)
    HOOKS[case](cached.unet, lambda _module, _args, output: output + 1)
    found = run(cached.unet, images, timestep)
    for layer in layers_by_name(plain).values():  # what there is without stored features
        layer.recall = None
    HOOKS[case](plain, lambda _module, _args, output: output + 1)
    assert torch.equal(found, run(plain, images, timestep))


def assert_features_are_used(unet, images, timestep) -> None:
    computed = copy.deepcopy(unet)
    for layer in layers_by_name(computed).values():
        layer.recall = None
    before = run(unet, images, timestep)
    assert not torch.equal(before, run(computed, images, timestep))
    offloaded = copy.deepcopy(unet)
    cpu_offload(offloaded, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(run(offloaded, images, timestep), before)
    remove_hook_from_submodules(offloaded)
    assert torch.equal(run(offloaded, images, timestep), before)
    looked_at = []
    with watching_calls(layers_by_name(unet), lambda name, _args: looked_at.append(name)):  # as reports do
        assert torch.equal(run(unet, images, timestep), before)
    assert looked_at


def test_changed_biases_switch_the_cache_off(cached, images, tmp_path):
    unet, bias = cached.unet, cached.unet.time_embedding.linear_2.bias
    before, expected = bias.detach().clone(), run(unet, images, 800)
    bias.data.add_(1)
    changed = run(unet, images, 800)
    assert (changed - expected).norm() > 1e-2 * expected.norm()
    assert not unet.temporal_set.route().certainly
    with pytest.raises(StateError, match="features that are stored must be those of the model, but biases"):
        cached.save_pretrained(tmp_path)
    bias.data.copy_(before)
    assert torch.equal(run(unet, images, 800), expected)
    cached.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path).unet
    loaded.time_embedding.linear_2.bias.data.add_(1)
    torch.testing.assert_close(run(loaded, images, 800), changed)


def test_biases_that_learn_are_not_bypassed(cached, images):
    unet = cached.unet.requires_grad_(False)
    bias = unet.time_embedding.linear_2.bias.requires_grad_(True)
    unet(images, 800).sample.square().mean().backward()
    assert bias.grad.norm() > 0


def test_float_modules_before_the_block_count(teacher, images, tmp_path):
    config = MSFPConfig("w4a4", modules_to_not_convert=["time_embedding"])
    pipe = quantize_pipeline(copy.deepcopy(teacher), config, **STEPS)
    maintain_temporal(pipe, teacher, TemporalConfig(**STEPS, **VARIANTS["cache"]))
    pipe.save_pretrained(tmp_path)
    for unet in (pipe.unet, DiffusionPipeline.from_pretrained(tmp_path).unet):
        assert set(plan_of(unet).upstream) == {"time_embedding.linear_1", "time_embedding.linear_2"}
        expected = run(unet, images, 800)
        assert unet.temporal_set.route().certainly
        settings = LoraConfig(r=2, target_modules=["time_embedding.linear_2"], init_lora_weights=False)
        inject_adapter_in_model(settings, unet)
        assert not torch.allclose(run(unet, images, 800), expected, rtol=1e-3)
        assert not unet.temporal_set.route().certainly


@pytest.mark.parametrize("name", [pytest.param("cache", marks=pytest.mark.slow), "all"])
def test_compiles_without_breaks(images, name):
    teacher = DDPMPipeline(make_unet(**ONE_BLOCK | {"down_block_types": ("AttnDownBlock2D",)}), DDIMScheduler())
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a4", **STEPS)
    maintain_temporal(pipe, teacher, TemporalConfig(**STEPS, **VARIANTS[name]))
    unet = pipe.unet
    torch._dynamo.reset()  # it counts compilations of the class, not of the model
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    for timestep in (torch.tensor(800), torch.tensor(123), MIXED):
        expected = run(unet, images, timestep)
        assert (run(compiled, images, timestep) - expected).norm() < 0.1 * expected.norm()


def test_layers_with_class_labels_are_left_alone():
    teacher = make_dit_pipe(norm_num_groups=4)
    teacher.set_progress_bar_config(disable=True)
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a8", num_samples=2, num_inference_steps=2)
    figures = maintain_temporal(pipe, teacher, TemporalConfig(num_inference_steps=3, iterations=5, cache_above=0.0))
    assert {name.rpartition(".")[2] for name in figures.block} == {"linear_1", "linear_2"}
    assert worst(temporal_features(teacher, pipe, num_inference_steps=3)) < 1e-3


# ── what is stored ───────────────────────────────────────────────────────────────────────────────────────────


def test_copies_and_checkpoints_are_bit_identical(maintained, images, tmp_path):
    maintained.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert equal_state(maintained.unet, loaded.unet)
    for other in (loaded.unet, copy.deepcopy(maintained.unet)):
        for timestep in (800, 123, 600.3, MIXED):
            assert torch.equal(run(other, images, timestep), run(maintained.unet, images, timestep))


def test_loading_in_bfloat16_keeps_timesteps_and_parameters_exact(cached, tmp_path):
    cached.save_pretrained(tmp_path)
    unet = UNet2DModel.from_pretrained(tmp_path / "unet", dtype=torch.bfloat16)
    assert unet.temporal_set.timesteps.dtype == torch.float32
    assert unet.time_embedding.linear_1.input_scale.dtype == torch.float32
    assert unet.time_embedding.linear_1.recall.features.dtype == torch.float16
    assert run(unet, torch.randn(2, 3, 8, 8).bfloat16(), MIXED).isfinite().all()


def damaged(pipe, folder, change) -> None:
    pipe.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


FEATURES = "time_embedding.linear_1.recall.features"
SCALE = "time_embedding.linear_1.input_scale"
TIMESTEPS = "temporal_set.timesteps"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (TIMESTEPS, torch.tensor([0.0, 1, 2, 3, torch.nan]), "finite and ascending"),
        (TIMESTEPS, torch.tensor([4.0, 3, 2, 1, 0]), "finite and ascending"),
        (TIMESTEPS, torch.arange(4.0), "shape"),
        (TIMESTEPS, torch.arange(5), "must be torch.float32"),
        (TIMESTEPS, None, "must hold `temporal_set.timesteps`"),
        (FEATURES, torch.full((5, 128), torch.inf).half(), "must be finite"),
        (FEATURES, torch.zeros(5, 7).half(), "shape"),
        (FEATURES, torch.zeros(5, 128), "must be torch.float16"),
        (FEATURES, None, "must hold"),
        (SCALE, torch.tensor([1.0, 1, 1, 1, 0]), "must be finite and > 0"),
        (SCALE, torch.ones(()), "shape"),
        (SCALE, torch.ones(6), "shape"),
    ],
)
def test_damaged_tables_are_refused(cached, tmp_path, key, value, message):
    damaged(cached, tmp_path, lambda t: t.pop(key) if value is None else t.update({key: value}))
    with pytest.raises(CheckpointError, match=message):
        UNet2DModel.from_pretrained(tmp_path / "unet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sets": ["no.such.layer"]}, "no quantized layer there"),
        ({"sets": ["conv_in"]}, "no quantized input there"),
        ({"num_timesteps": 4}, "shape"),
        ({"cached": {"int8": []}}, "must map"),
    ],
)
def test_records_that_do_not_fit_are_refused(cached, tmp_path, change, message):
    cached.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["temporal"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        UNet2DModel.from_pretrained(tmp_path / "unet")


def test_inspect_and_the_report_show_it(cached, tmp_path):
    cached.save_pretrained(tmp_path)
    shown = inspect(tmp_path).components["unet"].parts["temporal"]
    assert shown["timesteps"] == sorted(map(float, SET))
    assert len(shown["cached"]) == len(shown["sets"]) == len(shown["block"])
    assert shown["cache_bytes"] > shown["sets_bytes"] > 0
    assert MSFPPipelineMixin.attach(cached).quantization_report()["unet"]["temporal"] == shown
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).stdout.count("a set of 5 timesteps, 0 … 800") == 1


# ── what else works with it ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("placement", ["side", "merged"])
def test_fine_tuning_leaves_the_block_without_adapters(cached, teacher, images, placement, tmp_path):
    block = plan_of(cached.unet).block
    expected = {name: cached.unet.get_submodule(name).packed_weight.clone() for name in block}
    finetune(
        cached, teacher, FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=3, rank=2, placement=placement)
    )
    for name in block:
        layer = cached.unet.get_submodule(name)
        assert layer.adapters is None
        assert layer.num_sets == len(SET)
        assert torch.equal(layer.packed_weight, expected[name])
    cached.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    for timestep in (800, 123, MIXED):
        assert torch.equal(run(loaded.unet, images, timestep), run(cached.unet, images, timestep))
    if placement == "side":
        before = finite_set_of(cached.unet)
        MSFPPipelineMixin.attach(cached).unload_talora()
        assert finite_set_of(cached.unet) is before
        assert cached.unet.get_submodule(block[0]).routing is before
        assert torch.isfinite(run(cached.unet, images, 800)).all()


def test_dequantizing_and_calibrating_anew_take_it_off(cached, images):
    other = copy.deepcopy(cached)
    calibrate(other, num_samples=2, num_inference_steps=2)
    assert finite_set_of(other.unet) is None
    assert plan_of(other.unet) is None
    assert other.unet.time_embedding.linear_1.input_scale.ndim == 0
    cached.unet.dequantize()
    assert finite_set_of(cached.unet) is None
    for unet in (other.unet, cached.unet):
        assert torch.isfinite(run(unet, images, 800)).all()


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────


def test_pipelines_that_do_not_fit_are_refused(cached, packed_pipe, teacher):
    with pytest.raises(StateError, match="maintained already"):
        maintain_temporal(cached, teacher)
    with pytest.raises(ShapeError, match="must be the model that was quantized"):
        maintain_temporal(packed_pipe, make_dit_pipe(norm_num_groups=4))
    finetune(packed_pipe, teacher, FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=2, rank=2))
    with pytest.raises(StateError, match="comes before fine-tuning"):
        maintain_temporal(packed_pipe, teacher)
    observing = quantize_pipeline(copy.deepcopy(teacher), "w4a16")
    figures = maintain_temporal(observing, teacher, TemporalConfig(**STEPS, iterations=0, cache_above=0.0))
    assert figures.sets == []
    assert worst(temporal_features(teacher, observing, num_inference_steps=len(SET))) < 1e-3


@pytest.mark.parametrize(
    "bad", [{"fsc": "some"}, {"iterations": -1}, {"learning_rate": 0}, {"cache_above": -1}, {"num_samples": 0}]
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError, match="must be"):
        TemporalConfig(**bad)


def test_a_layer_that_others_read_is_stored_only_if_all_of_them_are():
    block = TemporalBlock((BlockLayer("h"), BlockLayer("a", "h", "silu"), BlockLayer("b", "h", "silu")))
    errors = {"h": 0.5, "a": 0.02, "b": 0.001}
    assert choose_cached(block, errors, 0.01) == ["a"]
    assert choose_cached(block, errors, 0.0) == ["h", "a", "b"]
    assert choose_cached(block, errors, 0.9) == choose_cached(block, errors, None) == []


def test_entries_stand_for_the_timesteps_nearest_to_them():
    cells = neighbourhoods(torch.tensor([0.0, 10, 21])).tolist()
    assert cells == [[0, 0, 0, 2, 5], [10, 8, 5, 13, 16], [21, 18, 16, 21, 21]]
    assert neighbourhoods(torch.tensor([0.0, 0.5])).tolist()[0] == [0, 0, 0, 0.125, 0.25]
