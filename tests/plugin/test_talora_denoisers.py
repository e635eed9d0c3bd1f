"""The verbs on adapters find a pipeline's denoisers: all of them, and no other component."""

import copy
import json

import pipelines
import pytest
import torch
from conftest import equal_state
from diffusers import DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects

from diffusers_msfp import FinetuneConfig, MSFPConfig, MSFPPipelineMixin, StateError, finetune, quantize_pipeline
from diffusers_msfp.errors import CheckpointError, ConfigError, UnsupportedError
from diffusers_msfp.layers.convert import base_fingerprint, layers_by_name
from diffusers_msfp.methods.talora import AdapterBank, AdapterPlan, adapter_rank
from diffusers_msfp.methods.talora.attach import connect, plan_of
from diffusers_msfp.plugin.adapters import talora_files


def adapt(model, placement: str = "side") -> None:
    """Put adapters that do something on a quantized model, as if they had been trained."""
    ranks: dict[str, list[str]] = {}
    for number, (name, layer) in enumerate(layers_by_name(model).items()):
        rank = adapter_rank(layer.logical_shape, 2)
        ranks.setdefault(str(rank), []).append(name)
        if placement == "side":
            layer.adapters = AdapterBank(layer.logical_shape, 2, rank, dtype=torch.float16, device="cpu")
            layer.adapters.initialise(torch.Generator().manual_seed(number))
            torch.nn.init.normal_(layer.adapters.up, std=0.1)
    plan = AdapterPlan(placement, 2, 1000, ranks, base=base_fingerprint(model) if placement == "side" else None)
    table = torch.zeros(1, 1000, dtype=torch.uint8)
    table[:, 500:] = 1
    connect(model, plan, table)


