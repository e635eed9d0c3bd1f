"""The trainer of the real models: all of them for two updates; killed, stopped, resumed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from processes import wait_until
from safetensors.torch import load_file
from transformers import CLIPTokenizer

TRAINING = Path(__file__).parent / "benchmarks" / "training"
sys.path.insert(0, str(TRAINING))

import captions  # noqa: E402
import loop  # noqa: E402
import model_card  # noqa: E402
import train  # noqa: E402

TIMEOUT = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twenty coarse pictures for training and sixteen for tests, as JPEG CIFAR-10 is stored."""
    files = []
    for colours in np.random.default_rng(0).integers(0, 256, (36, 4, 4, 3), dtype=np.uint8):
        Image.fromarray(colours).resize((32, 32)).save(file := io.BytesIO(), format="JPEG")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(
        path,
        data=np.concatenate(files),
        offsets=np.cumsum([0, *map(len, files)]),
        label=np.arange(36) % 10,
        is_train=np.arange(36) < 20,
    )
    return path


@contextmanager
def own_state() -> Iterator[None]:
    """The trainer takes accelerate's state for itself, and gives signals back."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture
def _own_state():
    with own_state():
        yield


def train_two(name: str, data: Path, folder: Path, **arguments) -> Path:
    """Two updates of a hundred, and what they export."""
    export = folder / "export"
    train.main(name, data, out=folder / "runs" / name, updates=100, batch_size=2, stop_at=2, export=export, **arguments)
    assert {"checkpoint-0000002", "loss.png", "progress.json"} <= {p.name for p in (folder / "runs" / name).iterdir()}
    return export


@pytest.fixture(scope="module")
def autoencoder(data, tmp_path_factory) -> Path:
    """Not to be changed."""
    with own_state():
        return train_two("cifar10-autoencoder", data, tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def transformer(data, tmp_path_factory, autoencoder) -> Path:
    """A folder with the export of a transformer's run, and with its runs; not to be changed."""
    folder = tmp_path_factory.mktemp("transformer")
    with own_state():
        train_two("cifar10-latent-dit", data, folder, autoencoder=autoencoder)
    return folder


