"""`fuse_lora` and `fuse`: a LoRA into packed weights is PEFT's sum, packed anew, completely or not at all."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from command_line import program
from conftest import ONE_BLOCK, equal_state, make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline
from loras import ALPHA, RANK, write_lora
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pipelines import make_small_pipe
from safetensors.torch import load_file, save_file

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    MSFPError,
    SplitConfig,
    StateError,
    TemporalConfig,
    calibrate,
    calibration_state,
    correct_output,
    dequantize,
    finetune,
    fuse_lora,
    maintain_temporal,
    quantize_pipeline,
    set_engine,
    split_shortcuts,
)
from diffusers_msfp.calibration import search_weight
from diffusers_msfp.errors import CheckpointError, ConfigError, NonFiniteError
from diffusers_msfp.layers.convert import layers_by_name, quant_layers
from diffusers_msfp.methods.correction.fit import CorrectionConfig
from diffusers_msfp.schemes import resolve

LINEARS, CONVOLUTIONS = ["to_q", "to_v", "ff.net.0.proj"], ["conv1", "conv_shortcut", "conv_in"]
ATTENTION = ONE_BLOCK | {"block_out_channels": (32,), "down_block_types": ("AttnDownBlock2D",)}
FEW = {"num_samples": 1, "num_inference_steps": 2}


def save_lora(pipe: StableDiffusionPipeline, folder: Path, *, text: bool = True, **more) -> Path:
    """A LoRA file of diffusers for linears and convolutions of the UNet and for the text encoder."""
    pipe, layers = copy.deepcopy(pipe), {}
    parts = {"unet": LINEARS + CONVOLUTIONS} | ({"text_encoder": ["q_proj", "v_proj"]} if text else {})
    for part, targets in parts.items():
        model = getattr(pipe, part)
        model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, **more), adapter_name="saved")
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="saved")
        layers[f"{part}_lora_adapter_metadata"] = model.peft_config["saved"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def float_pipe() -> StableDiffusionPipeline:
    pipe = make_small_pipe()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def _packed_text(float_pipe) -> StableDiffusionPipeline:
    return quantize_pipeline(copy.deepcopy(float_pipe), "w4a8", prompts=["a"], **FEW)


@pytest.fixture
def pipe(_packed_text) -> StableDiffusionPipeline:
    return copy.deepcopy(_packed_text)


@pytest.fixture(scope="module")
def file(float_pipe, tmp_path_factory) -> Path:
    return save_lora(float_pipe, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def embedded_lora(tmp_path) -> Path:
    """For a UNet without attention to text, for which diffusers has no loader."""
    return write_lora(make_unet(), ["to_k", "conv2"], tmp_path / "unet.safetensors")


def snapshot(pipe: DiffusionPipeline) -> dict:
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}": value.clone() for name, model in models.items() for key, value in model.state_dict().items()
    }


def same(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("weight", [0.8, -0.5])
def test_weights_are_those_that_diffusers_fuses_and_the_search_finds(pipe, file, weight):
    expected, before = copy.deepcopy(pipe), copy.deepcopy(pipe)
    dequantize(expected)
    expected.load_lora_weights(str(file.parent), weight_name=file.name)
    expected.fuse_lora(lora_scale=weight)
    expected.unload_lora_weights()
    result = fuse_lora(pipe, file, weight)
    touched = {name for name, layer in quant_layers(pipe.unet) if name.endswith(tuple(LINEARS + CONVOLUTIONS))}
    assert result.components == {"unet": len(touched)}
    assert result.float_layers == 2
    assert 0 < result.weight_rel_mse < 0.1
    old = layers_by_name(before.unet)
    for name, layer in quant_layers(pipe.unet):
        if name not in touched:
            assert torch.equal(layer.packed_weight, old[name].packed_weight)
            continue
        assert not torch.equal(layer.packed_weight, old[name].packed_weight)
        found = search_weight(expected.unet.get_submodule(name).weight.detach(), resolve(name, "w4a8", {}).weight)
        assert layer.weight_format == found.qparams.format
        torch.testing.assert_close(layer.weight_scale, found.qparams.scale.flatten(), rtol=1e-5, atol=0)
        torch.testing.assert_close(layer.weight_error, found.error)
        if layer.input_format is not None:
            assert torch.equal(layer.input_scale, old[name].input_scale)
    assert equal_state(pipe.text_encoder, expected.text_encoder)
    assert not any(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules())


def test_the_picture_is_that_of_the_lora_beside_the_weights(pipe, file):
    run = {"prompt": "a", "num_inference_steps": 4, "output_type": "latent"}

    def sample(each):
        return each(generator=torch.Generator().manual_seed(0), **run).images

    beside, without = copy.deepcopy(pipe), sample(pipe)
    beside.load_lora_weights(str(file))
    fuse_lora(pipe, file)
    wanted, got = sample(beside), sample(pipe)
    assert (got - wanted).square().mean() < 0.5 * (without - wanted).square().mean()


def test_saved_and_loaded_it_is_the_same(pipe, file, tmp_path):
    fuse_lora(pipe, file, 0.8)
    pipe.save_pretrained(tmp_path / "fused")
    again = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert equal_state(pipe.unet, again.unet)
    assert equal_state(pipe.text_encoder, again.text_encoder)


def test_engines_take_the_new_weights(pipe, file):
    unet = pipe.unet
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)

    def call():
        with torch.no_grad():
            return unet(x, 5, text).sample

    before = call()
    fuse_lora(pipe, file)
    fast = call()
    set_engine(unet, "reference")
    assert (fast - call()).norm() < 0.3 * (fast - before).norm()


def test_a_dora_is_fused_as_peft_does_it(pipe, float_pipe, tmp_path):
    file = save_lora(float_pipe, tmp_path, text=False, use_dora=True)
    expected = copy.deepcopy(pipe)
    dequantize(expected)
    fuse_lora(expected, file, 0.7)
    fuse_lora(pipe, file, 0.7)
    for name, layer in quant_layers(pipe.unet):
        if name.endswith("to_q"):
            wanted = expected.unet.get_submodule(name).weight
            assert (layer.dequantize_weight() - wanted).square().sum() < 0.1 * wanted.square().sum()


def test_float_pipelines_get_what_diffusers_fuses(float_pipe, file):
    ours, theirs = copy.deepcopy(float_pipe), copy.deepcopy(float_pipe)
    result = fuse_lora(ours, file, 0.8)
    assert (result.components, result.weight_rel_mse) == ({}, None)
    theirs.load_lora_weights(str(file))
    theirs.fuse_lora(lora_scale=0.8)
    theirs.unload_lora_weights()
    assert equal_state(ours.unet, theirs.unet)


def test_a_quantized_text_encoder_is_packed_anew(float_pipe, file):
    pipe = copy.deepcopy(float_pipe)
    config = MSFPConfig("w4a8", components_to_quantize=["unet", "text_encoder"])
    quantize_pipeline(pipe, config, prompts=["a"], **FEW)
    result = fuse_lora(pipe, file)
    assert result.components["text_encoder"] == 2
    assert result.float_layers == 0


def test_ranges_may_be_set_anew(pipe, file):
    before = snapshot(pipe)
    result = fuse_lora(pipe, file, calibration={"prompts": ["a"], **FEW})
    assert result.calibrated
    assert calibration_state(pipe) == "frozen"
    after = snapshot(pipe)
    changed = [key for key in before if key.endswith("input_scale") and not torch.equal(before[key], after[key])]
    assert changed


def test_progress_counts_layers(pipe, file):
    seen = []
    result = fuse_lora(pipe, file, on_progress=lambda done, total, **info: seen.append((done, total, info["stage"])))
    assert seen[-1] == (len(seen), len(seen), "fusing")
    assert len(seen) == sum(result.components.values()) + result.float_layers


def fused_weight(plain: DiffusionPipeline, state: dict, name: str, scale: float = 1.0) -> torch.Tensor:
    """A float layer's weight with what a file of `write_lora` adds to it."""
    up, down = state[f"unet.{name}.lora_B.weight"], state[f"unet.{name}.lora_A.weight"]
    weight = plain.unet.get_submodule(name).weight
    return weight + (up.flatten(1) @ down.flatten(1)).view(weight.shape) * scale * ALPHA / RANK


