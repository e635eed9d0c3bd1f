"""What the command line is given to read and to write: weights of a variant alone, and places that take no result."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusers_msfp import cli
from diffusers_msfp.cli import app
from diffusers_msfp.errors import ConfigError, MSFPError
from diffusers_msfp.hub import publish
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.outputs import write_whole, writing

WEIGHTS = "diffusion_pytorch_model"


def renamed(source: str, folder: Path, *variants: str) -> Path:
    """A pipeline with the weights of variants alone."""
    shutil.copytree(source, folder)
    plain = folder / "unet" / f"{WEIGHTS}.safetensors"
    for variant in variants:
        shutil.copyfile(plain, folder / "unet" / f"{WEIGHTS}.{variant}.safetensors")
    plain.unlink()
    return folder


@pytest.fixture
def half(tiny_dir, tmp_path) -> Path:
    """As many are published: float16 alone, in files of that name."""
    folder = renamed(tiny_dir, tmp_path / "half", "fp16")
    file = folder / "unet" / f"{WEIGHTS}.fp16.safetensors"
    save_file({name: t.half() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def both(half, packed_dir, tmp_path, unchecked) -> Path:
    """A packed pipeline with plain weights and those of a variant, which are others."""
    folder = tmp_path / "both"
    shutil.copytree(packed_dir, folder)
    file = folder / "unet" / f"{WEIGHTS}.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, folder / "unet" / f"{WEIGHTS}.other.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """The program, as a user calls it: exit code, standard output and error."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffusers-msfp", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            app.main()
        return done.value.code or 0, *map(" ".join, (part.split() for part in capsys.readouterr()))

    return call


SHORT = {"num_samples": 1, "num_inference_steps": 1}


@pytest.mark.situation("a folder with weights of a variant (`fp16`) alone: they are read, with a note", "right")
def test_the_only_variant_is_read(half, tmp_path, capsys):
    result = cli.quantize(str(half), tmp_path / "out", **SHORT)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("no plain weights but those of the variant `fp16`, which are read (`--variant fp16`)") == 1
    assert result.bytes_reference == (half / "unet" / f"{WEIGHTS}.fp16.safetensors").stat().st_size
    assert (tmp_path / "out" / "unet" / f"{WEIGHTS}.safetensors").is_file()
    figures = cli.compare(str(half), str(tmp_path / "out"), num_samples=1, num_inference_steps=1)
    assert 0 < figures.eps_rel_l2 < 1
    assert figures.bytes_reference == result.bytes_reference


@pytest.mark.situation("`--variant` where a folder has plain weights too", "right")
def test_a_variant_that_is_named(both, packed_dir, tmp_path, run):
    plain, other = (cli.inspect(both, variant=variant).components["unet"] for variant in (None, "other"))
    assert plain.layers == other.layers
    assert other.bytes_quantized == (both / "unet" / f"{WEIGHTS}.other.safetensors").stat().st_size
    assert cli.compare(packed_dir, str(both), num_samples=1, num_inference_steps=1).eps_rel_l2 == 0
    code, out, _ = run(
        "compare", packed_dir, both, "--num-samples", 1, "--num-inference-steps", 1, "--variant", "other", "--json"
    )
    assert code == 0
    assert json.loads(out)["eps_rel_l2"] > 0  # and the pipeline without that variant was read plain
    cli.sample(str(both), tmp_path / "grid.png", num_samples=1, num_inference_steps=1, variant="other")
    assert cli.bench(str(both), ["msfp"], variant="other", repeats=2).rows


