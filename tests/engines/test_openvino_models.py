"""Whole models as OpenVINO's graphs: what they give, when they are made, and what runs in torch instead."""

import copy
import logging
import pickle
import subprocess
import sys
from collections import OrderedDict
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
from command_line import program
from conftest import ONE_BLOCK, make_condition_unet, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from elsewhere import ONE_BLOCK_WITH_TEXT
from peft import LoraConfig

from diffusers_msfp import (
    CorrectionConfig,
    FinetuneConfig,
    TemporalConfig,
    cli,
    correct_output,
    engines,
    finetune,
    maintain_temporal,
    quantize_pipeline,
    set_engine,
)
from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.cli.shared.load import SourceError
from diffusers_msfp.engines import tuning
from diffusers_msfp.engines.choose import engine_from_environment, engines_of
from diffusers_msfp.engines.openvino import forward, graph_forward_of, installed, runtime
from diffusers_msfp.engines.tuning import measure
from diffusers_msfp.errors import ConfigError, UnsupportedError
from diffusers_msfp.layers.convert import Conversion, convert, layers_by_name
from diffusers_msfp.sampling.observation import freeze

openvino = pytest.importorskip("openvino")
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("own_cache")]


def float_pipe() -> DDPMPipeline:
    return DDPMPipeline(make_unet(**ONE_BLOCK | {"add_attention": True}), DDIMScheduler())


@pytest.fixture(scope="module")
def made() -> UNet2DModel:
    return quantize_pipeline(float_pipe(), "w4a8", num_samples=4, num_inference_steps=3).unet


@pytest.fixture
def model(made) -> UNet2DModel:
    """A calibrated w4a8 model of one's own, which runs as a graph."""
    unet = copy.deepcopy(made)
    set_engine(unet, "openvino")
    return unet


@pytest.fixture
def lines(caplog):
    """What was said, by line."""
    caplog.set_level(logging.INFO, "diffusers_msfp.engines.openvino")
    return lambda: [record.getMessage() for record in caplog.records if "openvino" in record.name]


def expected(model, x: torch.Tensor, timestep: float = 10) -> torch.Tensor:
    """What the model gives layer by layer."""
    other = copy.deepcopy(model)
    set_engine(other, "auto")
    return run(other, x, timestep)


def near(y: torch.Tensor, other: torch.Tensor, tolerance: float = 0.05) -> bool:
    """Whether two outputs of a chaotic network are one network's."""
    return y.dtype == other.dtype and bool((y - other).norm() <= tolerance * other.norm())


def in_torch(said: list[str]) -> bool:
    return any("runs in torch" in line for line in said)


def test_a_graph_gives_what_the_layers_give(model, images, lines):
    assert engines_of(model) == {"openvino": sum(engines_of_layers(model).values())}
    y = run(model, images)
    assert near(y, expected(model, images))
    assert not near(run(model, images, 900), y, 1e-3)
    assert not in_torch(lines())
    assert sum("compiles a graph" in line for line in lines()) <= 1


def engines_of_layers(model) -> dict:
    other = copy.deepcopy(model)
    set_engine(other, "auto")
    return engines_of(other)


def test_outputs_have_the_models_form(model, images):
    with torch.no_grad():
        (plain,) = model(images, 10, return_dict=False)
        assert torch.equal(model(sample=images, timestep=torch.tensor(10)).sample, plain)
        again = model(images, 10, return_dict=False)[0]
    assert torch.equal(again, plain)
    assert plain.data_ptr() != again.data_ptr()


def test_another_shape_has_another_graph(model, lines):
    for size in (1, 2, 1):
        assert run(model, torch.randn(size, 3, 8, 8)).shape == (size, 3, 8, 8)
    assert not in_torch(lines())