@pytest.mark.parametrize("alone", [False, True], ids=["pipeline", "model"])
def test_without_a_loader_of_diffusers(packed_pipe, embedded_lora, alone):
    expected = make_unet()
    owner = packed_pipe.unet if alone else packed_pipe
    plain = copy.deepcopy(packed_pipe)
    dequantize(plain)
    fuse_lora(owner, embedded_lora, 0.5)
    state = load_file(embedded_lora)
    assert sum("lora_A" in key for key in state) == sum(
        name.endswith(("to_k", "conv2")) for name, _ in expected.named_modules()
    )
    for name, layer in quant_layers(packed_pipe.unet):
        if name.endswith(("to_k", "conv2")):
            wanted = fused_weight(plain, state, name, 0.5)
            assert (layer.dequantize_weight() - wanted).square().sum() < 0.1 * wanted.square().sum(), name


@pytest.mark.parametrize("scheme", ["w4a4", "w4g16a8", "w4g32a16", "int-w4a8", "w6a8", "w8a8"])
def test_schemes_of_every_kind_are_packed_anew(scheme, tmp_path):
    file = write_lora(make_unet(**ATTENTION), ["to_k", "conv2"], tmp_path / "unet.safetensors")
    pipe = quantize_pipeline(DDPMPipeline(make_unet(**ATTENTION), DDIMScheduler()), scheme, **FEW)
    plain, state = copy.deepcopy(pipe), load_file(file)
    dequantize(plain)
    fuse_lora(pipe, file)
    for name, layer in quant_layers(pipe.unet):
        if name.endswith(("to_k", "conv2")):
            wanted = fused_weight(plain, state, name)
            error = (layer.dequantize_weight() - wanted).square().sum() / wanted.square().sum()
            torch.testing.assert_close(error, layer.weight_error.squeeze(), rtol=1e-3, atol=1e-9)


