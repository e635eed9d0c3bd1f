"""LoRA files that hold or say more than pairs of factors are refused where the rest would be left out."""

import copy
import json

import pytest
import torch
from conftest import equal_state, make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, FluxPipeline
from loras import write_lora
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from pipelines import make_flux, make_small_pipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    dequantize,
    export_adapter,
    finetune,
    fuse_lora,
    import_adapter,
    quantize_pipeline,
)
from diffusers_msfp.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # on biases of pairs
LAYER = "down_blocks.1.attentions.0.to_k"
MORE = {
    "a bias of the pair": {f"unet.{LAYER}.lora_B.bias": torch.ones(64)},
    "a DoRA's magnitudes": {f"unet.{LAYER}.lora_magnitude_vector": torch.ones(64)},
    "a bias": {f"unet.{LAYER}.bias": torch.ones(64)},
    "a whole layer": {"unet.conv_out.weight": torch.ones(3, 32, 3, 3), "unet.conv_out.bias": torch.ones(3)},
    "a norm": {"unet.conv_norm_out.weight": torch.ones(32)},
    "the same factor twice": {f"unet.{LAYER}.lora.down.weight": torch.ones(2, 64)},
}
SAID = {
    "init_lora_weights": "pissa_niter_4",
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "modules_to_save": ["conv_out"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
    "of_a_newer_version": 1,
    "peft_type": "LOHA",
}


@pytest.fixture
def file(tmp_path):
    return write_lora(make_unet(), ["to_k", "conv2"], tmp_path / "lora.safetensors")


def models(owner) -> list:
    parts = owner.components.values() if isinstance(owner, DiffusionPipeline) else [owner]
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def refused(owner, file, error, match) -> None:
    before = copy.deepcopy(owner)
    with pytest.raises(error, match=match):
        fuse_lora(owner, file)
    for left, right in zip(models(before), models(owner), strict=True):
        assert equal_state(left, right)
        assert [name for name, _ in left.named_modules()] == [name for name, _ in right.named_modules()]
        assert vars(left.config) == vars(right.config)


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("alone", [False, True], ids=["pipeline", "model"])
def test_tensors_beside_the_pairs(packed_pipe, file, more, alone):
    owner = packed_pipe.unet if alone else packed_pipe
    save_file(load_file(file) | MORE[more], file)
    refused(owner, file, ConfigError, "no more than pairs|must have each factor once")
    save_file({key: value for key, value in load_file(file).items() if key not in MORE[more]}, file)
    assert fuse_lora(owner, file).components


@pytest.mark.parametrize("key", SAID)
@pytest.mark.parametrize("where", ["adapter_config.json", "metadata"])
def test_configs_that_mean_more(packed_pipe, tmp_path, key, where):
    twin = make_unet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k"]), twin)
    state = {name: value + 1 for name, value in get_peft_model_state_dict(twin).items()}
    config = json.loads(json.dumps(LoraConfig(r=2).to_dict(), default=list))

    def written(said: dict):
        if where == "metadata":
            said = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in said.items()})}
            file = tmp_path / "pytorch_lora_weights.safetensors"
            save_file({f"unet.{name}": value for name, value in state.items()}, file, said)
            return file
        (tmp_path / where).write_text(json.dumps(said))
        save_file(
            {f"base_model.model.{name}": value for name, value in state.items()}, tmp_path / "adapter_model.safetensors"
        )
        return tmp_path / "adapter_model.safetensors"

    refused(packed_pipe, written(config | {key: SAID[key]}), ConfigError, f"`{key}`")
    assert fuse_lora(packed_pipe, written(config | {"init_lora_weights": "gaussian", "lora_dropout": 0.1})).components


def test_an_adapter_of_the_hub_is_replaced_by_pairs_alone(packed_pipe, tmp_path):
    teacher = DDPMPipeline(make_unet(), DDIMScheduler())
    finetune(packed_pipe, teacher, FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=2, rank=2))
    export_adapter(packed_pipe.unet, 0, tmp_path)
    config, before = tmp_path / "adapter_config.json", copy.deepcopy(packed_pipe.unet)
    said = json.loads(config.read_text())
    for key, value in SAID.items():
        config.write_text(json.dumps(said | {key: value}))
        with pytest.raises(ConfigError, match=f"`{key}`"):
            import_adapter(packed_pipe.unet, 1, tmp_path)
    assert equal_state(before, packed_pipe.unet)


