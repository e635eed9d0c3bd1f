"""From file to file, layer by layer: the same tensors as in memory, in bounded memory, and again after a kill."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import equal_state, make_unet
from diffusers import DiffusionPipeline, ModelMixin, PriorTransformer, UNet2DModel
from filelock import FileLock
from safetensors.torch import load_file, save_file

from diffusers_msfp import MSFPConfig, cli, quantize_pipeline
from diffusers_msfp.errors import MSFPError, NonFiniteError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin.files.streaming import StreamedModel
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.schemes import SCHEMES, LayerScheme, QuantScheme

OVERRIDES = {"to_out": "w8a8", "to_q": "w4g16a4"}
CONFIG = MSFPConfig("w4a4", modules_to_not_convert=["conv_shortcut"], scheme_overrides=OVERRIDES)
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
FAST = {"num_samples": 2, "num_inference_steps": 2}


def make_prior(num_layers: int = 2, heads: int = 2) -> PriorTransformer:
    torch.manual_seed(0)
    return PriorTransformer(
        num_attention_heads=heads, attention_head_dim=8, num_layers=num_layers, embedding_dim=8, num_embeddings=2
    )


def small_unet() -> UNet2DModel:
    """With weights that half precision can hold."""
    return make_unet(block_out_channels=(16, 32), attention_head_dim=16).half().float()


@pytest.fixture
def prior(tmp_path) -> Path:
    make_prior().save_pretrained(tmp_path / "prior", max_shard_size="20KB")
    return tmp_path / "prior"


def in_memory(source: Path, config: MSFPConfig, out: Path, cls: type[ModelMixin] = UNet2DModel, **save) -> ModelMixin:
    model = cls.from_pretrained(source)
    quantize_model(model, config)
    model.save_pretrained(out, **save)
    return model


def stream(source: Path, out: Path, config: MSFPConfig = CONFIG, cls: type[ModelMixin] = UNet2DModel, **arguments):
    streamed = StreamedModel.from_folder(cls, source, config, **arguments)
    streamed.write(out)
    return streamed


@pytest.fixture
def searched(monkeypatch) -> list[str]:
    """Names of the layers whose weights are searched for."""
    seen, original = [], QuantLayer.from_float.__func__

    def from_float(cls, module, place, *arguments):
        seen.append(place)
        return original(cls, module, place, *arguments)

    monkeypatch.setattr(QuantLayer, "from_float", classmethod(from_float))
    return seen


# ── the same result ──────────────────────────────────────────────────────────────────────────────────────────────────


def old_names(state: dict) -> dict:
    """As checkpoints from before 2023 call the parts of an attention block."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        for part, old in new.items():
            name = name.replace(f".{part}.", f".{old}.")
        renamed[name] = tensor
    return renamed