def test_copies_pickles_and_saved_models_go_on(model, images, tmp_path, lines):
    y = run(model, images)
    other = copy.deepcopy(model)
    assert graph_forward_of(other).model is other
    assert torch.equal(run(other, images), y)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), images), y)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert graph_forward_of(loaded) is None
    set_engine(loaded, "openvino")
    assert torch.equal(run(loaded, images), y)
    with torch.no_grad():
        other.conv_out.bias.add_(1)
    assert not torch.equal(run(other, images), y)
    assert torch.equal(run(model, images), y)
    assert not in_torch(lines())


def test_set_engine_takes_graphs_away(model, images):
    set_engine(model, "auto")
    assert graph_forward_of(model) is None
    assert "forward" not in vars(model)
    assert torch.equal(run(model, images), expected(model, images))


WRITES = {
    "in place": lambda bias: bias.add_(1),
    "data": lambda bias: bias.data.add_(1),
    "new data": lambda bias: setattr(bias, "data", bias + 1),
}


@pytest.mark.parametrize("how", WRITES)
@torch.no_grad()
def test_weights_that_change_in_memory_are_seen(model, images, how):
    y = run(model, images)
    WRITES[how](model.conv_out.bias)
    assert near(run(model, images), y + 1, 0.02)


@torch.no_grad()
def test_a_loaded_state_is_seen(model, images):
    state = copy.deepcopy(model.state_dict())
    y = run(model, images)
    model.load_state_dict(state | {"conv_out.bias": state["conv_out.bias"] + 1})
    assert near(run(model, images), y + 1, 0.02)
    model.load_state_dict(state)
    assert torch.equal(run(model, images), y)


def hooked(model):
    handle = model.mid_block.register_forward_hook(lambda *_: None)
    return handle.remove


def processed(model):
    class Own(AttnProcessor):
        pass

    attention = model.mid_block.attentions[0]
    before = attention.processor
    attention.processor = Own()
    return lambda: setattr(attention, "processor", before)


def replaced(model):
    class Own(torch.nn.SiLU):
        pass

    before, model.conv_act = model.conv_act, Own()
    return lambda: setattr(model, "conv_act", before)


def patched(model):
    block = model.mid_block
    block.forward = type(block).forward.__get__(block)
    return lambda: delattr(block, "forward")


def training(model):
    model.train()
    return model.eval


LEAVE = {each.__name__: each for each in (hooked, processed, replaced, patched, training)}


@pytest.mark.parametrize("name", LEAVE)
def test_what_no_graph_can_hold_runs_in_torch_and_comes_back(model, images, lines, name):
    y = run(model, images)
    back = LEAVE[name](model)
    other = run(model, images)
    run(model, images)
    assert sum("runs in torch" in line for line in lines()) == 1
    assert engines_of(model).get("openvino") is None
    assert near(other, y)
    back()
    assert torch.equal(run(model, images), y)
    assert sum("graph again" in line for line in lines()) == 1


def test_gradients_run_in_torch(model, images, lines):
    run(model, images)
    x = images.clone().requires_grad_(True)
    model(x, 10).sample.sum().backward()
    assert x.grad.abs().sum() > 0
    assert in_torch(lines())


def test_hooks_on_the_whole_model_stay(model, images):
    seen = []
    model.register_forward_hook(lambda _model, _args, output: seen.append(output.sample.shape))
    run(model, images)
    assert seen == [images.shape]


def test_a_model_that_is_still_calibrated_runs_in_torch(images, lines):
    unet = make_unet(**ONE_BLOCK)
    convert(unet, Conversion.plan(unet, "w4a8"))
    set_engine(unet, "openvino")
    run(unet, images)
    assert "calibrated" in graph_forward_of(unet).why_in_torch()
    freeze(unet)
    assert near(run(unet, images), expected(unet, images))
    assert sum("graph again" in line for line in lines()) == 1