# ── pipelines with a loader of their own ─────────────────────────────────────────────────────────────────────────────


def text_lora(folder, targets=("to_q", "to_out.0"), **more):
    """A LoRA of Stable Diffusion."""
    pipe = make_small_pipe()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=list(targets), **more), adapter_name="saved")
    torch.manual_seed(5)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    state = get_peft_model_state_dict(pipe.unet, adapter_name="saved")
    metadata = pipe.unet.peft_config["saved"].to_dict()
    type(pipe).save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def _text():
    return quantize_pipeline(make_small_pipe(), "w4a16")


@pytest.fixture
def text(_text):
    return copy.deepcopy(_text)


def test_one_half_of_one_pair(text, tmp_path):
    file = text_lora(tmp_path)
    state = load_file(file)
    gone = next(key for key in state if key.endswith("to_q.lora_B.weight"))
    save_file({key: value for key, value in state.items() if key != gone}, file)
    refused(text, file, ConfigError, "a pair of factors")


def test_magnitudes_that_diffusers_leaves_out(text, tmp_path):
    file = text_lora(tmp_path)
    save_file(load_file(file) | {"lora_unet_any.dora_scale": torch.ones(8)}, file)
    refused(text, file, ConfigError, "`lora_unet_any.dora_scale`")


@pytest.mark.parametrize("more", ["use_dora", "lora_bias"])
def test_what_pipelines_load_and_peft_merges_is_fused(text, tmp_path, more):
    file = text_lora(tmp_path, ["to_out.0"], **{more: True})
    expected = copy.deepcopy(text)
    dequantize(expected)
    expected.load_lora_weights(str(file))
    expected.fuse_lora()
    assert fuse_lora(text, file).components
    layer, wanted = (
        each.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0] for each in (text, expected)
    )
    wanted = wanted.get_base_layer()
    assert (layer.dequantize_weight() - wanted.weight).norm() < 0.2 * wanted.weight.norm()
    assert torch.allclose(layer.bias, wanted.bias)


def test_biases_of_pairs_for_layers_without_one(text, tmp_path):
    refused(text, text_lora(tmp_path, lora_bias=True), UnsupportedError, "has a bias for")


def test_a_pipeline_s_file_whose_config_means_more(text, tmp_path):
    file = text_lora(tmp_path, init_lora_weights="olora")
    with safe_open(file, framework="pt") as handle:
        said = json.loads(handle.metadata()["lora_adapter_metadata"]) | {"text_encoder.init_lora_weights": True}
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(said)})
    refused(text, file, ConfigError, "`init_lora_weights`")


@pytest.fixture(params=["float", "quantized", "quantized, input layer float"])
def flux(request) -> FluxPipeline:
    pipe = make_flux()
    if request.param != "float":
        left = ["x_embedder"] if request.param != "quantized" else None
        quantize_pipeline(pipe, MSFPConfig("w4a16", modules_to_not_convert=left))
    return pipe


def control_lora(file, more: dict):
    torch.manual_seed(0)
    name = "transformer.x_embedder"
    wide = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(16, 2)}
    save_file(wide | more, file)
    return file


def test_a_control_lora_that_widens_is_refused(flux, tmp_path):
    refused(flux, control_lora(tmp_path / "control.safetensors", {}), UnsupportedError, "`x_embedder`")
    assert flux.transformer.config.in_channels == 16
    assert flux.transformer.x_embedder.in_features == 16


def test_so_are_norms_of_such_a_file(flux, tmp_path):
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.full((8,), 3.0)}
    file = control_lora(tmp_path / "control.safetensors", norm)
    refused(flux, file, ConfigError, "`transformer.transformer_blocks.0.attn.norm_q.weight`")
