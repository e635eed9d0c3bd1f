"""The temporal information block is what depends on the timestep alone, whatever it is called."""

import pytest
import torch
from conftest import make_condition_unet, make_dit, make_unet
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from diffusers_msfp.methods.temporal import find_block, root_inputs


def calls(model, timesteps, **given):
    """Calls at these timesteps; a function in `given` draws a value for each call."""

    def call(timestep):
        arguments = {name: value() for name, value in given.items()}
        with torch.no_grad():
            model(timestep=timestep, **arguments)

    return [lambda timestep=timestep: call(torch.tensor([timestep, timestep])) for timestep in timesteps]


def block_of(model, fixed: dict, other: dict):
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return find_block(linears, calls(model, (900, 100), **fixed), calls(model, (900, 100), **other))


def sample(*shape):
    return lambda: torch.randn(2, *shape)


def label(value):
    return lambda: torch.tensor([value, value])


TIME_EMBEDDING = ("time_embedding.linear_1", "time_embedding.linear_2")


def projections(model) -> set[str]:
    return {name for name, _ in model.named_modules() if name.endswith("time_emb_proj")}


def test_a_unet_s_projections_follow_its_time_embedding():
    model = make_unet()
    block = block_of(model, {"sample": sample(3, 8, 8)}, {"sample": sample(3, 8, 8)})
    assert set(block.names) == {*TIME_EMBEDDING, *projections(model)}
    assert block.roots == TIME_EMBEDDING[:1]
    assert set(block.readers(TIME_EMBEDDING[1])) == projections(model)
    assert {layer.activation for layer in block.layers[1:]} == {"silu"}


def test_names_play_no_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_emb_proj, self.a, self.b, self.unused = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, sample, timestep):
            early = self.a(torch.stack([timestep, timestep**0.5, timestep.cos(), timestep.sin()], 1))
            return self.time_emb_proj(sample) + self.b(F.gelu(early))

    block = block_of(Model(), {"sample": sample(4)}, {"sample": sample(4)})
    assert [(layer.name, layer.source, layer.activation) for layer in block.layers] == [
        ("a", None, "identity"),
        ("b", "a", "gelu"),
    ]


def test_class_labels_leave_the_projections_out():
    model = make_unet(num_class_embeds=4)
    block = block_of(
        model,
        {"sample": sample(3, 8, 8), "class_labels": label(1)},
        {"sample": sample(3, 8, 8), "class_labels": label(0)},
    )
    assert block.names == TIME_EMBEDDING


def test_text_does_not_but_added_conditions_do():
    model = make_condition_unet()
    given = {"sample": sample(4, 8, 8), "encoder_hidden_states": sample(3, 16)}
    assert set(block_of(model, given, given).names) == {*TIME_EMBEDDING, *projections(model)}
    added = UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    ).eval()
    given["added_cond_kwargs"] = lambda: {"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 6)}
    assert block_of(added, given, given).names == TIME_EMBEDDING


def test_adaptive_norms_of_transformers():
    model = make_dit()
    given = {"hidden_states": sample(4, 8, 8)}
    block = block_of(model, given | {"class_labels": label(1)}, given | {"class_labels": label(0)})
    assert {name.rpartition(".")[2] for name in block.names} == {"linear_1", "linear_2"}
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    ).eval()
    given |= {"encoder_hidden_states": sample(3, 16)}
    block = block_of(pixart, given, given)
    places = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
    assert block.names == tuple(f"adaln_single.{place}" for place in places)
    assert block.readers(block.names[1]) == block.names[2:]


@pytest.mark.parametrize("timesteps", [(900, 900), (900, 100)])
def test_what_never_changes_is_not_of_the_timestep(timesteps):
    model = make_unet()
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    given = {"sample": sample(3, 8, 8)}
    block = find_block(linears, calls(model, timesteps, **given), calls(model, timesteps, **given))
    assert bool(block.layers) == (timesteps[0] != timesteps[1])


def test_a_block_computes_what_the_model_does_without_running_it(embedded):
    model = embedded.unet
    block = block_of(model, {"sample": sample(1, 32, 32)}, {"sample": sample(1, 32, 32)})
    assert len(block.names) == 13
    convolutions = []
    handle = model.conv_in.register_forward_hook(lambda *_: convolutions.append(1))
    inputs = root_inputs(
        {name: model.get_submodule(name) for name in block.roots}, calls(model, (0, 500), sample=sample(1, 32, 32))
    )
    handle.remove()
    assert not convolutions
    last, seen = block.names[-1], []
    handle = model.get_submodule(last).register_forward_hook(lambda _m, _a, y: seen.append(y[0]))
    for call in calls(model, (0, 500), sample=sample(1, 32, 32)):
        call()
    handle.remove()
    outputs = block.run(inputs, lambda layer, x: model.get_submodule(layer.name)(x))
    assert torch.allclose(outputs[last], torch.stack(seen), rtol=1e-4, atol=1e-5)