@pytest.fixture(scope="module")
def made() -> dict[str, DiffusionPipeline]:
    """Two quantized denoisers; a quantized text encoder and VAE before the denoiser."""
    parts = MSFPConfig("w4a16", components_to_quantize=["unet", "text_encoder", "vae"])
    pipes = {
        "two": quantize_pipeline(pipelines.make_wan(), "w4a16"),
        "text": quantize_pipeline(pipelines.make_small_pipe(), parts),
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture
def two(made):
    return MSFPPipelineMixin.attach(copy.deepcopy(made["two"]))


@pytest.fixture
def text(made):
    return MSFPPipelineMixin.attach(copy.deepcopy(made["text"]))


def sampled(pipe) -> torch.Tensor:
    """Of all denoisers, since Wan's share the timesteps."""
    if hasattr(pipe, "transformer_2"):
        call = pipelines.small_wan() | {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 1.0}
        return pipe(generator=torch.Generator().manual_seed(0), **call).frames
    call = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    return pipe(generator=torch.Generator().manual_seed(0), **call).images


def test_all_are_disabled_scaled_and_unloaded(two):
    base = sampled(two)
    states = {name: copy.deepcopy(getattr(two, name)) for name in ("transformer", "transformer_2")}
    for name in states:
        adapt(getattr(two, name))
    adapted = sampled(two)
    assert set(two.talora_summary()) == set(states)
    two.disable_talora()
    assert torch.equal(sampled(two), base)
    assert not any(summary["enabled"] for summary in two.talora_summary().values())
    two.enable_talora()
    assert torch.equal(sampled(two), adapted)
    two.set_talora_scale(0)
    assert torch.equal(sampled(two), base)
    two.set_talora_scale(1)
    two.unload_talora()
    assert torch.equal(sampled(two), base)
    assert all(equal_state(getattr(two, name), state) for name, state in states.items())
    with pytest.raises(StateError, match="it has none: load them with `load_talora`"):
        two.disable_talora()


def test_nothing_is_changed_where_one_is_merged(two, tmp_path):
    adapt(two.transformer)
    adapt(two.transformer_2, "merged")
    for verb in (two.disable_talora, two.unload_talora, lambda: two.save_talora(tmp_path / "no")):
        with pytest.raises(UnsupportedError, match="not possible for merged adapters"):
            verb()
    assert plan_of(two.transformer) is not None
    assert two.transformer.timestep_router.enabled
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("adapted", [("transformer", "transformer_2"), ("transformer_2",)])
def test_each_travels_in_a_folder_of_its_name(two, made, tmp_path, adapted):
    for name in adapted:
        adapt(getattr(two, name))
    expected = sampled(two)
    two.save_talora(tmp_path / "adapters")
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == list(adapted)
    two.save_pretrained(tmp_path / "whole")
    for source in ("adapters", "whole"):
        other = MSFPPipelineMixin.attach(copy.deepcopy(made["two"]))
        other.load_talora(tmp_path / source)
        assert torch.equal(sampled(other), expected)
        assert set(other.talora_summary()) == set(adapted)


def test_all_are_loaded_or_none(two, made, tmp_path):
    for name in ("transformer", "transformer_2"):
        adapt(getattr(two, name))
    two.save_talora(tmp_path)
    (tmp_path / "transformer_2" / "talora.safetensors").write_bytes(b"junk")
    other = MSFPPipelineMixin.attach(copy.deepcopy(made["two"]))
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        other.load_talora(tmp_path)
    assert plan_of(other.transformer) is None
    (tmp_path / "transformer" / "talora_config.json").rename(tmp_path / "talora_config.json")
    (tmp_path / "transformer_2" / "talora_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"folders of their names \(transformer, transformer_2\)"):
        other.load_talora(tmp_path)
    other = MSFPPipelineMixin.attach(copy.deepcopy(made["two"]))
    swapped = copy.copy(two)
    swapped.transformer, swapped.transformer_2 = two.transformer_2, two.transformer
    swapped.save_talora(tmp_path / "swapped")
    with pytest.raises(ConfigError, match="fit only the quantized model that they were trained for"):
        other.load_talora(tmp_path / "swapped")


def test_they_go_onto_the_denoiser_not_onto_what_is_quantized_beside_it(text, made, tmp_path):
    base = sampled(text)
    adapt(text.unet)
    expected = sampled(text)
    text.save_talora(tmp_path / "adapters")
    text.save_pretrained(tmp_path / "whole")
    text.unload_talora()
    assert torch.equal(sampled(text), base)
    for source in ("adapters", "whole"):
        text.load_talora(tmp_path / source)
        assert torch.equal(sampled(text), expected)
        assert text.talora_summary()["num_adapters"] == 2
        text.unload_talora()
    only = MSFPPipelineMixin.attach(pipelines.make_small_pipe())
    only.text_encoder = text.text_encoder
    with pytest.raises(StateError, match="A pipeline with a quantized denoiser is needed"):
        only.load_talora(tmp_path / "adapters")


@pytest.mark.parametrize("kind", ["pipeline", "model", "adapters", "adapters of several"])
def test_every_kind_of_repository_is_fetched_as_far_as_it_is_needed(two, text, made, tmp_path, monkeypatch, kind):
    several = kind == "adapters of several"
    pipe = two if several else text
    for name in ("transformer", "transformer_2") if several else ("unet",):
        adapt(getattr(pipe, name))
    expected, repository = sampled(pipe), tmp_path / "repository"
    if kind == "pipeline":
        pipe.save_pretrained(repository)
    elif kind == "model":
        pipe.unet.save_pretrained(repository, max_shard_size="20KB")
    else:
        pipe.save_talora(repository)
    (repository / "training.bin").write_bytes(b"large")

    def download(repo: str, allow_patterns: list[str], **_) -> str:
        files = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            target = tmp_path / "cache" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((repository / name).read_bytes())
        return str(tmp_path / "cache")

    monkeypatch.setattr(talora_files, "snapshot_download", download)
    other = MSFPPipelineMixin.attach(copy.deepcopy(made["two" if several else "text"]))
    other.load_talora("user/model")
    assert torch.equal(sampled(other), expected)
    assert not (tmp_path / "cache" / "training.bin").exists()
    json.dumps(other.talora_summary())


def test_one_adapter_where_the_denoiser_is_told_shares_of_the_timesteps(tmp_path):
    teacher = pipelines.make_flux()
    teacher.set_progress_bar_config(disable=True)
    run = {"prompts": ["a hat"], "height": 16, "width": 16}
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a8", num_samples=1, num_inference_steps=4, **run)
    settings = {"train_steps": 1, "num_inference_steps": 4, "batch_size": 1, "placement": "merged"}
    with pytest.raises(ConfigError, match="cannot tell apart.*or `num_adapters=1`, which needs no table"):
        finetune(pipe, teacher, FinetuneConfig(num_adapters=2, rank=2, **settings), **run)
    finetune(pipe, teacher, FinetuneConfig(num_adapters=1, **settings), **run)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {"prompt": "a hat", "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "latent"}
    before, after = (each(generator=torch.Generator().manual_seed(0), **call).images for each in (pipe, loaded))
    assert torch.equal(before, after)
