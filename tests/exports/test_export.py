"""Whole denoisers as files that other programs run, and what is refused."""

import copy
import functools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_line import program
from conftest import ONE_BLOCK, equal_state, make_condition_unet, make_dit, make_unet, run
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model

from diffusers_msfp import (
    CorrectionConfig,
    FinetuneConfig,
    StateError,
    correct_output,
    export,
    finetune,
    quantize_pipeline,
    set_engine,
)
from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.engines.openvino import graph_forward_of
from diffusers_msfp.errors import ConfigError, UnsupportedError
from diffusers_msfp.exports import TARGETS
from diffusers_msfp.layers.convert import Conversion, convert
from diffusers_msfp.sampling.observation import freeze

NEEDED = {"torch-export": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
EACH_TARGET = pytest.mark.parametrize(
    "to",
    [
        pytest.param(to, marks=pytest.mark.skipif(not all(map(find_spec, names)), reason=f"the extra for {to}"))
        for to, names in NEEDED.items()
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def file_for(to: str, folder: Path) -> Path:
    return folder / f"denoiser{TARGETS[to].suffix}"


def run_file(to: str, file: Path, **tensors: torch.Tensor) -> torch.Tensor:
    """The first output of a written graph, by its runtime alone."""
    if to == "torch-export":
        return torch.export.load(file).module()(**tensors)[0].detach()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if to == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, arrays)[0])
    import openvino

    return torch.from_numpy(openvino.Core().compile_model(file, "CPU", EXACT)(arrays)[0])


def near(y: torch.Tensor, other: torch.Tensor, tolerance: float = 0.05) -> bool:
    """Whether two outputs of a chaotic network are one network's."""
    return y.shape == other.shape and bool((y - other).norm() <= tolerance * other.norm())


@pytest.fixture(scope="module")
def made() -> DDPMPipeline:
    """As few layers as a UNet can have, its output corrected."""
    original = DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler())
    pipe = quantize_pipeline(copy.deepcopy(original), "w4a8", num_samples=2, num_inference_steps=2)
    correct_output(pipe, original, CorrectionConfig(num_samples=2, num_inference_steps=3))
    return pipe


@pytest.fixture
def pipe(made) -> DDPMPipeline:
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    """Target → a pipeline of its own, its file, alone in a folder, and what is said of it."""

    @functools.cache
    def write(to: str):
        pipe, file = copy.deepcopy(made), file_for(to, tmp_path_factory.mktemp(to))
        return pipe, file, export(pipe, file, to, batch=2)

    return write


@EACH_TARGET
def test_a_file_gives_what_the_model_gives_at_every_timestep(to, made, written, images):
    pipe, file, result = written(to)
    assert result.to_dict()["inputs"] == {"sample": "float32 [2, 3, 8, 8]", "timestep": "int64 [1]"}
    assert result.outputs == ["out_sample"]
    assert result.files == {each.name: each.stat().st_size for each in file.parent.iterdir()}
    assert equal_state(pipe.unet, made.unet)
    set_engine(pipe, "reference")
    for timestep in (0, 400, 999):
        expected = run(pipe.unet, images, timestep)
        assert near(run_file(to, file, sample=images, timestep=torch.tensor([timestep])), expected)
    assert not near(run(pipe.unet, images, 0), expected, 1e-3)


@EACH_TARGET
def test_a_file_loads_without_this_package(to, written, tmp_path):
    _, file, _ = written(to)
    load = {
        "torch-export": f"import torch; torch.export.load({str(file)!r}).module()",
        "onnx": f"import onnxruntime; onnxruntime.InferenceSession({str(file)!r}, providers=['CPUExecutionProvider'])",
        "openvino": f"import openvino; openvino.Core().compile_model({str(file)!r}, 'CPU')",
    }[to]
    program = f"import sys; sys.modules['diffusers_msfp'] = None\n{load}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.skipif(find_spec("openvino") is None, reason="the extra `openvino`")