def follow_banks(pipe, original):
    finetune(pipe, original, FinetuneConfig(train_steps=1, num_adapters=2, rank=2, placement="merged", **SHORT))
    table = pipe.unet.timestep_router.table
    table[:, : table.shape[1] // 2], table[:, table.shape[1] // 2 :] = 0, 1
    for layer in layers_by_name(pipe.unet).values():
        if layer.num_banks > 1 and layer.input_format is not None:
            layer.input_scale[1] *= 2


def follow_sets(pipe, original):
    maintain_temporal(pipe, original, TemporalConfig(num_inference_steps=2, iterations=1, cache_above=None))


def follow_features(pipe, original):
    maintain_temporal(pipe, original, TemporalConfig(num_inference_steps=2, iterations=1, cache_above=0.0))


def corrected(pipe, original):
    correct_output(pipe, original, CorrectionConfig(num_samples=2, num_inference_steps=2))


SHORT = {"batch_size": 2, "num_inference_steps": 2}
BY_TIMESTEP = {each.__name__: each for each in (follow_banks, follow_sets, follow_features, corrected)}


@pytest.mark.parametrize("name", BY_TIMESTEP)
def test_what_follows_the_timestep_does(name, made, images, lines):
    pipe, original = DDPMPipeline(copy.deepcopy(made), DDIMScheduler()), float_pipe()
    BY_TIMESTEP[name](pipe, original)
    unet = pipe.unet
    set_engine(unet, "openvino")
    for timestep in (500, 0, 1, 900):  # 0 and 500 are those of the sampler
        assert near(run(unet, images, timestep), expected(unet, images, timestep)), timestep
    assert not in_torch(lines())
    if name != "corrected":
        with torch.no_grad():
            y = unet(images, torch.tensor([0, 900])).sample
        assert near(y[:1], expected(unet, images[:1], 0))
        assert any("timesteps for which different" in line for line in lines())


def test_bad_numbers_are_not_hidden(model, images):
    run(model, images)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(Exception, match="finite|NaN"):
        run(model, images)


def test_conditions_are_inputs(lines):
    unet = make_condition_unet(**ONE_BLOCK_WITH_TEXT)
    convert(unet, Conversion.plan(unet, "w4a8"))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        unet(x, 10, text)
        freeze(unet)
        reference = unet(x, 10, text).sample
        set_engine(unet, "openvino")
        assert near(unet(x, 10, encoder_hidden_states=text).sample, reference)
        assert not near(unet(x, 10, encoder_hidden_states=text * 2).sample, reference, 1e-3)
        assert not in_torch(lines())
        unet(x, 10, text, cross_attention_kwargs={"scale": 0.5})
        assert in_torch(lines())
        y = unet(x, 10, text).sample
        assert "graph again" in lines()[-1]
        unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False))
        assert not near(unet(x, 10, text).sample, y, 1e-4)
        assert "has adapters" in lines()[-1]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_the_error_of_whole_models_stays(dtype):
    exact = DiffusionPipeline.from_pretrained(EMBEDDED_MODEL).unet
    tuned = DiffusionPipeline.from_pretrained(TUNED_MODELS["w4a4"], dtype=dtype).unet
    x = torch.randn(4, 1, 32, 32)
    for timestep in (700, 10):
        wanted = run(exact, x, timestep)
        set_engine(tuned, "auto")
        before = (run(tuned, x.to(dtype), timestep).float() - wanted).norm()
        set_engine(tuned, "openvino")
        after = (run(tuned, x.to(dtype), timestep).float() - wanted).norm()
        assert abs(after / before - 1) < 0.05
    assert engines_of(tuned).keys() == {"openvino"}


def test_a_second_process_reads_the_graph(model, images, tmp_path):
    run(model, images)
    model.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import logging, torch