def test_autoencoder(autoencoder):
    vae = AutoencoderKL.from_pretrained(autoencoder)
    figures = json.loads((autoencoder / "reconstruction.json").read_text())
    assert figures["pictures"] == 16
    assert 0 < figures["psnr_db"] < 30
    latents = vae.encode(torch.rand(2, 3, 32, 32) * 2 - 1).latent_dist.mean
    assert latents.shape == (2, 4, 16, 16)
    assert vae.config.scaling_factor == figures["scaling_factor"] != 0.18215
    stored = load_file(autoencoder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.usefixtures("_own_state")
def test_pixel(data, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(train_two("cifar10-pixel", data, tmp_path))
    assert pipe(2, num_inference_steps=2, output_type="np").images.shape == (2, 32, 32, 3)


def assert_names_no_folder(export: Path, number: int, *folders: Path) -> None:
    exported = [file.read_text() for file in export.rglob("config.json")]
    assert len(exported) == number
    assert not any(str(folder) in "".join(exported) for folder in folders)


def test_latent_transformer(transformer, autoencoder):
    pipe = DiffusionPipeline.from_pretrained(transformer / "export")
    assert pipe.get_label_ids(["ship", "dog"]) == [8, 5]
    assert_names_no_folder(transformer / "export", 2, transformer, autoencoder)
    images = pipe([8, 5], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    table = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert len(table) == 1001
    assert not table[10:1000].any()
    assert table[:10].any(1).all()
    assert table[1000].any()


@pytest.mark.usefixtures("_own_state")
def test_text(data, tmp_path, autoencoder):
    export = train_two("cifar10-text", data, tmp_path, autoencoder=autoencoder)
    assert_names_no_folder(export, 3, tmp_path, autoencoder)
    pipe = DiffusionPipeline.from_pretrained(export)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    text, results = make_card("cifar10-text", data, tmp_path, autoencoder=autoencoder)
    assert results["sampling"]["prompts"] == [captions.captions(name)[0] for name in captions.CIFAR10_CLASSES]
    assert "*a photo of a ship*" in " ".join(text.split())
    assert "Of the 10 captions of a class that it was trained with, the others are not measured." in " ".join(
        text.split()
    )
    images = pipe(["a photo of a ship", "a frog"], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    tokenizer = CLIPTokenizer.from_pretrained(export / "tokenizer")
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = "a blurry picture of an automobile"
    ids = tokenizer(text).input_ids
    assert [ids[0], ids[-1], len(ids)] == [start, end, 2 + len(text.split())]
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer("").input_ids == [start, end]
    assert len(tokenizer("zebras").input_ids) > 3, "no word of the captions, so several pieces"


def test_every_word_of_the_captions_is_one_token():
    texts = [text for name in captions.CIFAR10_CLASSES for text in captions.captions(name)]
    tokenizer = captions.make_tokenizer()
    for text in texts:
        assert len(tokenizer(text).input_ids) == 2 + len(text.split()) <= captions.TOKENS
    assert captions.captions("airplane")[0] == "a photo of an airplane"


def make_card(name: str, data: Path, folder: Path, **arguments) -> tuple[str, dict]:
    out = folder / "card"
    model_card.main(name, data, run=folder / "runs" / name, out=out, num=66, steps=1, card_only=False, **arguments)
    text = (out / "README.md").read_text(encoding="utf-8")
    results = json.loads((out / model_card.RESULTS).read_text(encoding="utf-8"))
    assert text == model_card.card(name, results)
    with Image.open(out / "samples.png") as samples:
        assert samples.size == (3 * 256, 3 * 256)
    assert results["training"]["updates"] == 2
    (precision,) = results["training"]["precisions"]
    assert results["training"]["precisions"] == {precision: 2}
    assert f"clipped at 1, {precision}, moving average" in " ".join(text.split())
    for part in ("**Weak**: ", "not selected", "JPEG CIFAR-10", "*not* FID", "its training stopped after 2 updates"):
        assert part in " ".join(text.split())
    DiffusionPipeline.from_pretrained(out)
    return text, results


@pytest.fixture(scope="module")
def card(data, transformer, autoencoder) -> tuple[str, dict]:
    """Of the transformer, beside its runs; not to be changed."""
    with own_state():
        return make_card("cifar10-latent-dit", data, transformer, autoencoder=autoencoder)


def test_card_of_a_conditional_model(card):
    text, results = card
    assert 0 <= results["figures"]["class_agreement"]["value"] < 0.6
    assert "| class agreement |" in text
    assert "PSNR" in text


@pytest.mark.usefixtures("_own_state", "card")
def test_a_run_begins_with_published_weights(data, tmp_path, transformer, autoencoder):
    published, out = transformer / "card", tmp_path / "again"
    settings = {"updates": 100, "batch_size": 2, "autoencoder": autoencoder, "out": out, "begin_with": published}
    train.main("cifar10-latent-dit", data, stop_at=2, export=tmp_path / "same", **settings)
    file = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "same" / file).read_bytes() == (published / file).read_bytes()
    train.main("cifar10-latent-dit", data, stop_at=3, **settings)
    progress = json.loads((out / "progress.json").read_text())
    assert (progress["update"], progress["begun"], len(progress["window"])) == (3, 2, 1)
    assert list(progress["precisions"].values()) == [3]


@pytest.mark.usefixtures("_own_state", "card")
def test_a_run_keeps_its_autoencoder(data, tmp_path, transformer, autoencoder, capsys):
    shutil.copytree(transformer, tmp_path, dirs_exist_ok=True)
    autoencoder = Path(shutil.copytree(autoencoder, tmp_path / "autoencoder"))
    config = autoencoder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    settings = {"updates": 100, "batch_size": 2, "autoencoder": autoencoder, "stop_at": 3}
    for more, says in (
        (
            {"out": tmp_path / "runs" / "cifar10-latent-dit"},
            "A run must go on with the settings that it was begun with",
        ),
        ({"begin_with": tmp_path / "card"}, "A run must begin with weights that were trained with its settings"),
    ):
        with pytest.raises(typer.Exit):
            train.main("cifar10-latent-dit", data, **({"out": tmp_path / "other"} | settings | more))
        said = capsys.readouterr().err
        assert says in said
        assert "'made_of'" in said
    assert not (tmp_path / "other").exists(), "so that the right call is not refused afterwards"


@pytest.mark.usefixtures("_own_state")
def test_processes_share_a_batch_equally_or_not_at_all(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop.Accelerator, "num_processes", property(lambda _: 3))
    with pytest.raises(typer.Exit):
        train.main("cifar10-pixel", data, out=tmp_path / "run", batch_size=4, stop_at=1)
    assert "got 4 pictures for 3 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_runs_that_did_not_write_down_their_precision_go_on():
    progress = loop.Progress()
    progress.load_state_dict({"update": 100, "begun": 0, "seconds": 1.0, "curve": [], "window": []})
    for precision in (loop.BFLOAT16, loop.FLOAT32, loop.FLOAT32):
        progress.add(1.0, precision)
    results = json.loads((TRAINING.parents[2] / "model_cards" / "cifar10-pixel" / model_card.RESULTS).read_text())
    assert "bfloat16 autocast where the processor had it (not recorded)" in " ".join(
        model_card.card("cifar10-pixel", results).split()
    )
    results["training"] |= {"updates": progress.update, "precisions": progress.precisions}
    assert (
        "precision: bfloat16 autocast in 1 updates, float32 in 2 updates, not recorded in 100, moving average"
        in " ".join(model_card.card("cifar10-pixel", results).split())
    )


def test_cards_are_what_their_results_say():
    files = list((TRAINING.parents[2] / "model_cards").glob(f"*/{model_card.RESULTS}"))
    assert files
    for file in files:
        folder = file.parents[1]
        expected = model_card.card(folder.name, json.loads(file.read_text(encoding="utf-8")))
        assert (folder / "README.md").read_text(encoding="utf-8") == expected


def start(data: Path, out: Path, *more: object) -> subprocess.Popen:
    command = [sys.executable, TRAINING / "train.py", "cifar10-autoencoder", "--data", data, "--out", out, *more]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command), "--batch-size", "2"], env=environment, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen) -> str:
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    return err