STORED = {
    "single file": lambda folder, model: model.save_pretrained(folder),
    "shards": lambda folder, model: model.save_pretrained(folder, max_shard_size="60KB"),
    "half precision": lambda folder, model: model.half().save_pretrained(folder),
    "pickled": lambda folder, model: torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin"),
    "old names": lambda folder, model: save_file(old_names(model.state_dict()), folder / FILE, {"format": "pt"}),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("expected")
    small_unet().save_pretrained(path / "float")
    in_memory(path / "float", CONFIG, path / "packed", max_shard_size="30KB")
    return path / "packed"


@pytest.mark.parametrize("kind", STORED)
def test_files_are_those_of_a_model_quantized_in_memory(kind, expected, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    small_unet().save_config(source)
    STORED[kind](source, small_unet())
    streamed = stream(source, out, max_shard_size="30KB")
    names = sorted(p.name for p in expected.iterdir())
    assert sorted(p.name for p in out.iterdir()) == names
    assert len(names) > 4
    for name in names:
        if name.endswith(".json"):
            assert read(out / name) == read(expected / name)
        else:
            left, right = load_file(out / name), load_file(expected / name)
            assert left.keys() == right.keys()
            assert all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)
            assert (out / name).stat().st_size == (expected / name).stat().st_size
    made = streamed.load(out)
    assert made.config["_name_or_path"] == str(source)
    assert equal_state(made, UNet2DModel.from_pretrained(expected))


def read(file: Path) -> dict:
    return {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}


def test_pipeline(tiny_dir, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(tiny_dir)
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    result = cli.quantize(tiny_dir, tmp_path / "out", scheme="w4a4", correction=False, max_shard_size="60KB", **FAST)
    made = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert equal_state(made.unet, pipe.unet)
    assert made.unet.config.quantization_config.to_dict() == pipe.unet.config.quantization_config.to_dict()
    assert (tmp_path / "out" / "unet" / INDEX).is_file()
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["_name_or_path"] == f"{tiny_dir}/unet"
    assert result.calibration_state == "frozen"
    assert result.bytes_reference == (Path(tiny_dir) / "unet" / FILE).stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_hub_id(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **_: {"user/tiny": tiny_dir}[name])
    result = cli.quantize("user/tiny", tmp_path / "out", scheme="w4a16")
    assert result.bytes_reference == (Path(tiny_dir) / "unet" / FILE).stat().st_size
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_name_or_path"] == "user/tiny"


# ── memory, and going on ─────────────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys
from pathlib import Path
from diffusers import PriorTransformer
from diffusers_msfp import MSFPConfig
from diffusers_msfp.cli.shared.store import peak_rss_bytes
from diffusers_msfp.plugin.files.streaming import StreamedModel

def die(done, total):
    if done == total - 3:
        print(peak_rss_bytes() - before, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

before = peak_rss_bytes()
config = MSFPConfig("int-w4a4", ["ff"], {"*": "int-w4a4"})
StreamedModel.from_folder(PriorTransformer, Path(sys.argv[1]), config).write(Path(sys.argv[2]), on_progress=die)
"""


def test_memory_is_bounded_and_a_killed_run_goes_on(tmp_path, searched, caplog):
    source, out, config = tmp_path / "float", tmp_path / "out", MSFPConfig("int-w4a4", ["ff"], {"*": "int-w4a4"})
    make_prior(num_layers=16, heads=64).save_pretrained(source)
    killed = subprocess.run([sys.executable, "-c", KILLED, source, out], stdout=subprocess.PIPE, check=False)
    assert killed.returncode == -9
    size = (source / FILE).stat().st_size
    assert size > 2e8
    assert 0 < int(killed.stdout) < 0.7 * size
    assert not (out / "config.json").exists()

    stream(source, out, config, PriorTransformer)
    assert "Going on after 67 of 70 layers" in caplog.text
    assert len(searched) == 3
    made = PriorTransformer.from_pretrained(out)
    for place in (name for name, module in made.named_modules() if isinstance(module, QuantLayer)):
        assert made.get_submodule(place).packed_weight.any()
    shutil.rmtree(source)
    shutil.rmtree(out)


@pytest.fixture
def interrupted(prior, tmp_path) -> Path:
    """What is left of a run that ended after its fifth layer."""

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StreamedModel.from_folder(PriorTransformer, prior, MSFPConfig("w4a4"), "10KB").write(tmp_path / "out", stop)
    return tmp_path / "out"


def went_on(prior: Path, out: Path, scheme: str = "w4a4") -> bool:
    """Go on, and compare with a run in one piece."""
    stream(prior, out, MSFPConfig(scheme), PriorTransformer, max_shard_size="10KB")
    expected = in_memory(prior, MSFPConfig(scheme), out.parent / "expected", PriorTransformer)
    return equal_state(PriorTransformer.from_pretrained(out), expected)


def test_an_interrupted_run_goes_on(prior, interrupted, searched, caplog):
    assert went_on(prior, interrupted)
    assert len(searched) == (18 - 5) + 18
    assert "Going on after 5 of 18 layers" in caplog.text


def test_what_was_being_written_is_written_again(prior, interrupted, searched, caplog):
    """A torn line in the journal, and bytes on the disk that are not those of its checksum."""
    journal = interrupted.parent / "out.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:20])
    place = next(p for line in lines[2:] if (entry := json.loads(line))["format"] and (p := entry["place"]))
    for file in interrupted.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        header = json.loads(data[8 : 8 + (start := int.from_bytes(data[:8], "little"))])
        if f"{place}.weight" in header:
            data[8 + start + header[f"{place}.weight"]["data_offsets"][0]] ^= 1
            file.write_bytes(data)
    next(iter(interrupted.glob("*-00001-of-*"))).write_bytes(b"")
    assert went_on(prior, interrupted)
    assert place in searched
    assert "Going on after" in caplog.text


def test_a_finished_folder_is_only_checked(prior, interrupted, searched):
    assert went_on(prior, interrupted)
    searched.clear()
    stream(prior, interrupted, MSFPConfig("w4a4"), PriorTransformer, max_shard_size="10KB")
    assert searched == []


@pytest.mark.parametrize("change", ["arguments", "source files", "journal"])
def test_another_run_begins_anew(change, prior, interrupted, caplog):
    if change == "source files":
        make_prior(heads=2).to(torch.float64).float().save_pretrained(prior, max_shard_size="20KB")
    elif change == "journal":
        (interrupted.parent / "out.jsonl").write_bytes(b"\xff\n")
    assert went_on(prior, interrupted, "w4a8" if change == "arguments" else "w4a4")
    assert "Going on" not in caplog.text
    assert (f"was left by a run with other {change}: starting anew" in caplog.text) == (change != "journal")


def test_command_goes_on(prior, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "made" / "out", StreamedModel.write

    def stopped(self, folder, on_progress):
        def stop(done: int, total: int) -> None:
            if done == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

        write(self, folder, stop)

    monkeypatch.setattr(StreamedModel, "write", stopped)
    with pytest.raises(MSFPError, match="out cannot be written: no space is left on the disk"):
        cli.quantize(str(prior), out, scheme="w4a4")
    assert [p.name for p in out.parent.iterdir()] == [".out.part"]
    assert ".out.part keeps what is finished" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(StreamedModel, "write", write)

    with FileLock(out.parent / ".out.part" / "lock"), pytest.raises(MSFPError, match="another one is at it"):
        cli.quantize(str(prior), out, scheme="w4a4")
    (out.parent / ".out.part" / "old").mkdir()
    (out.parent / ".out.part" / "old" / "config.json").write_text("of a run that was killed while it replaced")
    shutil.copytree(prior, out)
    result = cli.quantize(str(prior), out, scheme="w4a4", overwrite=True)
    assert result.calibration_state == "observing"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    expected = in_memory(prior, MSFPConfig("w4a4"), tmp_path / "expected", PriorTransformer)
    assert equal_state(PriorTransformer.from_pretrained(out), expected)


# ── what cannot be quantized ─────────────────────────────────────────────────────────────────────────────────────────


def damage(prior: Path, kind: str) -> None:
    shards = sorted(prior.glob("*-of-*"))
    tensors = load_file(shards[0])
    name = next(name for name in tensors if name.endswith(".weight"))
    if kind == "cut":
        shards[0].write_bytes(shards[0].read_bytes()[:-10])
    elif kind == "missing":
        shards[0].unlink()
    elif kind == "index":
        (prior / INDEX).write_text("{}")
    elif kind == "none":
        for file in (*shards, prior / INDEX):
            file.unlink()
    elif kind == "incomplete":
        save_file({key: t for key, t in tensors.items() if key != name}, shards[0])
    elif kind == "foreign":
        save_file({**tensors, name: tensors[name][:-1]}, shards[0])
    elif kind == "NaN":
        save_file({**tensors, name: tensors[name] * torch.nan}, shards[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "-00001-of-.* must be a complete weight file, but it is not"),
        ("missing", "-00001-of-.* must be a complete weight file, but it is not"),
        ("index", "must be JSON with a `weight_map`"),
        ("none", "must hold weights"),
        ("incomplete", "of PriorTransformer must hold `.*weight`, but they do not"),
        ("foreign", "of PriorTransformer must have shape"),
        ("NaN", "must be finite, but got NaN"),
    ],
)
def test_bad_sources_leave_nothing(kind, message, prior, tmp_path):
    damage(prior, kind)
    (tmp_path / "made").mkdir()
    with pytest.raises(MSFPError, match=message) as caught:
        cli.quantize(str(prior), tmp_path / "made" / "out", scheme="w4a4")
    assert isinstance(caught.value, NonFiniteError) == (kind == "NaN")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_shard_size": "5 apples"}, "must be a size like '5GB', but got '5 apples'"),
        ({"components": ["prior"]}, "selects parts of a pipeline, but .* is a single model"),
        ({"modules_to_not_convert": ["zzz"]}, "matches none"),
    ],
)
def test_bad_arguments_leave_nothing(arguments, message, prior, tmp_path):
    with pytest.raises(MSFPError, match=message):
        cli.quantize(str(prior), tmp_path / "made" / "out", **arguments)
    assert not (tmp_path / "made").exists()


def test_formats_of_a_layer_must_be_equally_wide(prior, monkeypatch):
    mixed = LayerScheme(weight=("fp4_e2m1", "fp8_e4m3"))
    monkeypatch.setitem(SCHEMES._items, "mixed", QuantScheme(mixed, mixed, mixed))
    with pytest.raises(MSFPError, match="must be equally wide"):
        StreamedModel.from_folder(PriorTransformer, prior, MSFPConfig("mixed"))


def test_components_must_be_models_of_diffusers(tiny_dir, tmp_path):
    with pytest.raises(MSFPError, match="scheduler must be .* a diffusers model's"):
        cli.quantize(tiny_dir, tmp_path / "out", components=["scheduler"])