def test_openvino_s_file_is_the_engine_s_graph(pipe, tmp_path, images, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = export(pipe, tmp_path / "denoiser.xml", "openvino", batch=2)
    assert result.unpacked
    assert result.bytes_weights > result.bytes_packed
    set_engine(pipe, "openvino")
    expected = run(pipe.unet, images, 400)
    assert graph_forward_of(pipe.unet).latest is None
    y = run_file("openvino", tmp_path / "denoiser.xml", sample=images, timestep=torch.tensor([400]))
    assert near(y, expected, 1e-5)


def test_labels_are_inputs(tmp_path):
    model = make_dit()
    convert(model, Conversion.plan(model, "w4a8"))
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    with torch.no_grad():
        model(x, torch.tensor([10]), class_labels=labels)
    freeze(model)
    result = export(model, tmp_path / "dit.pt2", "torch-export", batch=2)
    assert list(result.inputs) == ["hidden_states", "timestep", "class_labels"]
    call = {"hidden_states": x, "timestep": torch.tensor([10]), "class_labels": labels}
    with torch.no_grad():
        assert near(run_file("torch-export", tmp_path / "dit.pt2", **call), model(**call).sample)


def test_own_inputs_are_named_as_the_model_names_them(tmp_path):
    model = make_condition_unet(
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    convert(model, Conversion.plan(model, "w4a8"))
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)}
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": 10, "encoder_hidden_states": torch.randn(2, 5, 16)}
    with torch.no_grad():
        model(**call, added_cond_kwargs=added)
    freeze(model)
    with pytest.raises(UnsupportedError, match="inputs of UNet2DConditionModel are not known here.*inputs=…"):
        export(model, tmp_path / "unet.pt2", "torch-export")
    result = export(model, tmp_path / "unet.pt2", "torch-export", inputs=call | {"added_cond_kwargs": added})
    assert list(result.inputs) == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    with pytest.raises(UnsupportedError, match="inputs are tensors on the CPU, but .*`cross_attention_kwargs` holds"):
        export(
            model,
            tmp_path / "other.pt2",
            "torch-export",
            inputs=call | {"added_cond_kwargs": added, "cross_attention_kwargs": {"scale": 0.5}},
        )


def test_targets_and_files_are_checked_first(pipe, tmp_path):
    with pytest.raises(ConfigError, match="torch-export, onnx, openvino"):
        export(pipe, tmp_path / "a.onnx", "tflite")
    with pytest.raises(ConfigError, match=r"must end in \.pt2"):
        export(pipe, tmp_path / "a.onnx", "torch-export")
    for suffix, name, to in ((".pt2", "a.pt2", "torch-export"), (".xml", "a.bin", "openvino")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match=rf"{name} must not exist yet.*--overwrite"):
            export(pipe, tmp_path / f"a{suffix}", to)
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(ConfigError, match="`batch` must be at least 1"):
        export(pipe, tmp_path / "b.pt2", "torch-export", batch=0)
    export(pipe, tmp_path / "a.pt2", "torch-export", overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.bin", "a.pt2"]


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_missing_packages_are_named(to, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=rf'pip install "diffusers-msfp\[{to}\]"`.*diffusers-msfp doctor'):
        export(pipe, file_for(to, tmp_path), to)


def hooked(pipe):
    pipe.unet.register_forward_hook(lambda *_: None)


def hooked_inside(pipe):
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)


def adapted(pipe):
    inject_adapter_in_model(LoraConfig(target_modules=["conv1"], r=2), pipe.unet)


def moved(pipe):
    pipe.unet.to("meta")


def replaced(pipe):
    pipe.unet.forward = type(pipe.unet).forward.__get__(pipe.unet)


def training(pipe):
    pipe.unet.train()


REFUSED = {
    hooked: "put a hook on it",
    hooked_inside: "put a hook",
    adapted: "has adapters",
    moved: "are on meta, not on the CPU",
    replaced: "another forward",
    training: "in training mode",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda each: each.__name__)
