"""Damaged, exchanged and foreign tensors: refused by name before anything is used, and what is right still loads."""

import copy
import json
import random
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import send_to_device
from conftest import equal_state, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextModel

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    MSFPPipelineMixin,
    SplitConfig,
    TemporalConfig,
    calibration_state,
    cli,
    finetune,
    freeze,
    maintain_temporal,
    quantize_pipeline,
    split_shortcuts,
)
from diffusers_msfp.checkpoint.describe import describe_checkpoint
from diffusers_msfp.errors import CheckpointError
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.plugin.quantize import quantize_model

FILE = "diffusion_pytorch_model.safetensors"
SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
TINY = {"num_inference_steps": 2, "num_samples": 2}


def small_pipe() -> DDPMPipeline:
    return DDPMPipeline(make_unet(**SMALL), DDIMScheduler())


@pytest.fixture(scope="module")
def _small() -> DDPMPipeline:
    return quantize_pipeline(small_pipe(), "w4a4", **TINY)


@pytest.fixture
def small(_small) -> DDPMPipeline:
    return copy.deepcopy(_small)


@pytest.fixture
def folder(_small, tmp_path) -> Path:
    _small.unet.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def swap(file: Path, *names: str) -> None:
    """Exchange two tensors' places in a file's header; not a byte of the numbers changes."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    left, right = (header[name] for name in names)
    assert left["shape"] == right["shape"]
    assert left["dtype"] == right["dtype"]
    header[names[0]], header[names[1]] = right, left
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (end - 8 - len(text))
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def flip(file: Path, name: str) -> None:
    """Change one bit of one tensor."""
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    data[end + json.loads(data[8:end])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


CONV1, CONV2 = (f"up_blocks.1.resnets.{i}.conv2" for i in (0, 1))


@pytest.mark.situation("two scales of equal shape exchanged in a file's header", "refused")
@pytest.mark.parametrize("kind", ["weight_scale", "input_scale", "weight", "bias"])
def test_exchanged_tensors(folder, kind):
    swap(folder / FILE, f"{CONV1}.{kind}", f"{CONV2}.{kind}")
    with pytest.raises(
        CheckpointError, match=rf"`up_blocks.1.resnets.\d.conv2.{kind}` must have the checksum \w+ that config"
    ):
        UNet2DModel.from_pretrained(folder)


@pytest.mark.situation("one bit of a file changed: codes, a scale, a norm, a format", "refused")
@pytest.mark.parametrize("name", ["conv_in.weight", "conv_in.weight_scale", "conv_norm_out.weight", "conv_in.formats"])
def test_damaged_bytes(folder, name):
    flip(folder / FILE, name)
    with pytest.raises(CheckpointError, match=f"`{name}` must have the checksum"):
        UNet2DModel.from_pretrained(folder)


@pytest.mark.situation("any bit of a weight file changed, header or data", "refused")
def test_any_bit(small, folder):
    original, rng = (folder / FILE).read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(original[:8], "little")
    for index in range(40):
        place = rng.randrange(*((0, start) if index % 2 else (start, len(original))))
        damaged = bytearray(original)
        damaged[place] ^= 1 << rng.randrange(8)
        (folder / FILE).write_bytes(damaged)
        try:
            model = UNet2DModel.from_pretrained(folder)
        except (CheckpointError, ValueError, OSError, SafetensorError):
            continue
        assert place < start, place
        assert equal_state(model, small.unet)  # a bit of the file's notes about itself


@pytest.mark.situation("shards of one checkpoint beside the config of another", "refused")
def test_shards_of_another_checkpoint(small, tmp_path):
    for name, scheme in (("a", "w4a16"), ("b", "w4a16")):
        unet = make_unet(**SMALL)
        with torch.no_grad():
            unet.conv_in.weight *= 1 if name == "a" else 1.5
        quantize_model(unet, MSFPConfig(scheme))
        unet.save_pretrained(tmp_path / name, max_shard_size="10KB")
    first = min((tmp_path / "a").glob("*.safetensors"))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    UNet2DModel.from_pretrained(tmp_path / "a")
    for shard in (tmp_path / "b").glob("*.safetensors"):
        shutil.copy(shard, tmp_path / "a" / shard.name)
    assert first.exists()
    with pytest.raises(CheckpointError, match=r"`conv_in.weight\w*` must have the checksum"):
        UNet2DModel.from_pretrained(tmp_path / "a")


@pytest.mark.situation("a file of another precision of the same model in the folder (variants)", "right")
def test_variants_share_a_folder(small, folder):
    half = UNet2DModel.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16")
    assert equal_state(UNet2DModel.from_pretrained(folder), small.unet)
    assert equal_state(UNet2DModel.from_pretrained(folder, variant="fp16", dtype=torch.float16), half)
    flip(folder / FILE.replace(".safe", ".fp16.safe"), "conv_norm_out.bias")
    UNet2DModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="`conv_norm_out.bias` must have the checksum"):
        UNet2DModel.from_pretrained(folder, variant="fp16")
    changed = copy.deepcopy(small.unet)
    with torch.no_grad():
        changed.conv_in.bias += 1
    changed.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="the digest in config.json knows"):  # of a model that is gone
        UNet2DModel.from_pretrained(folder, variant="fp16")
    assert equal_state(UNet2DModel.from_pretrained(folder), changed)


@pytest.mark.situation("a shard without a tensor that the index says it has", "refused")
def test_a_tensor_missing_in_a_shard(small, tmp_path):
    small.unet.save_pretrained(tmp_path, max_shard_size="10KB")
    name = "conv_norm_out.bias"
    file = next(file for file in tmp_path.glob("*.safetensors") if name in load_file(file))
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"must hold `{name}`"):
        UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.situation("weights saved in shards over whole ones, and whole ones over shards", "right")
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("first", ["10KB", "1GB"])
@pytest.mark.parametrize("kind", ["diffusers", "transformers"])
def test_saved_over_in_other_files(kind, first, variant, tmp_path):
    model = make_unet(**SMALL) if kind == "diffusers" else pipelines.make_clip()
    quantize_model(model, MSFPConfig("w4a16"))
    for size in (first, *({"10KB", "1GB"} - {first})):
        with torch.no_grad():
            next(parameter for name, parameter in model.named_parameters() if name.endswith("bias")).add_(1)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    assert equal_state(type(model).from_pretrained(tmp_path, variant=variant), model)
    assert describe_checkpoint(tmp_path, variant)


@pytest.mark.situation("a damaged text encoder, through transformers", "refused")
@pytest.mark.parametrize("shards", ["5KB", "1GB"])
def test_damaged_text_encoders(tmp_path, shards):
    model = pipelines.make_clip()
    quantize_model(model, MSFPConfig("w4a16"))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert equal_state(CLIPTextModel.from_pretrained(tmp_path), model)
    names = ["encoder.layers.0.self_attn.q_proj.weight_scale", "encoder.layers.0.layer_norm1.weight"]
    for name in names:
        file = next(file for file in tmp_path.glob("*.safetensors") if name in load_file(file))
        before = file.read_bytes()
        flip(file, name)
        with pytest.raises(CheckpointError, match=f"`{name}` must have the checksum"):
            CLIPTextModel.from_pretrained(tmp_path)
        file.write_bytes(before)
        tensors = load_file(file)
        save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"must hold `{name}`"):
            CLIPTextModel.from_pretrained(tmp_path)
        file.write_bytes(before)


@pytest.mark.situation("damaged adapters, router's table, features by timestep", "refused")
def test_damaged_adapters_and_features(small, tmp_path):
    settings = {"train_steps": 1, "num_inference_steps": 2, "batch_size": 2, "rank": 2}
    side = copy.deepcopy(small)
    finetune(side, small_pipe(), FinetuneConfig(placement="side", **settings))
    side.unet.save_pretrained(tmp_path / "side")
    adapted = MSFPPipelineMixin.attach(side)
    adapted.save_talora(tmp_path / "adapters")
    maintained = copy.deepcopy(small)
    maintain_temporal(maintained, small_pipe(), TemporalConfig(**TINY, iterations=1, cache_above=0.0))
    maintained.unet.save_pretrained(tmp_path / "temporal")
    names = [*load_file(tmp_path / "temporal" / FILE), *load_file(tmp_path / "side" / FILE)]
    chosen = {kind: next(name for name in names if name.endswith(kind)) for kind in (".features", ".timesteps", ".up")}
    for place, name in (
        ("temporal", chosen[".features"]),
        ("temporal", chosen[".timesteps"]),
        ("side", chosen[".up"]),
        ("side", "timestep_router.table"),
    ):
        file = tmp_path / place / FILE
        before = file.read_bytes()
        UNet2DModel.from_pretrained(tmp_path / place)
        flip(file, name)
        with pytest.raises(CheckpointError, match=f"`{name}` must have the checksum"):
            UNet2DModel.from_pretrained(tmp_path / place)
        file.write_bytes(before)
    for place in ("side", "adapters"):
        pipe = MSFPPipelineMixin.attach(copy.deepcopy(small))
        pipe.load_talora(tmp_path / place)
        pipe.unload_talora()
        flip(next((tmp_path / place).glob("*.safetensors")), chosen[".up"])
        with pytest.raises(CheckpointError, match=f"`{chosen['.up']}` must have the checksum"):
            pipe.load_talora(tmp_path / place)
        assert equal_state(pipe.unet, small.unet)


@pytest.mark.situation("a checkpoint written layer by layer by the command line, then damaged", "refused")
def test_streamed_checkpoints(tmp_path):
    small_pipe().unet.save_pretrained(tmp_path / "float")
    cli.quantize(str(tmp_path / "float"), tmp_path / "out", scheme="w4a16", max_shard_size="10KB")
    UNet2DModel.from_pretrained(tmp_path / "out")
    file = next(file for file in (tmp_path / "out").glob("*.safetensors") if "conv_in.weight" in load_file(file))
    flip(file, "conv_in.weight")
    with pytest.raises(CheckpointError, match="`conv_in.weight` must have the checksum"):
        UNet2DModel.from_pretrained(tmp_path / "out")


@pytest.mark.situation("damaged bytes, with the check turned off", "right")
def test_the_check_can_be_turned_off(folder, monkeypatch):
    flip(folder / FILE, "conv_in.weight")
    monkeypatch.setenv("MSFP_CHECK_DIGEST", "0")
    UNet2DModel.from_pretrained(folder)


@pytest.mark.situation("config.json of version 2 without its digest: a save that was killed", "refused")
def test_no_digest(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["digest"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of format version 2 must have `digest`, but it has none"):
        UNet2DModel.from_pretrained(folder)


# ── load_state_dict ──────────────────────────────────────────────────────────────────────────────────────────


def observed(scheme: str, scale: float = 1.0, **config) -> UNet2DModel:
    """A model that has seen inputs of this size, and observes on."""
    unet = make_unet(**SMALL)
    quantize_model(unet, MSFPConfig(scheme, **config))
    generator = torch.Generator().manual_seed(0)
    for timestep in (900, 100):
        run(unet, (scale * torch.randn(2, 3, 8, 8, generator=generator)).abs() - 0.1, timestep)
    return unet


def frozen(*args, **config) -> UNet2DModel:
    unet = observed(*args, **config)
    freeze(unet)
    return unet


def merged(pipe: DDPMPipeline, placement: str, reads: str | None = None) -> UNet2DModel:
    settings = {"train_steps": 1, "num_inference_steps": 2, "batch_size": 2, "rank": 2}
    finetune(pipe, small_pipe(), FinetuneConfig(placement=placement, reads=reads, **settings))
    return pipe.unet


def maintained(pipe: DDPMPipeline) -> UNet2DModel:
    maintain_temporal(pipe, small_pipe(), TemporalConfig(**TINY, iterations=1, cache_above=0.0))
    return pipe.unet


def split(pipe: DDPMPipeline) -> UNet2DModel:
    split_shortcuts(pipe, small_pipe(), SplitConfig(**TINY))
    return pipe.unet


OTHERS = {
    "other formats of inputs": (lambda _: frozen("w4a4", 40.0), "must have this model's formats"),
    "other formats of weights": (lambda _: frozen("w6a6"), "must have this model's formats"),
    "observing": (lambda _: observed("w4a4"), "must have this model's formats .*input observing"),
    "banks": (lambda pipe: merged(pipe, "merged"), ": other banks, sets or sizes"),
    "adapters": (lambda pipe: merged(pipe, "side"), "the state has `.*adapters.* and the model has not"),
    "sets and features by timestep": (maintained, "on one side alone|other banks, sets or sizes"),
    "split layers": (split, "not its state, or split differently"),
    "float": (lambda _: make_unet(**SMALL), "must say its formats"),
    "a part of the model": (
        lambda pipe: nn.ModuleDict({"conv_in": pipe.unet.conv_in}),
        "must hold all of the module's",
    ),
}


@pytest.mark.situation("`load_state_dict` of a model that was quantized, calibrated or changed otherwise", "refused")
@pytest.mark.parametrize("other", OTHERS)
def test_state_of_another_model(small, other):
    make, reason = OTHERS[other]
    state = {key: value.clone() for key, value in make(copy.deepcopy(small)).state_dict().items()}
    model = small.unet
    before = copy.deepcopy(model)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=reason):
            model.load_state_dict(state, strict=strict)
        assert equal_state(model, before)
    if other in ("banks", "adapters", "split layers", "sets and features by timestep"):
        changed = make(copy.deepcopy(small))
        kept = copy.deepcopy(changed)
        with pytest.raises(CheckpointError, match="Nothing was loaded"):
            changed.load_state_dict(model.state_dict())
        assert equal_state(changed, kept)


@pytest.mark.situation("`load_state_dict` of adapters that read codes into those that read floats", "refused")
def test_state_of_adapters_of_another_kind(small):
    made = {reads: merged(copy.deepcopy(small), "side", reads) for reads in ("codes", "float")}
    for reads, other in (("codes", "float"), ("float", "codes")):
        before, has = copy.deepcopy(made[reads]), "model" if reads == "codes" else "state"
        with pytest.raises(CheckpointError, match=rf"but the {has} has `.*adapters.codes` and the .* has not"):
            made[reads].load_state_dict(made[other].state_dict())
        assert equal_state(made[reads], before)
        with pytest.raises(RuntimeError, match=r"\.codes|\"codes\""):
            made[reads].conv_out.adapters.load_state_dict(made[other].conv_out.adapters.state_dict())


@pytest.mark.situation("`load_state_dict` with the tensors of a file of format version 1", "refused")
def test_state_from_a_file_of_version_1(small, tmp_path):
    small.unet.config.quantization_config.format_version = 1
    small.unet.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert not any(name.endswith(".formats") for name in tensors)
    with pytest.raises(CheckpointError, match="read from files of format version 1"):
        small.unet.load_state_dict(tensors)


@pytest.mark.situation("`load_state_dict` into a part of a model, of another calibration", "refused")
def test_parts_of_a_model(small):
    model, other = small.unet, frozen("w4a4", 40.0)
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="must have this model's formats"):
        model.mid_block.load_state_dict(other.mid_block.state_dict())
    wrapped = nn.ModuleDict({"unet": model})
    with pytest.raises(CheckpointError, match="must have this model's formats"):
        wrapped.load_state_dict(nn.ModuleDict({"unet": other}).state_dict())
    assert equal_state(model, before)


@pytest.mark.situation("`load_state_dict` of an equally quantized model, whose engine had made weights ready", "right")
@pytest.mark.parametrize("way", ["plain", "assign", "file", "torch.save", "part", "accelerate", "ddp", "copy"])
def test_state_of_an_equal_model(small, way, tmp_path, images):
    other, model = small.unet, copy.deepcopy(small.unet)
    with torch.no_grad():
        for _, layer in quant_layers(other):
            layer.weight_scale *= 1.25
            layer.bias += 0.1
            layer.changed()
    before, expected = run(model, images), run(other, images)
    assert not torch.equal(before, expected)
    if way == "file":
        other.save_pretrained(tmp_path)
        model.load_state_dict(load_file(tmp_path / FILE))
    elif way == "torch.save":
        torch.save(other.state_dict(), tmp_path / "state.pt")
        model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elif way == "part":
        for name, child in other.named_children():
            getattr(model, name).load_state_dict(child.state_dict())
    elif way == "ddp":
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            first, second = DistributedDataParallel(other), DistributedDataParallel(model)  # broadcasts its state
            second.load_state_dict(first.state_dict())
        finally:
            dist.destroy_process_group()
    elif way == "accelerate":
        first, second = Accelerator(cpu=True), Accelerator(cpu=True)
        first.prepare(other)
        first.save_state(str(tmp_path))
        second.prepare(model)
        second.load_state(str(tmp_path))
    else:
        state = copy.deepcopy(other).state_dict() if way == "copy" else other.state_dict()
        model.load_state_dict(send_to_device(state, "cpu"), assign=way == "assign")
    assert equal_state(model, other)
    assert torch.equal(run(model, images), expected)


@pytest.mark.situation("`load_state_dict` of a model that still observes its inputs", "right")
def test_state_of_an_observing_model(images, caplog):
    watched, fresh = observed("w4a4"), make_unet(**SMALL)
    quantize_model(fresh, MSFPConfig("w4a4"))
    fresh.load_state_dict(watched.state_dict())
    assert equal_state(fresh, watched)
    assert calibration_state(fresh) == "observing"
    freeze(fresh)
    freeze(watched)
    assert torch.equal(run(fresh, images), run(watched, images))
    assert "residual sums" not in caplog.text  # which of its layers read them came with the state


@pytest.mark.situation("adapters alone, or biases alone, loaded with `strict=False`", "right")
def test_partial_states_without_packed_tensors(small):
    model, before = small.unet, copy.deepcopy(small.unet)
    model.load_state_dict({"conv_in.bias": torch.ones(8), "conv_norm_out.bias": torch.ones(8)}, strict=False)
    assert torch.equal(model.conv_in.bias, torch.ones(8))
    assert torch.equal(model.state_dict()["conv_in.packed_weight"], before.state_dict()["conv_in.packed_weight"])


# ── convert-checkpoint ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def old_pipeline(tmp_path_factory) -> Path:
    """Stable Diffusion of version 1: packed denoiser in shards, text encoder, half-precision files beside."""
    path = tmp_path_factory.mktemp("old") / "pipe"
    pipe = pipelines.make_small_pipe()
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for model in parts.values():
        quantize_model(model, MSFPConfig("w4a16"))
        model.config.quantization_config.format_version = 1
    pipe.save_pretrained(path, max_shard_size="20KB")
    type(pipe.unet).from_pretrained(path / "unet", dtype=torch.float16).save_pretrained(path / "unet", variant="fp16")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.situation("a pipeline of format version 1, with shards and variants, converted in place", "right")
def test_converted_in_place(old_pipeline, tmp_path):
    folder = Path(shutil.copytree(old_pipeline, tmp_path / "pipe"))
    before = DiffusionPipeline.from_pretrained(folder)
    result = cli.convert_checkpoint(folder)
    told = {"format_version": 2, "converted": ["text_encoder", "unet"], "already": [], "out": str(folder)}
    assert result.to_dict() == told
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    after = DiffusionPipeline.from_pretrained(folder)
    half = type(after.unet).from_pretrained(folder / "unet", variant="fp16")
    for name in ("unet", "text_encoder", "vae"):
        assert equal_state(getattr(after, name), getattr(before, name))
    for model in (after.unet, after.text_encoder, half):
        assert model.config.quantization_config.format_version == 2
    assert "digest" in json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    new = contents(folder)
    assert cli.convert_checkpoint(folder).already == ["text_encoder", "unet"]
    assert contents(folder) == new
    flip(next(path for path in (folder / "unet").glob("*fp16.safetensors")), "conv_in.weight")
    with pytest.raises(CheckpointError, match="`conv_in.weight` must have the checksum"):
        type(after.unet).from_pretrained(folder / "unet", variant="fp16")


def break_scale(folder: Path) -> None:
    file = folder / "unet" / FILE.replace(".safe", ".fp16.safe")
    tensors = load_file(file)
    tensors["conv_in.weight_scale"].zero_()
    save_file(tensors, file, {"format": "pt"})


def change_record(folder: Path, **changes) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "unet" / "config.json").write_text(json.dumps(config))


REFUSALS = {
    "damaged": (break_scale, "All variants must have the same `conv_in.weight_scale`"),
    "newer": (lambda folder: change_record(folder, format_version=3), "up to format version 2, but got 3"),
    "no record": (lambda folder: change_record(folder, layers=None), "must have `layers`"),
    "links": (lambda folder: (folder / "link").symlink_to(folder / "model_index.json"), "but .*link is a link"),
    "not quantized": (
        lambda folder: [shutil.rmtree(folder / n) for n in ("unet", "text_encoder")],
        "no config.json in",
    ),
}


@pytest.mark.situation("a folder that cannot be converted: damaged, newer, in the Hub's cache", "refused")
@pytest.mark.parametrize("what", REFUSALS)
def test_not_converted(old_pipeline, tmp_path, what):
    folder = Path(shutil.copytree(old_pipeline, tmp_path / "pipe"))
    spoil, reason = REFUSALS[what]
    spoil(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=reason):
        cli.convert_checkpoint(folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