@pytest.mark.slow
def test_killed_stopped_and_resumed_it_is_the_same_run(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(start(data, whole, "--updates", 60, "--export", tmp_path / "export"))
    process = start(data, killed, "--updates", 60, "--save-every", 0)
    wait_until(lambda: list(killed.glob("checkpoint-000000[3-9]")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(killed.glob("checkpoint-0000060"))
    process = start(data, killed, "--updates", 60, "--save-every", 0, "--export", tmp_path / "unfinished")
    wait_until(lambda: list(killed.glob("checkpoint-00000[1-5]?")), process)
    process.send_signal(signal.SIGTERM)
    told = finished(process)
    (left,) = killed.glob("checkpoint-*")
    assert "goes on at update" in told
    assert f"stopped at update {int(left.name[-7:])}\n" in told
    assert not (tmp_path / "unfinished").exists()
    assert "goes on at update" in finished(start(data, killed, "--updates", 60))
    for file in ("model.safetensors", "custom_checkpoint_0.pkl", "optimizer.bin"):
        one, two = (folder / "checkpoint-0000060" / file for folder in (whole, killed))
        assert one.read_bytes() == two.read_bytes(), file
    curves = [json.loads((folder / "progress.json").read_text()) for folder in (whole, killed)]
    assert len(curves[0]["curve"]) == 1
    assert [c["curve"] + c["window"] for c in curves][0] == [c["curve"] + c["window"] for c in curves][1]
    assert (whole / "samples-000060.png").read_bytes() == (killed / "samples-000060.png").read_bytes()
    other = start(data, killed, "--seed", 1)
    assert "must go on with the settings that it was begun with, {'seed': 0}" in " ".join(
        other.communicate()[1].split()
    )