@pytest.mark.situation("`--variant` that no folder has, or none where there are two and no plain weights", "refused")
def test_variants_that_cannot_be_meant(half, tiny_dir, packed_dir, tmp_path, run):
    code, _, said = run("quantize", tiny_dir, "--out", tmp_path / "out", "--variant", "fp16")
    assert code == 2
    assert "must hold weights of the variant `fp16`, but there are plain ones. Leave `--variant` out" in said
    with pytest.raises(MSFPError, match="must hold weights of the variant `bf16`, but there are `fp16`, plain ones"):
        cli.compare(str(half), packed_dir, variant="bf16")
    two = renamed(tiny_dir, tmp_path / "two", "fp16", "bf16")
    for verb in (
        lambda: cli.quantize(str(two), tmp_path / "out"),
        lambda: cli.sample(str(two), tmp_path / "a.png"),
        lambda: cli.bench(str(two)),
    ):
        with pytest.raises(MSFPError, match="must hold plain weights, but there are `bf16`, `fp16` alone. Name"):
            verb()
    assert not (tmp_path / "out").exists()


def test_every_verb_that_reads_models_takes_a_variant(run):
    verbs = ("quantize", "finetune", "sample", "compare", "evaluate", "bench", "inspect", "report", "publish")
    for verb in [*((each,) for each in verbs), ("space", "run"), ("space", "create")]:
        code, out, _ = run(*verb, "--help")
        assert code == 0
        assert "--variant" in out, verb


@pytest.mark.parametrize("index", [f"{WEIGHTS}.safetensors.index.fp16.json"])
def test_a_variant_in_shards(index, tiny_dir, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(tiny_dir)
    pipe.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="300KB")
    assert (tmp_path / "shards" / "unet" / index).is_file()
    result = cli.quantize(str(tmp_path / "shards"), tmp_path / "out", variant="fp16", **SHORT)
    assert result.bytes_reference > 600_000


@pytest.mark.situation("a packed checkpoint in several variants is published, the card naming one", "right")
def test_publishing_a_variant(both, tmp_path):
    known = {"license": "mit", "base_model": "org/base", "num_samples": 1, "num_inference_steps": 1}
    result = publish(both, "user/tiny", dry_run=tmp_path / "dry", variant="other", **known)
    assert 'variant="other"' in result.snippet
    assert f"unet/{WEIGHTS}.safetensors" in result.files
    with pytest.raises(MSFPError, match="variant `fp16`, but it has `other`, plain ones"):
        publish(both, "user/tiny", dry_run=tmp_path / "dry", variant="fp16", **known)


@pytest.mark.situation("`--prompt` or `--guidance-scale` for a pipeline that takes none", "refused")
@pytest.mark.parametrize(
    ("option", "what"), [({"prompts": ["a hat"]}, "prompts"), ({"guidance_scale": 3.0}, "guidance")]
)
def test_arguments_that_a_pipeline_does_not_take(option, what, tiny_dir, packed_dir, tmp_path):
    for verb in (
        lambda: cli.quantize(tiny_dir, tmp_path / "out", **option),
        lambda: cli.compare(tiny_dir, packed_dir, **option),
        lambda: cli.sample(tiny_dir, tmp_path / "a.png", **option),
    ):
        with pytest.raises(ConfigError, match=f"needs a pipeline that takes {what}, but DDPMPipeline takes none"):
            verb()
    assert not list(tmp_path.iterdir())


@pytest.mark.situation("`evaluate` where the features that fit the pictures have no weights here", "right")
def test_features_that_are_not_there(tiny_dir, packed_dir, tmp_path):
    result = cli.evaluate(packed_dir, reference=tiny_dir, num_samples=2, num_inference_steps=1, out=tmp_path / "out")
    assert "psnr_db" in result.figures["candidate_to_reference"]
    assert "need the package torch-fidelity" in result.omitted["candidate_to_reference.frechet_distance"]