logging.basicConfig(level=logging.INFO)
import diffusers_msfp
from diffusers import UNet2DModel
model = UNet2DModel.from_pretrained({str(tmp_path)!r})
diffusers_msfp.set_engine(model, "openvino")
with torch.no_grad():
    torch.save(model(torch.load({str(tmp_path / "images.pt")!r}), 10).sample, {str(tmp_path / "y.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "graph read from" in done.stderr
    assert "compiles a graph" not in done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), run(model, images))


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("damage", [lambda _: b"damaged", flipped, lambda data: data[:-4096] + bytes(4096)])
def test_a_damaged_file_is_made_anew(model, images, lines, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(forward, "_GRAPHS", OrderedDict())
    y = run(model, images)
    forward._GRAPHS.clear()
    (blob,) = tmp_path.rglob("graph.blob")
    blob.write_bytes(damage(blob.read_bytes()))
    assert torch.equal(run(model, images), y)
    assert any("is of no use" in line for line in lines())


def test_old_graphs_make_room_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "MAX_STORED_BYTES", 15)
    for index in range(3):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "graph.blob").write_bytes(b"0123456789")
    runtime._make_room(tmp_path / "2")
    assert [each.name for each in tmp_path.iterdir()] == ["2"]


def test_without_the_package_the_engine_says_so(model, monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=r"openvino.*not installed.*pip install"):
        set_engine(model, "openvino")
    monkeypatch.setenv("MSFP_ENGINE", "openvino")
    with pytest.raises(ConfigError, match="not installed"):
        engine_from_environment()


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """Ways are timed as this function is told, on a machine that has measured nothing yet."""
    monkeypatch.setenv("MSFP_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()

    def times(**seconds):
        monkeypatch.setattr(measure, "time_ways", lambda ways: ({way: seconds.get(way, 1.0) for way in ways}, True))

    times()
    yield times
    tuning.forget()


@pytest.fixture
def without_kernels(monkeypatch):
    """`warmup` compiles no kernels."""
    monkeypatch.setattr(import_module("diffusers_msfp.cli.bench"), "compile_kernels", lambda _report: {})


def test_auto_takes_a_graph_where_it_was_measured_to_be_faster(made, measuring, lines):
    x, model = torch.randn(2, 3, 8, 8), copy.deepcopy(made)
    inputs = {"sample": x, "timestep": torch.tensor(10)}
    set_engine(model, "auto")
    assert graph_forward_of(model) is None  # nothing is known: nothing is looked at in a call
    layers = run(model, x)
    measuring(layers=1.0, openvino=0.5)
    assert forward.compare(model, inputs) == {"layers": 1.0, "openvino": 0.5}
    tuning.forget()  # as a new process
    set_engine(model, "auto")
    assert "openvino" not in engines_of(model)
    y = run(model, x)
    assert engines_of(model) == {"openvino": len(layers_by_name(model))}
    assert near(y, layers)
    set_engine(model, "openvino")
    assert torch.equal(run(model, x), y)
    other = copy.deepcopy(made)
    set_engine(other, "auto")
    said = lines()
    run(other, torch.randn(3, 3, 8, 8))  # another shape was never measured
    assert "openvino" not in engines_of(other)
    assert lines() == said
    set_engine(other, "auto", memory="low")
    assert graph_forward_of(other) is None


def test_auto_takes_what_warmup_has_compiled_and_compiles_nothing_in_passing(made, measuring, lines, monkeypatch):
    x, model = torch.randn(2, 3, 8, 8), copy.deepcopy(made)
    measuring(layers=1.0, openvino=0.5)
    forward.compare(model, {"sample": x, "timestep": torch.tensor(10)})
    set_engine(model, "auto")
    compiled = len([line for line in lines() if "compiles a graph" in line])
    with torch.no_grad():
        one = model(x, torch.tensor(10.0), return_dict=False)[0]  # as Stable Diffusion asks, on Euler's sampler
        assert "openvino" in engines_of(model)
        assert torch.equal(one, model(x, 10).sample)
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.conv_in.bias += 1  # of the same structure
    set_engine(other, "auto")
    layers = copy.deepcopy(other)
    set_engine(layers, "bf16")
    assert near(run(other, x), run(layers, x))
    assert "openvino" not in engines_of(other)
    assert len([line for line in lines() if "compiles a graph" in line]) == compiled


@pytest.mark.usefixtures("without_kernels")
def test_times_that_spread_are_not_kept_and_it_is_said(made, measuring, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "time_ways", lambda ways: ({way: 1.0 for way in ways}, False))
    made.save_pretrained(tmp_path / "unet")
    result = cli.warmup(str(tmp_path / "unet"), batch=2)
    assert not result.steps
    assert "spread too much to be kept" in result.refused["UNet2DModel"]


def test_a_cache_that_can_only_be_read_is_used(model, images, lines, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(forward, "_GRAPHS", OrderedDict())
    y = run(model, images)
    forward._GRAPHS.clear()

    def refuse(_place):
        raise OSError("read-only")

    monkeypatch.setattr(runtime.os, "utime", refuse)
    assert torch.equal(run(model, images), y)
    assert any("graph read from" in line for line in lines())


def test_auto_leaves_a_graph_that_is_slower_or_hardly_faster(made, measuring):
    model = copy.deepcopy(made)
    for seconds in (2.0, 0.97):
        measuring(layers=1.0, openvino=seconds)
        tuning.forget()
        forward.compare(model, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(int(10 * seconds))})
        set_engine(model, "auto")
        assert graph_forward_of(model) is None


def test_what_no_graph_can_hold_is_not_compared(made):
    model = copy.deepcopy(made)
    model.register_forward_hook(lambda *_: None)
    model.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="UNet2DModel cannot run as a graph here: "):
        forward.compare(model, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(10)})


