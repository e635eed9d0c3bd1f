"""Users' LoRA on quantized linears and convolutions: the promise that no rival keeps."""

import copy

import pytest
import torch
from conftest import equal_state, make_condition_unet, make_unet, run
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from diffusers_msfp import MSFPConfig, freeze
from diffusers_msfp.errors import StateError, UnsupportedError
from diffusers_msfp.layers import QuantConv2d, QuantLinear
from diffusers_msfp.plugin.quantize import quantize_model

TARGETS = ["to_q", "to_v", "conv1", "conv2", "conv_shortcut", "conv_in", "time_emb_proj", "proj_in"]
INPUTS = {
    "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": 3,
    "encoder_hidden_states": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)),
}


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).sample


@pytest.fixture(scope="module", params=["w4a4", "w8a8-wide"])
def frozen(request) -> UNet2DConditionModel:
    model = make_condition_unet()
    quantize_model(model, MSFPConfig(scheme=request.param))
    output(model)
    freeze(model)
    return model


@pytest.fixture
def model(frozen) -> UNet2DConditionModel:
    return copy.deepcopy(frozen)


def randomised(model, adapter: str) -> None:
    """Give the zero-initialised half of an adapter values, so that it does something."""
    torch.manual_seed(len(adapter))
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}." in name:
            torch.nn.init.normal_(parameter, std=0.1)


def lora_files(tmp_path, name: str, rank: int = 4) -> str:
    """A LoRA trained on the float model, in diffusers' file format."""
    teacher = make_condition_unet()
    teacher.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=name)
    randomised(teacher, name)
    state = get_peft_model_state_dict(teacher, adapter_name=name)
    StableDiffusionPipeline.save_lora_weights(tmp_path / name, unet_lora_layers=state)
    return str(tmp_path / name)


def test_adapters_sit_on_quantized_linears_and_convolutions(model):
    before = output(model)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), adapter_name="style")
    wrapped = {type(m.get_base_layer()) for m in model.modules() if hasattr(m, "get_base_layer")}
    assert wrapped == {QuantLinear, QuantConv2d}
    assert torch.equal(output(model), before)  # B is zero
    randomised(model, "style")
    assert not torch.allclose(output(model), before)
    model.disable_adapters()
    assert torch.equal(output(model), before)
    model.enable_adapters()
    model.delete_adapters("style")
    assert torch.equal(output(model), before)


def test_adapter_adds_what_it_adds_to_the_float_layer(model):
    layer = model.mid_block.resnets[0].conv1
    x = torch.randn(1, layer.in_channels, 4, 4)
    base = layer(x).detach()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["mid_block.resnets.0.conv1"]), adapter_name="a")
    randomised(model, "a")
    wrapped = model.mid_block.resnets[0].conv1
    a, b = wrapped.lora_A["a"].weight, wrapped.lora_B["a"].weight
    delta = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, a, padding=1), b) * 2
    assert torch.allclose(wrapped(x), base + delta, atol=1e-5)


def test_load_several_weigh_them_swap_and_unload(model, tmp_path):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = output(model)
    one, two = lora_files(tmp_path, "one"), lora_files(tmp_path, "second", rank=8)
    model.load_lora_adapter(one, prefix="unet", adapter_name="one", weight_name="pytorch_lora_weights.safetensors")
    model.load_lora_adapter(two, prefix="unet", adapter_name="two", weight_name="pytorch_lora_weights.safetensors")
    model.set_adapters(["one", "two"], [1.0, 0.0])
    only_one = output(model)
    model.set_adapters(["one"])
    assert torch.allclose(output(model), only_one, atol=1e-5)
    model.set_adapters(["one", "two"], [0.7, 0.6])
    assert not torch.allclose(output(model), only_one)
    model.unload_lora()
    assert torch.equal(output(model), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], state[k]) for k in state)


def test_hotswap(model, tmp_path):
    one, two = lora_files(tmp_path, "one"), lora_files(tmp_path, "other")
    file = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(two, prefix="unet", adapter_name="direct", weight_name=file)
    expected = output(model)
    model.unload_lora()
    model.load_lora_adapter(one, prefix="unet", adapter_name="default_0", weight_name=file)
    assert not torch.allclose(output(model), expected)
    model.load_lora_adapter(two, prefix="unet", adapter_name="default_0", weight_name=file, hotswap=True)
    assert torch.allclose(output(model), expected, atol=1e-6)


def test_training_through_the_base_moves_the_adapter_only(model):
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), adapter_name="a")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == sum("lora_" in name for name, _ in model.named_parameters())
    target = torch.randn_like(output(model))
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(15):
        loss = (model(**INPUTS).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


def test_saving_with_adapters_attached_saves_the_model_alone(model, tmp_path):
    model.save_pretrained(tmp_path / "without")
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), adapter_name="a")
    randomised(model, "a")
    model.save_pretrained(tmp_path / "with")
    without, with_ = (UNet2DConditionModel.from_pretrained(tmp_path / name) for name in ("without", "with"))
    assert equal_state(without, with_)
    assert without.config.quantization_config.to_dict() == with_.config.quantization_config.to_dict()


def test_save_lora_adapter_round_trip(model, tmp_path):
    model.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS), adapter_name="a")
    randomised(model, "a")
    expected = output(model)
    model.save_lora_adapter(tmp_path, adapter_name="a")
    model.delete_adapters("a")
    model.load_lora_adapter(
        str(tmp_path), prefix=None, adapter_name="again", weight_name="pytorch_lora_weights.safetensors"
    )
    assert torch.allclose(output(model), expected, atol=1e-6)


def test_fusing_is_refused_with_the_way_out_and_changes_nothing(model):
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), adapter_name="a")
    randomised(model, "a")
    before = output(model)
    with pytest.raises(UnsupportedError, match="`fuse_lora` is not possible .* `diffusers-msfp fuse DIR --lora FILE`"):
        model.fuse_lora()
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_by_force_fails_instead_of_corrupting_codes(model, safe):
    model.add_adapter(LoraConfig(r=4, target_modules=[*TARGETS, "to_out.0"]), adapter_name="a")
    randomised(model, "a")
    before = output(model)
    wrapped = [m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "get_base_layer")]
    assert len(wrapped) > 10
    for module in wrapped:
        with pytest.raises(UnsupportedError, match="is packed and cannot be written"):
            module.merge(safe_merge=safe)
    assert torch.equal(output(model), before)


def test_the_way_out_of_fusing_works(model):
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), adapter_name="a")
    randomised(model, "a")
    model.dequantize()
    expected = output(model)
    model.fuse_lora()
    model.unload_lora()
    assert torch.allclose(output(model), expected, atol=1e-4)
    quantize_model(model, MSFPConfig(scheme="w4a16"))
    assert torch.isfinite(output(model)).all()


def test_quantizing_under_adapters_is_refused():
    model = make_condition_unet()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1"]))
    with pytest.raises(StateError, match="before adapters are attached"):
        quantize_model(model, MSFPConfig())


def test_unconditional_models_take_adapters_through_peft(images):
    unet = make_unet()
    quantize_model(unet, MSFPConfig(scheme="w4a16"))
    before = run(unet, images)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["conv1", "to_q"]), unet, adapter_name="a")
    randomised(unet, "a")
    assert not torch.equal(run(unet, images), before)