def test_what_no_graph_can_hold_is_refused(change, pipe, tmp_path):
    change(pipe)
    with pytest.raises(UnsupportedError, match=REFUSED[change]):
        export(pipe, tmp_path / "a.pt2", "torch-export")
    assert not list(tmp_path.iterdir())


def test_layers_that_follow_the_timestep_are_refused(pipe, tmp_path):
    teacher = DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler())
    config = FinetuneConfig(
        train_steps=1, num_adapters=2, rank=2, placement="merged", batch_size=2, num_inference_steps=2
    )
    finetune(pipe, teacher, config)
    with pytest.raises(UnsupportedError, match="layers of UNet2DModel choose by the timestep .*recipe `msfp`"):
        export(pipe, tmp_path / "a.pt2", "torch-export")


def test_only_quantized_and_calibrated_denoisers_are_taken(tmp_path):
    with pytest.raises(StateError, match="UNet2DModel has no quantized layer: run `diffusers-msfp quantize`"):
        export(make_unet(), tmp_path / "a.pt2", "torch-export")
    model = make_unet(**ONE_BLOCK)
    convert(model, Conversion.plan(model, "w4a8"))
    with pytest.raises(StateError, match="still observing"):
        export(model, tmp_path / "a.pt2", "torch-export")
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()
    convert(vae, Conversion.plan(vae, "w4a16"))
    with pytest.raises(UnsupportedError, match="takes no timestep"):
        export(vae, tmp_path / "a.pt2", "torch-export", inputs={})


def test_the_verb(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "DIR")
    arguments = ["export", tmp_path / "DIR", "--to", "torch-export", "--out", tmp_path / "unet.pt2"]
    done = program(*arguments)
    assert done.returncode == 0, done.stderr
    assert "sample float32 [1, 3, 8, 8], timestep int64 [1], no other shapes" in done.stdout
    assert "packed as they are" in done.stdout
    again = program(*arguments)
    assert again.returncode == 2
    assert "must not exist yet" in again.stderr
    assert program("export", EMBEDDED_MODEL, "--to", "torch-export", "--out", tmp_path / "b.pt2").returncode == 2


@EACH_TARGET
@pytest.mark.slow
def test_the_embedded_model(to, tmp_path):
    exact = DiffusionPipeline.from_pretrained(EMBEDDED_MODEL).unet
    tuned = DiffusionPipeline.from_pretrained(TUNED_MODELS["w4a4"])
    set_engine(tuned, "reference")
    file = file_for(to, tmp_path)
    result = export(tuned, file, to, batch=4)
    x = torch.randn(4, 1, 32, 32)
    for timestep in (700, 10):
        wanted = run(exact, x, timestep)
        reference = run(tuned.unet, x, timestep)
        y = run_file(to, file, sample=x, timestep=torch.tensor([timestep]))
        assert near(y, reference)
        assert abs((y - wanted).norm() / (reference - wanted).norm() - 1) < 0.05
    assert result.bytes_packed <= result.bytes_weights < result.bytes_file


@EACH_TARGET
@pytest.mark.slow
def test_a_text_conditional_model(to, tmp_path):
    model = make_condition_unet()
    convert(model, Conversion.plan(model, "w4a8"))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
    with torch.no_grad():
        model(x, 10, text)
    freeze(model)
    set_engine(model, "reference")
    file = file_for(to, tmp_path)
    result = export(model, file, to, batch=2)
    assert list(result.inputs) == ["sample", "timestep", "encoder_hidden_states"]
    with torch.no_grad():
        expected = model(x, 500, text).sample
    when = torch.tensor([500])
    assert near(run_file(to, file, sample=x, timestep=when, encoder_hidden_states=text), expected)
    assert not near(run_file(to, file, sample=x, timestep=when, encoder_hidden_states=text * 2), expected, 1e-3)
    assert result.bytes_packed <= result.bytes_weights < result.bytes_file