@pytest.mark.usefixtures("without_kernels")
def test_warmup_compares_a_models_step(made, measuring, tmp_path):
    measuring(layers=1.0, openvino=0.5)
    made.save_pretrained(tmp_path / "unet")
    result = cli.warmup(str(tmp_path / "unet"), batch=2)
    assert result.steps == {"UNet2DModel": {"layers": 1.0, "openvino": 0.5}}
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet")
    run(loaded, torch.randn(2, 3, 8, 8))
    assert set(engines_of(loaded)) == {"openvino"}
    with pytest.raises(ConfigError, match="`dtype` must be one of float32, bfloat16, float16, but got 'int8'"):
        cli.warmup(str(tmp_path / "unet"), dtype="int8")
    with pytest.raises(SourceError, match="`warmup` times quantized denoisers, but"):
        cli.warmup(str(EMBEDDED_MODEL))


@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_warmup_compares_a_step_in_the_dtype_that_is_asked_for(made, measuring, tmp_path):
    measuring(layers=1.0, openvino=0.5)
    made.save_pretrained(tmp_path / "unet")
    found = []
    for _ in range(2):  # a dtype that nothing was measured for, and then was
        half = UNet2DModel.from_pretrained(tmp_path / "unet", dtype=torch.bfloat16)
        run(half, torch.randn(2, 3, 8, 8).bfloat16())
        found.append(set(engines_of(half)) == {"openvino"})
        cli.warmup(str(tmp_path / "unet"), batch=2, dtype="bfloat16")
    assert found == [False, True]


@pytest.mark.usefixtures("without_kernels")
def test_warmup_says_why_a_model_runs_layer_by_layer(made, measuring, tmp_path, monkeypatch):
    monkeypatch.setattr(engines.openvino, "compare", Mock(side_effect=UnsupportedError("adapters read floats")))
    made.save_pretrained(tmp_path / "unet")
    result = cli.warmup(str(tmp_path / "unet"), batch=2)
    assert (result.steps, result.refused) == ({}, {"UNet2DModel": "adapters read floats"})
    assert "layers are warm; adapters read floats" in program("warmup", tmp_path / "unet").stdout
