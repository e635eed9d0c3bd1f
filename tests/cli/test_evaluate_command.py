"""`diffusers-msfp evaluate` as a user meets it: tables, results, killed and resumed, in two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import program
from processes import wait_until

from diffusers_msfp import cli
from diffusers_msfp.errors import ConfigError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
TIMEOUT = 240
NUM, BATCHES = 128, 4
LAUNCH = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
)
FEATURES = "test_evaluate_command:grey_features"


def grey_features():
    return lambda images: images.mean(1)[:, :2, 0]


def start(*arguments: object, launch: list[str] = ()) -> subprocess.Popen:
    command = [sys.executable, *launch, "-m", "diffusers_msfp", "evaluate", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, start_new_session=True, **pipes)


def finished(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def asked(packed_dir, tiny_dir) -> list:
    return [
        packed_dir,
        "--reference",
        tiny_dir,
        "--num-samples",
        NUM,
        "--num-inference-steps",
        3,
        "--features",
        FEATURES,
    ]


@pytest.fixture(scope="module")
def killed(asked, tmp_path_factory) -> Path:
    """A folder whose run was killed between its first picture and its last."""
    out = tmp_path_factory.mktemp("killed")
    process = start(*asked, "--out", out)
    wait_until(lambda: len(list(out.rglob("*.npy"))) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "results.json").exists()
    return out


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory) -> dict:
    """What an uninterrupted run in one process finds."""
    out = tmp_path_factory.mktemp("whole")
    done = program("evaluate", *asked, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "results.json").read_text()) == json.loads(done.stdout)
    return json.loads(done.stdout)


def test_killed_it_goes_on(asked, killed, whole):
    kept = {file: file.stat().st_mtime_ns for file in killed.rglob("*.npy")}
    assert 2 <= len(kept) < 2 * BATCHES
    done = program("evaluate", *asked, "--out", killed)
    assert done.returncode == 0, done.stderr
    table, notes = done.stdout, done.stderr
    assert all(file.stat().st_mtime_ns == then for file, then in kept.items())
    again = json.loads((killed / "results.json").read_text())
    assert again["figures"] == whole["figures"]
    for line in (
        "Fréchet distance",
        "precision",
        "PSNR, equal noise",
        "worst of",
        "results.json",
        "left out: candidate",
    ):
        assert line in table, line
    drawn = [line for line in notes.split("\n") if line.startswith("pictures of")]  # slow machines say more between
    assert drawn == ["pictures of the reference", "pictures of the candidate"]
    assert {"bytes_reference", "bytes_quantized", "seconds", "peak_rss_bytes", "origin", "settings"} <= set(again)
    assert again["bytes_quantized"] < 0.35 * again["bytes_reference"]


@pytest.mark.slow
def test_two_processes_find_the_same(asked, whole, tmp_path):
    port = ["--main_process_port", str(31000 + os.getpid() % 2000)]
    two = start(*asked, "--out", tmp_path, "--json", launch=["-m", *LAUNCH.split(), *port])
    assert json.loads(finished(two)[0])["figures"] == whole["figures"]


def test_the_table_names_what_needs_features(packed_dir, tiny_dir, tmp_path):
    out = tmp_path / "out"
    done = program(
        "evaluate", packed_dir, "--reference", tiny_dir, "--num-samples", 2, "--num-inference-steps", 1, "--out", out
    )
    assert done.returncode == 0, done.stderr
    assert "2 pictures, 1 steps of DDIMScheduler, no features" in " ".join(done.stdout.split())
    assert "PSNR, equal noise (dB)" in done.stdout
    assert done.stdout.count("`inception` need the package torch-fidelity") == 1
    assert "left out: candidate_to_reference.frechet_distance, " in done.stdout
    assert "classifier_score" in done.stdout


def test_refusals_leave_nothing(asked, tmp_path):
    np.savez(tmp_path / "data.npz", y=np.zeros(3))
    source, _, reference, *_ = asked
    with pytest.raises(ConfigError, match="must hold an array `x_test` or `images`"):
        cli.evaluate(source, reference=reference, data=tmp_path / "data.npz", features=FEATURES, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="Unknown feature network 'vgg'"):
        cli.evaluate(source, reference=reference, features="vgg", out=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]
