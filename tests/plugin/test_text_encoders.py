"""The second door: text encoders through transformers, weights only, alone and in a pipeline."""

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from conftest import equal_state
from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from matrix import sample
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from diffusers_msfp import MSFPConfig, calibrate, calibration_state, cli, publish, quantize_pipeline
from diffusers_msfp.errors import CheckpointError, ConfigError, MSFPError, NonFiniteError, UnsupportedError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.layers.convert import Conversion, quant_layers
from diffusers_msfp.plugin import register
from diffusers_msfp.plugin.quantize import quantize_model

PARTS = ["unet", "text_encoder"]
CLIP_LINEARS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
RUN = {"num_samples": 1, "num_inference_steps": 2}
IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "float"
    pipelines.make_small_pipe().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed_dir(float_dir) -> Path:
    """A CLIP text encoder alone."""
    path = float_dir.parent / "packed"
    config = MSFPConfig("w4a16")
    CLIPTextModel.from_pretrained(float_dir / "text_encoder", quantization_config=config).save_pretrained(path)
    return path


def output(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs or {"input_ids": IDS})[0].float()


def error(model, reference, **inputs) -> float:
    expected = output(reference, **inputs)
    return ((output(model, **inputs) - expected).norm() / expected.norm()).item()


DOORS = {
    "MSFPConfig": MSFPConfig("w4a16", components_to_quantize=PARTS),
    "mapping": PipelineQuantizationConfig(quant_mapping=dict.fromkeys(PARTS, MSFPConfig("w4a16"))),
    "backend": PipelineQuantizationConfig(
        quant_backend="msfp", quant_kwargs={"scheme": "w4a16"}, components_to_quantize=PARTS
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_whole_pipeline_round_trips_bit_identical(door, float_dir, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(float_dir, quantization_config=DOORS[door])
    assert type(pipe.text_encoder) is CLIPTextModel
    assert {name.rpartition(".")[2] for name, _ in quant_layers(pipe.text_encoder)} == CLIP_LINEARS
    assert calibration_state(pipe) == "frozen"
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert equal_state(again.text_encoder, pipe.text_encoder)
    assert (sample(again) == sample(pipe)).all()
    record = json.loads((tmp_path / "text_encoder" / "config.json").read_text())["quantization_config"]
    assert record["quant_method"] == "msfp"
    assert record["scheme"] == "w4a16"
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder"] == ["transformers", "CLIPTextModel"]
    in_memory = quantize_pipeline(pipelines.make_small_pipe(), MSFPConfig("w4a16", components_to_quantize=PARTS))
    assert equal_state(in_memory.text_encoder, pipe.text_encoder)


def test_activations_stay_float_and_it_is_said(float_dir, caplog):
    config = MSFPConfig("w4a8", components_to_quantize=PARTS, scheme_overrides={"*conv1": "w8a8"})
    with pytest.raises(ConfigError, match="must match a layer, but '\\*conv1' matches none"):
        DiffusionPipeline.from_pretrained(float_dir, quantization_config=config)
    caplog.clear()
    pipe = DiffusionPipeline.from_pretrained(
        float_dir, quantization_config=MSFPConfig("w4a8", components_to_quantize=PARTS)
    )
    assert "Activations of text encoders stay float: `w4a8` counts as `w4a16`." in caplog.text
    assert calibration_state(pipe.unet) == "observing"
    assert calibration_state(pipe.text_encoder) == "frozen"
    calibrate(pipe, num_samples=1, num_inference_steps=2)
    assert all(layer.input_format is None for _, layer in quant_layers(pipe.text_encoder))
    assert any(layer.input_format is not None for _, layer in quant_layers(pipe.unet))
    model = CLIPTextModel.from_pretrained(
        float_dir / "text_encoder", quantization_config=MSFPConfig("w6a6", scheme_overrides={"fc1": "w8a8"})
    )
    assert {layer.weight_format.bits for name, layer in quant_layers(model) if name.endswith("fc1")} == {8}
    assert model.config.quantization_config.scheme == "w6a16"
    assert model.config.quantization_config.scheme_overrides == {"fc1": "w8a16"}


def test_alone_through_transformers(packed_dir, float_dir):
    model = AutoModel.from_pretrained(packed_dir)
    assert type(model) is CLIPTextModel
    reference = CLIPTextModel.from_pretrained(float_dir / "text_encoder")
    assert 0 < error(model, reference) < 0.2
    assert model.num_parameters() == reference.num_parameters()
    assert model.get_memory_footprint() < reference.get_memory_footprint()
    half = AutoModel.from_pretrained(packed_dir, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for (_, layer), (_, exact) in zip(quant_layers(half), quant_layers(model), strict=True):
        assert torch.equal(layer.weight_scale, exact.weight_scale)
        assert layer.weight_scale.dtype == torch.float32
    assert error(half, model) < 0.05
    with pytest.raises(MSFPError, match="was loaded as torch.float32, but got torch.float16"):
        model.to(torch.float16)


def test_t5(tmp_path):
    reference = pipelines.make_t5()
    reference.save_pretrained(tmp_path / "float", max_shard_size="5KB")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        config = MSFPConfig("w8a16")
        model = T5EncoderModel.from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
        assert error(model, reference) < 0.03
    names = {name.rpartition(".")[2] for name, _ in quant_layers(model)}
    assert names == {"q", "k", "v", "o", "wi_0", "wi_1"}  # the model keeps `wo` in float32
    model.save_pretrained(tmp_path / "packed", max_shard_size="5KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    again = T5EncoderModel.from_pretrained(tmp_path / "packed", dtype=torch.float16)
    assert equal_state(again, model)
    assert torch.equal(output(again), output(model))


def test_a_layer_whose_weight_is_asked_for_its_dtype():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    reference = CLIPVisionModel(config).eval()
    model = CLIPVisionModel(config).eval()
    model.load_state_dict(reference.state_dict())
    quantize_model(model, MSFPConfig("w8a16"))
    (patches,) = (layer for name, layer in quant_layers(model) if name.endswith("patch_embedding"))
    assert patches.weight.dtype == torch.float32
    assert error(model, reference, pixel_values=pipelines.picture()) < 0.05


def test_shared_weights_stay_float():
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    plan = Conversion.plan(T5ForConditionalGeneration(T5Config(**sizes)), "w8a16")
    assert plan.skipped["lm_head"] == "shares its weight with another layer"


def test_dequantize_then_save_then_reload(packed_dir, tmp_path):
    model = AutoModel.from_pretrained(packed_dir)
    expected = output(model)
    model.dequantize()
    assert not any(isinstance(module, QuantLayer) for module in model.modules())
    assert torch.allclose(output(model), expected, atol=1e-5)
    model.to(torch.float16).float()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert equal_state(AutoModel.from_pretrained(tmp_path, dtype=torch.float32), model)


DAMAGES = {
    "scale missing": ({"fc1.weight_scale": None}, "must hold `encoder.layers.0.mlp.fc1.weight_scale`"),
    "weight missing": ({"fc1.weight": None}, "must hold `encoder.layers.0.mlp.fc1.weight`"),
    "bias missing": ({"fc1.bias": None}, "must hold `encoder.layers.0.mlp.fc1.bias`"),
    "scale not finite": ({"fc1.weight_scale": torch.full((32,), torch.nan)}, "must be finite and > 0"),
    "float weight": ({"fc1.weight": torch.zeros(32, 1, 8)}, "must be torch.uint8, but got torch.float32"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(damage, packed_dir, tmp_path):
    changes, reason = DAMAGES[damage]
    shutil.copytree(packed_dir, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file) | {f"encoder.layers.0.mlp.{name}": value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=reason):
        AutoModel.from_pretrained(tmp_path / "damaged")


def test_impossible_records_and_weights_are_refused(packed_dir, float_dir, tmp_path):
    shutil.copytree(packed_dir, tmp_path / "edited")
    file = tmp_path / "edited" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["layers"] = None
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="must have `layers`"):
        AutoModel.from_pretrained(tmp_path / "edited")
    model = CLIPTextModel.from_pretrained(float_dir / "text_encoder")
    model.encoder.layers[0].mlp.fc1.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(NonFiniteError, match="weight of layer `encoder.layers.0.mlp.fc1` must be finite"):
        CLIPTextModel.from_pretrained(tmp_path / "nan", quantization_config=MSFPConfig("w4a16"))
    with pytest.raises(
        ConfigError, match="models of diffusers and transformers only, but `tokenizer` is CLIPTokenizer"
    ):
        quantize_pipeline(pipelines.make_small_pipe(), MSFPConfig(components_to_quantize=["tokenizer"]))


@pytest.mark.parametrize("asked", [{"safe_serialization": False}, {"distributed_checkpoint": True}])
def test_other_files_than_safetensors_are_refused(asked, packed_dir, tmp_path):
    model = AutoModel.from_pretrained(packed_dir)
    with pytest.raises(UnsupportedError, match="Packed weights are stored as safetensors"):
        model.save_pretrained(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_registration_is_idempotent_and_never_over_a_foreign_entry(monkeypatch):
    from transformers.quantizers import auto

    register()
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "msfp", dict)
    with pytest.raises(ConfigError, match="'msfp' must be free in transformers, but builtins.dict has it"):
        register()


def test_files_of_the_hub_that_name_tensors_otherwise(float_dir, tmp_path):
    """Those of CLIP put `text_model.` before each name, which is taken off when they are loaded."""
    old = shutil.copytree(float_dir, tmp_path / "old")
    file = next((old / "text_encoder").glob("*.safetensors"))
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for made in ("streamed", "saved"):
        if made == "streamed":
            cli.quantize(str(old), tmp_path / made, scheme="w4a16", components=["text_encoder"])
        else:
            config = MSFPConfig("w4a16", components_to_quantize=["text_encoder"])
            DiffusionPipeline.from_pretrained(old, quantization_config=config).save_pretrained(tmp_path / made)
        described = cli.inspect(str(tmp_path / made))
        assert len(described.components["text_encoder"].layers) == len(CLIP_LINEARS)
        published = publish(tmp_path / made, "user/repo", license="mit", base_model="none", dry_run=True, **RUN)
        assert any("text_encoder" in name for name in published.files)
    one, other = (DiffusionPipeline.from_pretrained(tmp_path / made).text_encoder for made in ("streamed", "saved"))
    assert equal_state(one, other)


def test_on_the_command_line(float_dir, tmp_path):
    out = tmp_path / "out"
    result = cli.quantize(str(float_dir), out, scheme="w4a8", components=PARTS, num_samples=1, num_inference_steps=2)
    assert result.components == PARTS
    assert 0 < result.bytes_quantized < result.bytes_reference
    pipe = DiffusionPipeline.from_pretrained(out)
    assert pipe.text_encoder.config.quantization_config.scheme == "w4a16"
    assert result.layers == sum(1 for name in PARTS for _ in quant_layers(getattr(pipe, name)))
    described = cli.inspect(str(out))
    assert set(described.components) == set(PARTS)
    assert len(described.components["text_encoder"].layers) == len(CLIP_LINEARS)
    alone = cli.quantize(str(float_dir), tmp_path / "alone", scheme="w4a16", components=["text_encoder"])
    assert alone.components == ["text_encoder"]
    with pytest.raises(MSFPError, match="already quantized"):
        cli.quantize(str(tmp_path / "alone"), tmp_path / "twice", scheme="w4a16")


def test_an_engine_of_the_environment_that_runs_no_layer(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MSFP_ENGINE", "int8")
    model = pipelines.make_clip()
    quantize_model(model, MSFPConfig("w4a16"))
    expected = output(model)
    assert "MSFP_ENGINE: Engine 'int8' must be able to run a layer" in caplog.text
    model.save_pretrained(tmp_path)
    assert torch.equal(output(CLIPTextModel.from_pretrained(tmp_path)), expected)
