"""LoRA files in pipelines: they add what they add to the dequantized pipeline, are swapped, unloaded bit-exactly."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import kinds
import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_msfp import MSFPConfig, quantize_pipeline
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.layers import QuantLayer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPT = {"prompt": "a red fox"}
SMALL = {"height": 8, "width": 8, "max_sequence_length": 8}
EMBEDDED = {name: torch.full((1, 4, 32), 0.1) for name in ("prompt_embeds", "negative_prompt_embeds")}
VIDEO = {"height": 16, "width": 16, "num_frames": 1, "guidance_scale": 1.0, **EMBEDDED}


class Case(NamedTuple):
    """A pipeline, the layers of its denoiser that a file adapts, and the arguments of a call."""

    make: Callable[[], DiffusionPipeline]
    part: str
    targets: list[str]
    texts: tuple[str, ...]
    arguments: dict


CASES = {
    "Stable Diffusion": Case(
        pipelines.make_small_pipe, "unet", [*ATTENTION, "conv1", "proj_in"], ("text_encoder",), PROMPT
    ),
    "Stable Diffusion XL": Case(
        pipelines.make_sdxl, "unet", [*ATTENTION, "conv2"], ("text_encoder", "text_encoder_2"), PROMPT
    ),
    "Stable Diffusion 3": Case(
        pipelines.make_sd3,
        "transformer",
        [*ATTENTION, "add_q_proj"],
        ("text_encoder", "text_encoder_2"),
        PROMPT | SMALL,
    ),
    "Flux": Case(
        pipelines.make_flux,
        "transformer",
        [*ATTENTION, "x_embedder", "proj_out", "proj_mlp"],
        ("text_encoder",),
        PROMPT | SMALL,
    ),
    "Wan": Case(pipelines.make_small_wan, "transformer", [*ATTENTION, "ffn.net.2"], (), VIDEO),
}


def make(case: Case) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    """Quantized, with float activations, and dequantized."""
    pipe = case.make()
    quantize_pipeline(pipe, MSFPConfig("w4a16", components_to_quantize=[case.part, *case.texts]))
    twin = copy.deepcopy(pipe)
    for name in (case.part, *case.texts):
        getattr(twin, name).dequantize()
    return pipe, twin


def sample(pipe, case: Case) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = case.arguments | {"num_inference_steps": 1, "generator": generator, "output_type": "latent"}
    return pipe(**arguments)[0] if case.part == "unet" else pipe(**arguments).__dict__.popitem()[1]


def lora_file(case: Case, rank: int, texts: bool = True) -> dict[str, torch.Tensor]:
    """A file for the denoiser and, if wanted, the text encoders; scaled by `rank`, so that no two are equal."""
    model = getattr(case.make(), case.part)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=case.targets))
    kinds.randomise(model)
    file = {f"{case.part}.{key}": 4 * value for key, value in get_peft_model_state_dict(model).items()}
    for name in case.texts if texts else ():
        layer = f"{name}.text_model.encoder.layers.0.self_attn.q_proj"
        file |= {f"{layer}.lora_A.weight": torch.ones(rank, 16) / 8, f"{layer}.lora_B.weight": torch.ones(16, rank) / 8}
    return file


def states(pipe, case: Case) -> list[dict]:
    return [kinds.fingerprint(getattr(pipe, name)) for name in (case.part, *case.texts)]


def unchanged(pipe, case: Case, before: list[dict]) -> bool:
    return all(kinds.same(now, then, trained=False) for now, then in zip(states(pipe, case), before, strict=True))


def test_what_diffusers_would_swap_half_is_refused():
    case = CASES["Stable Diffusion"]
    pipe, _ = make(case)
    pipe.load_lora_weights(lora_file(case, 2), adapter_name="a")
    before = states(pipe, case)
    with pytest.raises(UnsupportedError, match="`hotswap` is possible for denoisers alone.* `text_encoder` too"):
        pipe.load_lora_weights(lora_file(case, 4), adapter_name="a", hotswap=True)
    assert unchanged(pipe, case, before)


@pytest.mark.parametrize("name", CASES)
def test_loads_acts_swaps_and_unloads(name):
    case = CASES[name]
    pipe, twin = make(case)
    before, plain = states(pipe, case), sample(pipe, case)
    first, second = lora_file(case, 2), lora_file(case, 4, texts=False)
    outputs = []
    for each in (pipe, twin):
        getattr(each, case.part).enable_lora_hotswap(target_rank=4)
        each.load_lora_weights(copy.deepcopy(first), adapter_name="a")
        outputs.append(sample(each, case))
    if case.texts:
        assert any("lora_A" in key for key, _ in getattr(pipe, case.texts[-1]).named_modules())
    assert (outputs[0] - outputs[1]).norm() < 1e-4 * (outputs[1] - plain).norm() + 1e-6 * plain.norm()
    assert (outputs[0] - plain).norm() > 1e-3 * plain.norm()
    for each in (pipe, twin):
        each.load_lora_weights(copy.deepcopy(second), adapter_name="a", hotswap=True)
        outputs.append(sample(each, case))
    assert (outputs[2] - outputs[3]).norm() < 1e-4 * (outputs[3] - plain).norm() + 1e-6 * plain.norm()
    assert not torch.allclose(outputs[2], outputs[0])
    pipe.unload_lora_weights()
    assert unchanged(pipe, case, before)
    assert torch.equal(sample(pipe, case), plain)


def kohya_file() -> dict[str, torch.Tensor]:
    """Names with underscores, a 3 × 3 convolution, and an alpha for each layer."""
    torch.manual_seed(0)
    shapes = {
        "lora_unet_down_blocks_0_resnets_0_conv1": ((2, 8, 3, 3), (8, 2, 1, 1)),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ((2, 8), (8, 2)),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": ((2, 16), (16, 2)),
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj": ((2, 16), (16, 2)),
    }
    file = {}
    for name, (down, up) in shapes.items():
        file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"] = torch.randn(down), torch.randn(up)
        file[f"{name}.alpha"] = torch.tensor(1.0)
    return file


def test_names_of_kohya_with_convolutions_and_alpha():
    case = CASES["Stable Diffusion"]
    pipe, twin = make(case)
    before, plain = states(pipe, case), sample(pipe, case)
    for each in (pipe, twin):
        each.load_lora_weights(kohya_file(), adapter_name="a")
    layer = pipe.unet.down_blocks[0].resnets[0].conv1
    assert isinstance(layer.get_base_layer(), QuantLayer)
    assert layer.scaling["a"] == 0.5
    expected = sample(twin, case)
    assert (sample(pipe, case) - expected).norm() < 1e-4 * (expected - plain).norm()
    pipe.unload_lora_weights()
    assert unchanged(pipe, case, before)
    assert torch.equal(sample(pipe, case), plain)


def control_file() -> dict[str, torch.Tensor]:
    """As FLUX.1's control LoRAs: the input layer reads the picture's channels and as many of the control's."""
    torch.manual_seed(0)
    name = "transformer.x_embedder"
    return {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(16, 2)}


