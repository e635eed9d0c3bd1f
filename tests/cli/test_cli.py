"""The command line as a user meets it: results, exit codes, nothing half-written."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import program
from diffusers import DiffusionPipeline
from PIL import Image
from processes import wait_until
from rich.console import Console

from diffusers_msfp import cli
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.cli.app import main
from diffusers_msfp.cli.commands.checkpoints import inspect
from diffusers_msfp.cli.shared.terminal import say
from diffusers_msfp.engines.choose import engine_named
from diffusers_msfp.engines.int8 import products_are_exact
from diffusers_msfp.errors import MSFPError
from diffusers_msfp.layers.convert import quant_layers

FAST = ["--num-samples", "2", "--num-inference-steps", "2"]


def process(*arguments: object) -> subprocess.CompletedProcess:
    """The program in a process of its own."""
    command = [sys.executable, "-m", "diffusers_msfp", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_quantize_compare_inspect_sample(tiny_dir, tmp_path):
    out = tmp_path / "deep" / "packed"
    made = program("quantize", tiny_dir, "--scheme", "w4a4", "--out", out, "--json", *FAST)
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["scheme"] == "w4a4"
    assert result["layers"] > 20
    assert 4 < result["weight_bits_per_param"] < 5
    assert result["bytes_quantized"] < 0.35 * result["bytes_reference"]
    assert result["bytes_quantized"] == (out / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert result["calibration_state"] == "frozen"
    assert result["peak_rss_bytes"] > 1e8
    assert result["seconds"] >= result["seconds_search"] + result["seconds_calibration"] > 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["packed"]

    compared = program("compare", tiny_dir, out, "--num-samples", 2, "--num-inference-steps", 2, "--json")
    figures = json.loads(compared.stdout)
    assert 0 < figures["eps_rel_l2"] < 1
    assert set(figures) == {
        "eps_mse",
        "eps_rel_l2",
        "eps_rel_l2_by_timestep",
        "image_psnr_db",
        "image_psnr_db_interval",
        "sampler",
        "traj_rel_l2",
        "checkpoint",
        "bytes_reference",
        "bytes_quantized",
        "settings",
    }
    assert figures["bytes_quantized"] == result["bytes_quantized"]
    assert figures["bytes_reference"] == result["bytes_reference"]

    table = program("inspect", out)
    assert table.returncode == 0
    layers = json.loads(program("inspect", out, "--json").stdout)["unet"]["layers"]
    assert len(layers) == result["layers"]
    for layer in layers:
        assert layer["name"] in table.stdout
        assert layer["weight_format"] in table.stdout
        for engine, reason in layer["engine_refusals"].items():
            count = sum(other["engine_refusals"].get(engine) == reason for other in layers)
            assert table.stdout.count(f"{engine} refuses {count} of {len(layers)} layers: {reason}\n") == 1
    assert any(layer["input_signed"] is False and layer["input_zero_point"] < 0 for layer in layers)

    assert not any(layer["measured"] for layer in layers), "nothing is timed in tests"

    unet = DiffusionPipeline.from_pretrained(out).unet
    chosen = {name: engine_named("auto").choose(layer) for name, layer in quant_layers(unet)}
    told = {layer["name"]: (layer["engine"], layer["engine_refusals"]) for layer in layers}
    assert told == {name: (engine.name, refusals) for name, (engine, refusals) in chosen.items()}

    drawn = program("sample", out, "--num-samples", 3, "--num-inference-steps", 2, "--out", tmp_path / "grid.png")
    assert drawn.returncode == 0
    assert Image.open(tmp_path / "grid.png").width > 3 * 8


def test_finetune(tiny_dir, packed_dir, tmp_path):
    out, training = tmp_path / "tuned", tmp_path / "tuned-training"
    options = [
        "--train-steps",
        4,
        "--num-inference-steps",
        3,
        "--batch-size",
        4,
        "--preview-every",
        2,
        "--checkpoint-every",
        2,
    ]
    made = program("finetune", packed_dir, "--teacher", tiny_dir, "--out", out, *options, "--json")
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["updates"] == 4
    assert result["loss_first"] > 0
    assert result["comparison"] == {"num_samples": 16, "num_inference_steps": 3}
    for when, folder in (("before", packed_dir), ("after", out)):
        told = cli.compare(tiny_dir, str(folder), num_inference_steps=3)
        assert result[when] == {key: getattr(told, key) for key in result[when]}
    assert result["before"] != result["after"]
    assert result["bytes_after"] > 1.2 * result["bytes_before"]
    assert result["peak_rss_bytes"] > 1e8
    assert result["intervals"][0][0][0] == 0
    assert result["intervals"][0][-1][1] == 999
    assert sorted(p.name for p in training.iterdir()) == ["finetune", "preview-000002.png", "preview-000004.png"]
    assert Image.open(training / "preview-000004.png").width > 8 * 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuned", "tuned-training"]

    described = json.loads(program("inspect", out, "--json").stdout)["unet"]
    assert described["adapters"]["intervals"] == result["intervals"]
    assert described["adapters"]["placement"] == "side"
    shown = program("inspect", out).stdout
    assert "2 adapters per layer, side, reading codes" in shown
    assert (
        program(
            "sample", out, "--num-samples", 1, "--num-inference-steps", 2, "--out", tmp_path / "grid.png"
        ).returncode
        == 0
    )
    measured = ["--num-samples", 2, "--num-inference-steps", 1, "--out", tmp_path / "measured"]
    table = program("evaluate", out, "--reference", tiny_dir, *measured)
    assert table.returncode == 0, table.stderr
    assert re.search(
        r"(\d+) of \1 layers have adapters and so differ from full precision on purpose", " ".join(table.stdout.split())
    )
    assert "worst of" not in table.stdout


@pytest.mark.parametrize(
    ("source", "teacher", "more", "message"),
    [
        ("tiny", "tiny", [], "must be quantized, but it is not: run `diffusers-msfp quantize` first"),
        ("packed", "packed", [], "must be the full-precision pipeline, but"),
        ("packed", "tiny", ["--minutes", "1", "--train-steps", "1"], "exclude each other"),
        ("packed", "tiny", ["--placement", "inside"], "one of merged, side, but got 'inside'"),
        ("packed", "nowhere", [], "must be a folder, a file or a Hub id"),
    ],
)
def test_finetune_refuses_in_one_line(
    tiny_dir, packed_dir, tmp_path, monkeypatch, capsys, source, teacher, more, message
):
    folders = {"tiny": tiny_dir, "packed": packed_dir, "nowhere": str(tmp_path / "nowhere")}
    out = tmp_path / "out"
    command = ["finetune", folders[source], "--teacher", folders[teacher], "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["diffusers-msfp", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()


def test_single_model_folder(tiny_dir, tmp_path):
    out = tmp_path / "unet"
    made = program("quantize", Path(tiny_dir) / "unet", "--scheme", "w4a4", "--out", out, "--json")
    result = json.loads(made.stdout)
    assert result["calibration_state"] == "observing"
    assert "could not be calibrated" in made.stderr
    assert result["bytes_quantized"] < 0.35 * result["bytes_reference"]
    layers = json.loads(program("inspect", out, "--json").stdout)["."]["layers"]
    observing = [layer for layer in layers if layer["input_format"] == "observing"]
    assert {layer["engine"] for layer in observing} == {"reference"}
    assert set(observing[0]["engine_refusals"]) == {"cuda", "int8", "bf16"}
    weights_only = program("quantize", Path(tiny_dir) / "unet", "--scheme", "w4a16", "--out", tmp_path / "w", "--json")
    assert json.loads(weights_only.stdout)["calibration_state"] == "frozen"


@pytest.mark.parametrize("width", [80, 120])
def test_inspect_fits_the_terminal(packed_dir, monkeypatch, width):
    terminal = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    for place in (inspect, say):
        monkeypatch.setitem(place.__globals__, "stdout", terminal)
    inspect(Path(packed_dir))
    lines = terminal.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    engine = "int8" if products_are_exact(255, 127) else "bf16"
    assert any(line.startswith("conv_out ") and line.endswith(f" {engine}") for line in lines) == (width == 120)


def test_a_file_that_is_no_checkpoint(tmp_path):
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"not a checkpoint")
    with pytest.raises(MSFPError, match="cannot be loaded as a single-file checkpoint"):
        cli.quantize(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD = {
    "unknown scheme": (["quantize", "{tiny}", "--scheme", "w5a5", "--out", "{out}"], "Unknown scheme 'w5a5'"),
    "no such source": (["quantize", "{out}/nothing", "--out", "{out}"], "must be a folder, a file or a Hub id"),
    "empty folder": (["quantize", "{empty}", "--out", "{out}"], "config.json names None"),
    "already quantized": (["quantize", "{packed}", "--out", "{out}"], "is already quantized \\(msfp\\)"),
    "existing target": (["quantize", "{tiny}", "--out", "{packed}"], "must not exist yet"),
    "foreign target": (["quantize", "{tiny}", "--out", "{full}", "--overwrite"], "holds something else"),
    "bad override": (["quantize", "{tiny}", "--out", "{out}", "--override", "conv"], "PATTERN=SCHEME"),
    "bad pattern": (["quantize", "{tiny}", "--out", "{out}", "--modules-to-not-convert", "zzz"], "'zzz' matches none"),
    "bad component": (["quantize", "{tiny}", "--out", "{out}", "--component", "vae"], "must have a component"),
    "zero samples": (["quantize", "{tiny}", "--out", "{out}", "--num-samples", "0"], "not in the|greater than"),
    "inspect a float one": (["inspect", "{tiny}"], "no config.json in it says"),
    "not a picture": (["sample", "{tiny}", "--out", "{out}.txt", "--num-samples", "1"], "must end in .png"),
    "no pipeline": (["sample", "{tiny}/unet", "--out", "{out}.png"], "must hold model_index.json"),
    "unknown verb": (["fly"], "No such command"),
    "missing option": (["quantize", "{tiny}"], "--out"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments, reason, tiny_dir, packed_dir, tmp_path, monkeypatch, capfd
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    names = {"tiny": tiny_dir, "packed": packed_dir, "out": tmp_path / "out"}
    names |= {"empty": tmp_path / "empty", "full": tmp_path / "full"}
    monkeypatch.setattr(sys, "argv", ["diffusers-msfp", *[a.format(**names) for a in arguments]])
    with pytest.raises(SystemExit) as exit_:
        main()
    shown = capfd.readouterr()
    assert exit_.value.code == 2
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert re.search(reason, " ".join(shown.err.split())), shown.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    if "error:" in shown.err:
        assert len(shown.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = process("quantize", tmp_path / "nothing", "--out", tmp_path / "out", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error:")
    assert len(done.stderr.splitlines()) == 1


def damaged(packed_dir: str, tmp_path: Path, file: str, content: bytes) -> Path:
    target = tmp_path / "damaged"
    shutil.copytree(packed_dir, target)
    (target / file).write_bytes(content)
    return target


@pytest.mark.parametrize("verb", ["inspect", "sample"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"),
        ("unet/diffusion_pytorch_model.safetensors", b""),
        ("unet/config.json", b"{"),
        ("unet/config.json", b'{"quantization_config": {"quant_method": "msfp", "layers": [{}]}}'),
        ("model_index.json", b"not json"),
    ],
)
def test_damaged_checkpoints_give_one_line(verb, file, content, packed_dir, tmp_path, monkeypatch, capfd):
    target = damaged(packed_dir, tmp_path, file, content)
    if (verb, file) == ("inspect", "model_index.json"):
        assert program(verb, target).returncode == 0, "it is not read"
        return
    arguments = [verb, str(target)] + (
        ["--out", str(tmp_path / "a.png"), "--num-samples", "1"] if verb == "sample" else []
    )
    monkeypatch.setattr(sys, "argv", ["diffusers-msfp", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    shown = capfd.readouterr()
    assert exit_.value.code == 2, shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


def test_overwrite_replaces_only_on_success(tiny_dir, tmp_path):
    out = tmp_path / "packed"
    quantize = ("quantize", tiny_dir, "--out", out, *FAST)
    assert program(*quantize, "--scheme", "w8a8").returncode == 0
    assert program(*quantize, "--scheme", "w4a4", "--modules-to-not-convert", "zzz", "--overwrite").returncode == 2
    assert json.loads(program("inspect", out, "--json").stdout)["unet"]["scheme"] == "w8a8"
    assert program(*quantize, "--scheme", "w4a4", "--overwrite").returncode == 0
    assert json.loads(program("inspect", out, "--json").stdout)["unet"]["scheme"] == "w4a4"
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize("sign", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, sign):
    out = tmp_path / "packed"
    command = [sys.executable, "-m", "diffusers_msfp", "quantize", EMBEDDED_MODEL, "--out", out]
    process = subprocess.Popen(
        [*command, "--num-samples", "100000"],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    try:
        config = tmp_path / ".packed.part" / "weights" / "unet" / "config.json"
        wait_until(config.is_file, process)  # then it calibrates
        assert process.poll() is None
        os.kill(process.pid, sign)
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
    assert not out.exists()


def test_version_and_help():
    assert program("--version").stdout.strip()
    shown = program("--help").stdout
    for verb in ("quantize", "sample", "compare", "inspect", "demo", "finetune"):
        assert verb in shown


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    demo = sys.modules["diffusers_msfp.cli.demo"]
    monkeypatch.setattr(demo, "quantize", partial(cli.quantize, num_samples=8, num_inference_steps=10))
    monkeypatch.setattr(demo, "compare", partial(cli.compare, num_samples=2, num_inference_steps=10))
    result = cli.demo(tmp_path, num_inference_steps=2)
    picture = np.asarray(Image.open(result.picture))
    assert picture.std() > 10
    assert list(result.schemes) == ["w4a8", "w4a8, recipe msfp", "w4a4", "w4a4, recipe msfp"]
    for figures in result.schemes.values():
        assert figures.compared.bytes_quantized < figures.compared.bytes_reference
        assert 0 < figures.compared.eps_rel_l2 < 0.3
    for scheme in ("w4a8", "w4a4"):
        plain, tuned = (result.schemes[name].compared for name in (scheme, f"{scheme}, recipe msfp"))
        assert result.schemes[f"{scheme}, recipe msfp"].quantized is None
        assert tuned.traj_rel_l2 < 0.7 * plain.traj_rel_l2
        assert tuned.bytes_quantized < 1.1 * plain.bytes_quantized
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "w4a4")).__name__ == "DDPMPipeline"