@pytest.mark.situation("fine-tuning on the command line, stopped by Ctrl-C: the same command goes on", "right")
def test_fine_tuning_is_stopped(tiny_dir, packed_dir, tmp_path, run, monkeypatch):
    command = ("finetune", packed_dir, "--teacher", tiny_dir, "--out", tmp_path / "out", "--train-steps", 3)
    command += ("--num-inference-steps", 2, "--batch-size", 2, "--preview-every", 0, "--no-compare")
    update = Finetuner.update
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "update", lambda self: (signal.raise_signal(signal.SIGINT), update(self)))
        code, _, said = run(*command)
    assert code == 130
    assert "checkpoint-1 is kept, and the same command goes on from there: diffusers-msfp finetune" in said
    code, _, said = run(*command)
    assert code == 0
    assert "going on after update 1" in said


# ── where nothing can be written ─────────────────────────────────────────────────────────────────────────────────

VERBS = {
    "quantize": lambda out: cli.quantize("nothing/here", out),
    "finetune": lambda out: cli.finetune("nothing/here", "nothing/there", out),
    "sample": lambda out: cli.sample("nothing/here", out.with_suffix(".png")),
    "report": lambda out: cli.report("nothing/here", out.with_suffix(".html")),
    "evaluate": lambda out: cli.evaluate("nothing/here", reference="nothing/there", out=out),
    "demo": lambda out: cli.demo(out),
    "publish": lambda out: publish("nothing/here", "user/name", dry_run=out),
    "space create": lambda out: cli.space_create("nothing/here", out),
}


@pytest.mark.situation("output under a path of which a part is a file", "refused")
@pytest.mark.parametrize("verb", VERBS)
def test_a_file_in_the_path(verb, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out\S* cannot be written: .*file is a file, not a folder"):
        VERBS[verb](tmp_path / "file" / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


REASONS = {
    errno.EACCES: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left on the disk",
}


@pytest.mark.situation("output on a full or read-only disk, or where permission is missing", "refused")
@pytest.mark.parametrize("code", REASONS)
@pytest.mark.parametrize("verb", VERBS)
def test_places_that_take_nothing(verb, code, tmp_path, monkeypatch):
    def refuse(*args, dir=None, **kwargs):
        raise OSError(code, os.strerror(code), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=rf"out\S* cannot be written: {REASONS[code]} \(.*\)\.$"):
        VERBS[verb](tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.situation("output that is a file where a folder is to be written, or the other way round", "refused")
def test_files_and_folders_in_the_way(tmp_path, run, tiny_dir):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "out-training").write_text("precious")
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.html").mkdir()
    for verb in ("evaluate", "demo"):
        with pytest.raises(ConfigError, match="file must be a folder to write to, but it is a file"):
            VERBS[verb](tmp_path / "file")
    with pytest.raises(ConfigError, match="out-training must be a folder to write to, but it is a file"):
        VERBS["finetune"](tmp_path / "out")
    for verb in ("sample", "report"):
        with pytest.raises(ConfigError, match=r"a\.(png|html) must be a file to write, but it is a folder"):
            VERBS[verb](tmp_path / "a")
    (tmp_path / ".out.part").write_text("precious")
    code, _, said = run("quantize", tiny_dir, "--out", tmp_path / "out")
    assert (code, "Errno" in said) == (2, False)
    assert "out cannot be written: a file is in the way (" in said


@pytest.mark.situation("the disk fills up while weights are written", "refused")
def test_a_disk_that_fills_up(tiny_dir, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diffusers_msfp.checkpoint.tensor_files.TensorLayout.write", full)
    with pytest.raises(ConfigError, match=r"out cannot be written: no space is left on the disk\.$"):
        cli.quantize(tiny_dir, tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_written_over_keeps_its_link_and_its_permissions(tmp_path):
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    kept.write_text("before")
    kept.chmod(0o600)
    link.symlink_to(kept)
    write_whole(link, "after")
    assert link.is_symlink()
    assert kept.read_text() == "after"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.json", "link.json"]


def test_what_safetensors_says_of_a_full_disk(tmp_path):
    with pytest.raises(ConfigError, match=r"x cannot be written: no space is left on the disk\.$"), writing(Path("x")):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError), writing(Path("x")):
        _ = 1 / 0