def without(file: Path, folder: Path, change) -> Path:
    state = change(load_file(file))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "changed.safetensors")
    return folder / "changed.safetensors"


FINITE = "must be finite with the LoRA in it, but it is not: damaged file"
CHANGES = {
    "another model's": (
        lambda state: {key.replace("unet.", "unet.elsewhere."): value for key, value in state.items()},
        ConfigError,
        "cannot be put on it: Target modules|0 of its 12 layers fit one of",
    ),
    "one layer too many": (
        lambda state: (
            state
            | {
                f"unet.no.such.lora_{part}.weight": torch.ones(2, 8) if part == "A" else torch.ones(8, 2)
                for part in "AB"
            }
        ),
        ConfigError,
        "(36 of its 37|12 of its 13) layers fit one of",
    ),
    "another size": (
        lambda state: {key: value.repeat([2] * value.ndim) for key, value in state.items()},
        ConfigError,
        r"cannot be put on it: Error\(s\) in loading state_dict",
    ),
    "NaN": (lambda state: {key: value * math.nan for key, value in state.items()}, NonFiniteError, FINITE),
    "infinite": (lambda state: {key: value + math.inf for key, value in state.items()}, NonFiniteError, FINITE),
    "no LoRA": (
        lambda state: {f"tensor{i}": value for i, value in enumerate(state.values())},
        CheckpointError,
        "none of its 72 tensors is of a LoRA",
    ),
    "empty": (lambda _: {}, CheckpointError, "none of its 0 tensors is of a LoRA"),
    "half a pair": (
        lambda state: {key: value for key, value in state.items() if "lora_B" not in key},
        ConfigError,
        "must have a pair of factors for",
    ),
}


def assert_refused(pipe, file, folder, kind):
    change, error, reason = CHANGES[kind]
    before, made = snapshot(pipe), without(file, folder, change)
    with pytest.raises(error, match=reason):
        fuse_lora(pipe, made)
    assert same(before, snapshot(pipe))


@pytest.mark.parametrize("kind", CHANGES)
def test_files_that_do_not_fit_change_nothing(pipe, file, tmp_path, kind):
    assert_refused(pipe, file, tmp_path, kind)
    modules = [*pipe.unet.modules(), *pipe.text_encoder.modules()]
    assert not any(isinstance(module, BaseTunerLayer) for module in modules)
    assert fuse_lora(pipe, file).components


@pytest.mark.parametrize("kind", ["another model's", "one layer too many", "another size", "NaN", "half a pair"])
def test_nor_without_a_loader(packed_pipe, embedded_lora, tmp_path, kind):
    assert_refused(packed_pipe, embedded_lora, tmp_path, kind)


@pytest.mark.parametrize("weight", [0, math.nan, math.inf, "0.8", True, None])
def test_weights_are_finite_numbers(packed_pipe, weight):
    with pytest.raises(ConfigError, match="must be a finite number other than 0, but got"):
        fuse_lora(packed_pipe, "anything", weight)