@pytest.mark.parametrize("adapted", [False, True])
def test_control_lora_is_refused_and_the_input_layer_is_what_it_was(adapted):
    case = CASES["Flux"]
    pipe, _ = make(case)
    if adapted:
        pipe.load_lora_weights(lora_file(case, 2), adapter_name="style")
    before, plain = states(pipe, case), sample(pipe, case)
    with pytest.raises(UnsupportedError, match="reads more channels than `x_embedder` .* `modules_to_not_convert="):
        pipe.load_lora_weights(control_file(), adapter_name="control")
    assert unchanged(pipe, case, before)
    assert pipe.transformer.config.in_channels == 16
    assert torch.equal(sample(pipe, case), plain)


def test_control_lora_works_where_the_input_layer_is_float():
    case = CASES["Flux"]
    pipe = quantize_pipeline(case.make(), MSFPConfig("w4a16", modules_to_not_convert=["x_embedder"]))
    pipe.load_lora_weights(control_file(), adapter_name="control")
    assert pipe.transformer.config.in_channels == 32
    assert pipe.transformer.x_embedder.get_base_layer().in_features == 32
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    assert pipe.transformer.x_embedder.in_features == 16


def test_state_dict_answers_to_the_float_weights_names(tmp_path):
    net = kinds.make_net()
    state = net.state_dict()
    assert state["linear.weight"].shape == (16, 16)
    assert state["split_conv.weight"].shape == (16, 32, 1, 1)
    assert "linear.weight" not in state
    assert "linear.packed_weight" in state
    with pytest.raises(KeyError):
        state["linear.weights"]
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for other in (loaded, copy.deepcopy(state), copy.copy(state), state.copy()):
        assert type(other) is OrderedDict
        assert list(other) == list(state)
        assert all(torch.equal(other[key], state[key]) for key in state)
    net.load_state_dict(loaded)


@pytest.mark.parametrize("name", ["Stable Diffusion", "Flux"])
def test_file_that_does_not_fit_changes_nothing(name):
    case = CASES[name]
    pipe, _ = make(case)
    pipe.load_lora_weights(lora_file(case, 2), adapter_name="good")
    before, plain = states(pipe, case), sample(pipe, case)
    file = lora_file(case, 2, texts=False)
    broken = {key: value[:, :-1].clone() if "to_v.lora_B" in key else value for key, value in file.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipe.load_lora_weights(broken, adapter_name="bad")
    assert unchanged(pipe, case, before)
    assert torch.equal(sample(pipe, case), plain)


def test_failed_swap_leaves_the_adapter_that_was_there():
    case = CASES["Stable Diffusion"]
    pipe, _ = make(case)
    pipe.load_lora_weights(lora_file(case, 2, texts=False), adapter_name="a")
    before, plain = states(pipe, case), sample(pipe, case)
    file = lora_file(case, 2, texts=False)
    broken = {key: value for key, value in file.items() if "conv1" not in key}
    broken = {key.replace("proj_in", "proj_out"): 2 * value for key, value in broken.items()}
    with pytest.raises(RuntimeError, match="Hot swapping"):
        pipe.load_lora_weights(broken, adapter_name="a", hotswap=True)
    assert unchanged(pipe, case, before)
    assert torch.equal(sample(pipe, case), plain)
