"""Real pictures in a pipeline's shape, or a clear refusal."""

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import turned

from diffusers_msfp.calibration.pictures import fitted, opened
from diffusers_msfp.errors import ConfigError, ShapeError
from diffusers_msfp.evaluation.images.real import load_real


def archive(folder, **arrays) -> str:
    np.savez(folder / "data.npz", **arrays)
    return str(folder / "data.npz")


def test_archives(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    pictures, done = load_real(archive(tmp_path, x_train=grey[:1], x_test=grey), (1, 32, 32))
    assert pictures.shape == (5, 1, 32, 32)
    assert pictures.dtype == torch.float32
    assert np.array_equal((pictures[:, 0, 2:30, 2:30] * 255).round().numpy(), grey)
    assert pictures.sum() == pytest.approx(pictures[:, :, 2:30, 2:30].sum())
    assert done == "black border, 28×28 to 32×32"
    colour = np.random.default_rng(0).random((3, 8, 8, 3))
    pictures, done = load_real(archive(tmp_path, images=colour), (3, 8, 8))
    assert np.array_equal(pictures.permute(0, 2, 3, 1).numpy(), colour.astype(np.float32))
    assert done == "as they are"


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((2, 24, 24), np.uint8), ShapeError, r"or lack a narrow border, but got \(1, 24, 24\)"),
        (np.zeros((2, 36, 36), np.uint8), ShapeError, "Convert them first"),
        (np.zeros((2, 32, 32, 3), np.uint8), ShapeError, r"\(3, 32, 32\)"),
        (np.zeros((32, 32), np.uint8), ShapeError, "must have 3 or 4 axes"),
        (np.zeros((0, 32, 32), np.uint8), ShapeError, "and pictures in it"),
        (np.full((2, 32, 32), 2.0), ConfigError, r"must be uint8, or float in \[0, 1\], but it is float64"),
        (np.full((2, 32, 32), np.nan), ConfigError, r"float in \[0, 1\]"),
        (np.zeros((2, 32, 32), np.int64), ConfigError, "but it is int64"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, array, error, message):
    with pytest.raises(error, match=message):
        load_real(archive(tmp_path, x_test=array), (1, 32, 32))


def test_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (80, 40), 255).save(tmp_path / "deep" / "b.jpg")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures, done = load_real(tmp_path, (3, 32, 32))
    assert pictures.shape == (2, 3, 32, 32)
    assert pictures[0, :, 0, 0].tolist() == [1, 0, 0]
    assert pictures[1].min() == 1
    assert done == "1 of 2 cropped and scaled to 32×32"
    assert load_real(tmp_path, (1, 32, 32))[0].shape == (2, 1, 32, 32)
    with pytest.raises(ShapeError, match=r"at least 64×64, as the pipeline's, but .* is 32×32"):
        load_real(tmp_path, (3, 64, 64))
    (tmp_path / "c.png").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"c\.png must be a picture"):
        load_real(tmp_path, (3, 32, 32))


def test_photographs_are_read_upright(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    file = turned(upright, tmp_path)
    with Image.open(file) as stored:
        assert stored.size == (40, 32)
        assert np.array_equal(np.asarray(opened(stored)), np.asarray(upright))
    assert np.array_equal(np.asarray(opened(file)), np.asarray(upright))
    (evaluated,), _ = load_real(tmp_path, (3, 40, 32))
    assert torch.equal((evaluated * 255).round(), fitted(upright, (3, 40, 32)).float())


def test_what_is_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"nonsense")
    for name, message in (
        ("empty", "`--data` must be a folder with pictures .*: there are none"),
        ("none.npz", "is neither"),
        ("bad.npz", "must be a NumPy archive"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_real(tmp_path / name, (1, 32, 32))
    with pytest.raises(ConfigError, match="an array `x_test` or `images`, but has y"):
        load_real(archive(tmp_path, y=np.zeros(3)), (1, 32, 32))