def test_what_is_no_safetensors_file(packed_pipe, tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "two").mkdir()
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / "two" / f"{name}.safetensors")
    for place, words in (
        (tmp_path / "lora.bin", "pickles are not read"),
        (tmp_path / "none.safetensors", "but .* is none"),
        ("user/model", "Download it first"),
        (tmp_path / "cut.safetensors", "must be a safetensors file, but it is not"),
        (tmp_path / "two", "must hold one safetensors file, but .* holds a.safetensors, b.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=words):
            fuse_lora(packed_pipe, place)


def test_adapters_that_are_there_are_refused(pipe, file):
    pipe.load_lora_weights(str(file))
    for owner, way in ((pipe, r"`pipe.unload_lora_weights\(\)`"), (pipe.unet, r"`model.unload_lora\(\)`")):
        with pytest.raises(StateError, match=f"Call {way} first"):
            fuse_lora(owner, file)


def test_a_pipeline_that_cannot_unload_is_not_told_to(packed_pipe, embedded_lora):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k"]), packed_pipe.unet)
    with pytest.raises(StateError, match="but this one has some. Load it anew first"):
        fuse_lora(packed_pipe, embedded_lora)


@pytest.fixture
def teacher() -> DDPMPipeline:
    return DDPMPipeline(make_unet(), DDIMScheduler())


def test_timestep_aware_adapters_are_refused(packed_pipe, teacher, embedded_lora):
    for placement in ("side", "merged"):
        pipe = copy.deepcopy(packed_pipe)
        config = FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=2, rank=2, placement=placement)
        finetune(pipe, teacher, config)
        with pytest.raises(StateError, match="merged ones cannot be taken off"):
            fuse_lora(pipe, embedded_lora)


def test_temporal_maintenance_and_splits_are_refused(packed_pipe, teacher, embedded_lora):
    split = copy.deepcopy(packed_pipe)
    split_shortcuts(split, teacher, SplitConfig(**FEW))
    with pytest.raises(StateError, match="Its shortcuts are split"):
        fuse_lora(split, embedded_lora)
    maintain_temporal(packed_pipe, teacher, TemporalConfig(num_inference_steps=2, iterations=2))
    with pytest.raises(StateError, match="Its temporal features are kept"):
        fuse_lora(packed_pipe, embedded_lora)
    calibrate(packed_pipe, **FEW)
    assert fuse_lora(packed_pipe, embedded_lora).taken_off == []


def test_an_output_correction_goes(packed_pipe, teacher, embedded_lora):
    correct_output(packed_pipe, teacher, CorrectionConfig(**FEW))
    assert fuse_lora(packed_pipe, embedded_lora).taken_off == ["output_correction"]


def test_the_refusal_of_diffusers_verb_names_it(pipe):
    with pytest.raises(MSFPError, match=r"diffusers_msfp.fuse_lora\(pipe, file, weight\)"):
        pipe.unet.fuse_lora()


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_measures_against_the_reference(teacher, packed_dir, embedded_lora, tmp_path):
    teacher.save_pretrained(tmp_path / "float")
    out = tmp_path / "fused"
    command = ["fuse", packed_dir, "--lora", embedded_lora, "--weight", 0.8, "--out", out]
    command += ["--reference", tmp_path / "float", "--num-samples", 2, "--num-inference-steps", 2]
    done = program(*command, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["error"]["eps_rel_l2"] < 1
    assert said["weight"] == 0.8
    pipe = DiffusionPipeline.from_pretrained(packed_dir)
    fuse_lora(pipe, embedded_lora, 0.8)
    assert equal_state(pipe.unet, DiffusionPipeline.from_pretrained(out).unet)
    assert program(*command).returncode == 2
    text = program(*command, "--overwrite", "--recalibrate").stdout
    assert "ranges set anew" in text
    assert "PSNR" in text


def test_the_command_refuses_in_one_line(tiny_dir, packed_dir, embedded_lora, tmp_path):
    out = tmp_path / "fused"
    for words, said in (
        ((tiny_dir, "--lora", embedded_lora), "must be the folder of an MSFP-quantized pipeline"),
        ((packed_dir, "--lora", tmp_path / "none"), "must be a safetensors file"),
        ((packed_dir, "--lora", embedded_lora, "--weight", "nan"), "must be a finite number other than 0"),
        ((f"{packed_dir}/unet", "--lora", embedded_lora, "--recalibrate"), "is a model alone"),
        ((packed_dir, "--lora", embedded_lora, "--prompt", "a"), "takes none"),
    ):
        done = program("fuse", *words, "--out", out)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in " ".join(done.stderr.split()), words
        assert not out.exists()


def test_a_model_alone_on_the_command_line(packed_dir, embedded_lora, tmp_path):
    done = program("fuse", f"{packed_dir}/unet", "--lora", embedded_lora, "--out", tmp_path / "fused")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fused" / "config.json").is_file()
