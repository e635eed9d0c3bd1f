"""PEFT older than what transformers or diffusers demands of it."""

import copy

import pipelines
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_msfp import MSFPConfig
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.plugin.adapters.versions import MINIMA, require_peft
from diffusers_msfp.plugin.quantize import quantize_model

TARGETS = {"unet": ["to_q", "conv1"], "text_encoder": ["q_proj", "fc1"]}


@pytest.fixture(scope="module")
def quantized() -> StableDiffusionPipeline:
    """The text encoder stays float."""
    pipe = pipelines.make_small_pipe()
    quantize_model(pipe.unet, MSFPConfig("w4a16"))
    return pipe


@pytest.fixture
def pipe(quantized) -> StableDiffusionPipeline:
    return copy.deepcopy(quantized)


@pytest.fixture
def clash(monkeypatch):
    """Transformers that demands a PEFT which is not out yet."""
    monkeypatch.setattr(f"{MINIMA['transformers']}.MIN_PEFT_VERSION", "99.0")


def lora(parts: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file for these parts."""
    teacher, state = pipelines.make_small_pipe(), {}
    for part in parts:
        model = getattr(teacher, part)
        unet = part == "unet"
        if unet:
            model.add_adapter(LoraConfig(r=2, target_modules=TARGETS[part]))
            own = get_peft_model_state_dict(model, adapter_name="default")
        else:  # without transformers, which may refuse here
            own = {
                f"text_model.encoder.layers.0.self_attn.q_proj.lora_{which}.weight": torch.zeros(shape)
                for which, shape in (("A", (2, 16)), ("B", (16, 2)))
            }
        state |= {f"{part}.{name}": tensor for name, tensor in own.items()}
    return state


def adapted(model) -> bool:
    return any("lora_" in name for name, _ in model.named_modules())


@pytest.mark.situation("a LoRA file also for text encoders, where transformers demands a newer PEFT", "refused")
def test_lora_file_with_text_encoders(pipe, clash):
    message = r"transformers \S+ need PEFT 99.0 or newer, but PEFT \S+ is installed: `pip install 'peft>=99.0'`, or "
    with pytest.raises(UnsupportedError, match=message):
        pipe.load_lora_weights(lora(["unet", "text_encoder"]))
    assert not adapted(pipe.unet)
    assert not adapted(pipe.text_encoder)


@pytest.mark.situation("a LoRA file for the denoiser alone, where transformers demands a newer PEFT", "right")
def test_lora_file_for_the_denoiser(pipe, clash):
    pipe.load_lora_weights(lora(["unet"]))
    assert adapted(pipe.unet)


@pytest.mark.situation("an adapter on a quantized text encoder, where transformers demands a newer PEFT", "refused")
@pytest.mark.parametrize("method", ["add_adapter", "load_adapter"])
def test_adapter_on_a_text_encoder(method, clash):
    encoder = pipelines.make_clip()
    quantize_model(encoder, MSFPConfig("w4a16"))
    argument = {"add_adapter": LoraConfig(r=2, target_modules=["q_proj"]), "load_adapter": "somewhere"}[method]
    with pytest.raises(UnsupportedError, match=r"need PEFT 99.0 or newer, .* `pip install 'transformers\S+'`\."):
        getattr(encoder, method)(argument)
    assert not adapted(encoder)


@pytest.mark.situation("an adapter where diffusers demands a newer PEFT, or none is installed", "refused")
def test_adapter_on_a_denoiser(pipe, monkeypatch):
    monkeypatch.setattr(f"{MINIMA['diffusers']}.MIN_PEFT_VERSION", "99.0")
    config = LoraConfig(r=2, target_modules=["to_q"])
    with pytest.raises(UnsupportedError, match=r"diffusers \S+ need PEFT 99.0 or newer, but PEFT"):
        pipe.unet.add_adapter(config)
    monkeypatch.setattr("diffusers_msfp.plugin.adapters.versions._installed", {}.get)
    with pytest.raises(UnsupportedError, match="need PEFT 99.0 or newer, but no PEFT is installed"):
        pipe.unet.add_adapter(config)
    assert not adapted(pipe.unet)


def test_a_library_that_says_no_minimum(monkeypatch):
    monkeypatch.delattr(f"{MINIMA['diffusers']}.MIN_PEFT_VERSION")
    require_peft("diffusers")
