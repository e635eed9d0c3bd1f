"""Single files in the original layout: from file to folder, and one model while diffusers loads it."""

import json
from pathlib import Path

import pytest
import torch
from command_line import program
from conftest import equal_state
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from pipelines import make_controlnet, make_inpainting, make_sdxl, make_small_pipe
from safetensors.torch import load_file, save_file
from single_files import original_controlnet, original_unet, write_original

from diffusers_msfp import MSFPConfig, calibration_state, cli
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.plugin.quantize import quantize_model

FEW = {"num_samples": 1, "num_inference_steps": 2, "prompts": ["a"]}
KINDS = {"SD": make_small_pipe, "inpainting": make_inpainting, "SDXL": make_sdxl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Float pipelines with configs and weights."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}
    for kind, make in KINDS.items():
        make().save_pretrained(root / kind)
        made[kind] = root / kind
    return made


def same_codes(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = dict(quant_layers(a)), dict(quant_layers(b))
    return left.keys() == right.keys() and all(
        torch.equal(left[name].packed_weight, right[name].packed_weight)
        and torch.equal(left[name].weight_scale, right[name].weight_scale)
        for name in left
    )


@pytest.mark.parametrize(
    ("kind", "averages"),
    [("SD", False), ("SD", True), ("inpainting", False)],
    ids=["SD", "SD with averages", "inpainting"],
)
def test_a_file_gives_what_its_folder_gives(folders, tmp_path, kind, averages):
    file = write_original(KINDS[kind](), tmp_path / "model.safetensors", averages=averages)
    command = ["quantize", file, "--config", folders[kind], "--scheme", "w4a16", "--json"]
    done = program(*command, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["components"] == ["unet"]
    made = DiffusionPipeline.from_pretrained(tmp_path / "out")
    cli.quantize(str(folders[kind]), tmp_path / "wanted", scheme="w4a16")
    wanted = DiffusionPipeline.from_pretrained(tmp_path / "wanted")
    assert equal_state(made.unet, wanted.unet)
    assert equal_state(made.vae, wanted.vae)
    assert equal_state(made.text_encoder, wanted.text_encoder)
    assert said["bytes_reference"] == sum(value.nbytes for value in original_unet(KINDS[kind]().unet).values())


def test_a_calibrated_file_is_calibrated(folders, tmp_path):
    file = write_original(make_small_pipe(), tmp_path / "model.safetensors", dtype=torch.float16)
    result = cli.quantize(str(file), tmp_path / "out", config=str(folders["SD"]), scheme="w4a8", **FEW)
    assert result.calibration_state == "frozen"
    assert all(part.is_floating_point() for part in load_file(file).values())
    assert DiffusionPipeline.from_pretrained(tmp_path / "out")("a", num_inference_steps=1, output_type="latent")


def test_what_stays_float_is_stored_as_it_came(tmp_path):
    pipe = make_small_pipe()
    pipe.text_encoder.bfloat16()
    pipe.save_pretrained(tmp_path / "source")
    cli.quantize(str(tmp_path / "source"), tmp_path / "out", scheme="w4a16", **FEW)
    before, after = (tmp_path / each / "text_encoder" / "model.safetensors" for each in ("source", "out"))
    assert after.stat().st_size <= before.stat().st_size
    made = DiffusionPipeline.from_pretrained(tmp_path / "out")  # in one dtype
    assert {each.dtype for part in (made.text_encoder, made.vae) for each in part.parameters()} == {torch.float32}
    assert equal_state(made.text_encoder, pipe.text_encoder.float())
    assert equal_state(made.vae, pipe.vae)
    stored = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {each.dtype for each in stored.values()} == {torch.float32}


def test_what_a_file_lacks_comes_from_beside_its_configs(folders, tmp_path, capfd):
    """The text encoders of SDXL are told by sizes that no tiny model has; a file may have no VAE."""
    for kind in ("SD", "SDXL"):
        file = write_original(KINDS[kind](), tmp_path / f"{kind}.safetensors", vae=kind == "SDXL")
        out = tmp_path / kind
        result = cli.quantize(str(file), out, config=str(folders[kind]), scheme="w4a16")
        assert result.components == ["unet"]
        made, wanted = DiffusionPipeline.from_pretrained(out), KINDS[kind]()
        quantize_model(wanted.unet, MSFPConfig("w4a16"))
        assert same_codes(made.unet, wanted.unet)
        assert equal_state(made.vae, wanted.vae)
    said = " ".join(capfd.readouterr().err.split())
    assert "lacks vae, which is read from" in said
    assert "lacks text_encoder, which is read from" in said


def test_a_controlnet_and_a_denoiser_alone(folders, tmp_path):
    controlnet = make_controlnet().controlnet
    controlnet.save_config(tmp_path / "config")
    save_file({k: v.contiguous() for k, v in original_controlnet(controlnet).items()}, tmp_path / "c.safetensors")
    result = cli.quantize(str(tmp_path / "c.safetensors"), tmp_path / "c", config=str(tmp_path / "config"))
    assert (result.components, result.calibration_state) == (["."], "observing")
    made = ControlNetModel.from_pretrained(tmp_path / "c")
    quantize_model(controlnet, MSFPConfig("w4a8"))
    assert same_codes(made, controlnet)

    pipe = make_small_pipe()
    file = write_original(pipe, tmp_path / "u.safetensors", vae=False)
    cli.quantize(str(file), tmp_path / "u", config=str(folders["SD"] / "unet"))
    quantize_model(pipe.unet, MSFPConfig("w4a8"))
    assert same_codes(UNet2DConditionModel.from_pretrained(tmp_path / "u"), pipe.unet)


def test_an_interrupted_file_goes_on(folders, tmp_path, monkeypatch, caplog):
    from diffusers_msfp.plugin.files.streaming import StreamedModel

    file = write_original(make_small_pipe(), tmp_path / "model.safetensors")
    command = ["quantize", file, "--config", folders["SD"], "--scheme", "w4a16", "--out", tmp_path / "out"]
    inner, calls = StreamedModel._write_module, []

    def stop_at_ten(*arguments):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "_write_module", stop_at_ten)
        done = program(*command)
    assert done.returncode == 130
    assert "keeps what is finished" in " ".join(done.stderr.split())
    done = program(*command)
    assert done.returncode == 0, done.stderr
    assert any("Going on after" in message for message in caplog.messages)


def test_one_tensor_of_the_file_is_in_memory_at_a_time(folders, tmp_path):
    from diffusers_msfp.cli.shared.parts import parts_of

    file = write_original(make_small_pipe(), tmp_path / "model.safetensors", averages=True)
    streams, others = parts_of(file, MSFPConfig("w4a16"), "5GB", None, str(folders["SD"]))
    assert (list(streams), others) == (["unet"], [])
    tensors = streams["unet"]._tensors
    assert all(isinstance(source, str) for source in tensors._places.values())
    assert not any(source.startswith("model_ema") for source in tensors._places.values())


def changed(file: Path, change) -> Path:
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)
    return file


BAD = {
    "not a checkpoint": (lambda file: file.write_bytes(b"\xff" * 100), "cannot be loaded as a single-file checkpoint"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be loaded as a single-file checkpoint"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:5000]), "cannot be loaded as a single-file"),
    "a layer is missing": (
        lambda file: changed(file, lambda s: {k: v for k, v in s.items() if "middle_block.0" not in k}),
        "must hold `mid_block.resnets.0",
    ),
    "another size": (
        lambda file: changed(file, lambda s: {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in s.items()}),
        "must have shape",
    ),
    "NaN": (lambda file: changed(file, lambda s: {k: v * torch.nan for k, v in s.items()}), "must be finite"),
    "no denoiser": (
        lambda file: changed(file, lambda s: {k: v for k, v in s.items() if k.startswith("first_stage")}),
        "must hold the weights of UNet2DConditionModel|must hold `",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_files_give_one_line(folders, tmp_path, kind):
    change, reason = BAD[kind]
    file = write_original(make_small_pipe(), tmp_path / "model.safetensors")
    change(file)
    out = tmp_path / "out"
    done = program("quantize", file, "--config", folders["SD"], "--scheme", "w4a16", "--out", out)
    said = " ".join(done.stderr.split())
    assert (done.returncode, done.stdout) == (2, ""), said
    assert any(each in said for each in reason.split("|")), said
    assert "Traceback" not in said
    assert not out.exists()


def test_configs_that_are_not_there_give_one_line(folders, tmp_path):
    pipe = make_small_pipe()
    file = write_original(pipe, tmp_path / "model.safetensors", vae=False)
    configs = tmp_path / "configs"
    configs.mkdir()
    for name in folders["SD"].rglob("*.json"):
        place = configs / name.relative_to(folders["SD"])
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(name.read_bytes())
    for where, reason in ((tmp_path / "none", "--config"), (tmp_path, "has neither"), (configs, "but it lacks `vae`")):
        done = program("quantize", file, "--config", where, "--scheme", "w4a16", "--out", tmp_path / "out")
        said = " ".join(done.stderr.split())
        assert (done.returncode, done.stdout) == (2, ""), said
        assert reason in said


# ── while diffusers loads it ─────────────────────────────────────────────────────────────────────────────────────


def test_a_model_is_quantized_while_it_is_loaded(folders, tmp_path):
    pipe = make_small_pipe()
    file = write_original(pipe, tmp_path / "model.safetensors", averages=True)
    unet = UNet2DConditionModel.from_single_file(
        str(file), config=str(folders["SD"]), subfolder="unet", quantization_config=MSFPConfig("w4a4")
    )
    assert calibration_state(unet) == "observing"
    quantize_model(pipe.unet, MSFPConfig("w4a4"))
    assert equal_state(unet, pipe.unet)
    whole = StableDiffusionPipeline.from_single_file(str(file), config=str(folders["SD"]), unet=unet)
    assert whole.unet is unet
    whole.save_pretrained(tmp_path / "saved")
    assert equal_state(DiffusionPipeline.from_pretrained(tmp_path / "saved").unet, unet)


def test_a_whole_pipeline_and_packed_weights_are_refused(folders, tmp_path):
    file = write_original(make_small_pipe(), tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="quantized model by model while it is loaded"):
        StableDiffusionPipeline.from_single_file(str(file), config=str(folders["SD"]), quantization_config=MSFPConfig())
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    changed(file, lambda state: state | {name: state[name].to(torch.uint8)})
    with pytest.raises(UnsupportedError, match="is torch.uint8: quantized already. Load the folder"):
        UNet2DConditionModel.from_single_file(
            str(file), config=str(folders["SD"]), subfolder="unet", quantization_config=MSFPConfig()
        )
    assert AutoencoderKL.from_single_file(str(file), config=str(folders["SD"]), subfolder="vae")
