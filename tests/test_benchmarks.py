"""What benchmarks make is what their rows say: of these weights, lengths and code, counted alike."""

import json
import sys
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
from conftest import make_dit_pipe
from diffusers import DiffusionPipeline, DiTPipeline

from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.recipes import RECIPES

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import bench_baselines  # noqa: E402
import bench_budget  # noqa: E402
import bench_recipe  # noqa: E402
import harness  # noqa: E402
import tables  # noqa: E402
from fashion_features import fashion_distance  # noqa: E402
from real_models import RESULTS  # noqa: E402

FEW = {"num_inference_steps": 2, "batch_size": 2}
SHORT = {
    "talora": {"train_steps": 1, **FEW},
    "temporal": {"iterations": 1, "num_inference_steps": 2},
    "rounding": {"iterations": 1, "num_samples": 2, **FEW},
    "correction": {"num_samples": 2, "num_inference_steps": 2},
}


def shortened(cell: bench_baselines.Cell, correction: bool) -> dict:
    """Settings of a cell's stages for one update."""
    stages = {stage.name: stage.settings for stage in RECIPES[cell.recipe]} | ({"correction": {}} if correction else {})
    return {name: {k: v for k, v in SHORT[name].items() if k not in own} for name, own in stages.items()}


@pytest.mark.parametrize("name", [n for n in bench_baselines.CONDITIONAL if bench_baselines.CELLS[n].recipe])
def test_every_cell_of_conditional_models_can_be_made(name, monkeypatch):
    cell, reference = bench_baselines.CELLS[name], make_dit_pipe()
    reference.set_progress_bar_config(disable=True)
    short = partial(bench_baselines.quantize_pipeline, num_samples=2, num_inference_steps=2)
    monkeypatch.setattr(bench_baselines, "quantize_pipeline", short)
    monkeypatch.setattr(bench_baselines, "settings_for", lambda cell: shortened(cell, correction=True))
    assert bench_baselines.brought(Path("elsewhere"), cell) is None
    pipe, cost = bench_baselines.made(reference, cell, True, None, {"guidance_scale": 2.0})
    stages = [stage.name for stage in RECIPES[cell.recipe]]
    assert list(cost["stages"]) == [*stages, "correction"]
    assert cost["float"] == [], "a transformer has no shortcuts and no downsamplers"
    assert pipe.transformer.config.quantization_config.scheme == cell.scheme


def test_recipes_of_few_updates_have_those_that_their_cells_say():
    for name, cell in bench_baselines.CELLS.items():
        if cell.recipe == "msfp":
            assert bench_baselines.settings_for(cell) == {"talora": {"train_steps": 1100}}, name


def test_a_row_is_of_the_checkpoint_that_the_package_brings(monkeypatch):
    about = {"model": EMBEDDED_MODEL.name, "weights": "f3d194bed12766f3", "num_samples": 2000}
    rows = harness.read_results("baselines")["rows"]
    monkeypatch.setattr(bench_baselines, "read_results", lambda _name: {"rows": rows})
    names = ("w4a8 msfp", "w4g32a16 msfp", "w4a8-wide ptq")
    assert bench_baselines.missing(about, EMBEDDED_MODEL, names) == []
    rows = [row | ({"checkpoint": "another"} if "checkpoint" in row else {}) for row in rows]
    assert bench_baselines.missing(about, EMBEDDED_MODEL, names) == ["w4a8 msfp"]
    assert bench_baselines.missing(about | {"weights": "others"}, EMBEDDED_MODEL, names) == list(names)


def test_what_is_float_takes_two_bytes_in_every_row(embedded):
    size = partial(bench_baselines.bytes_float16, reference=embedded.unet)
    assert size(embedded.unet) == tables.full_precision_size()
    packed, half = (DiffusionPipeline.from_pretrained(TUNED_MODELS["w4a8"], dtype=d).unet for d in (None, torch.half))
    assert half.get_memory_footprint() == size(packed) == size(half) < packed.get_memory_footprint()
    cell = replace(bench_baselines.CELLS["w4a4 + correction"], keep=("conv_in", "no such"))
    assert bench_baselines.kept_float(embedded.unet, cell) == ("conv_in",)


def test_rows_name_the_commit_that_their_program_began_with(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    began = dict(harness.CODE)
    monkeypatch.setattr(harness.subprocess, "run", lambda *_, **__: pytest.fail("the commit is known already"))
    harness.write_results("some", "command", [{"cell": 1}])
    written = harness.read_results("some")
    assert written["origin"].items() >= began.items()
    assert written["rows"][0]["git"] == began["git"]


def test_pictures_of_other_code_are_not_found(monkeypatch, tmp_path):
    folders = set()
    for code in ({"git": "abc", "dirty": False}, {"git": "def", "dirty": False}, {"git": "def", "dirty": True}):
        for changes in ("one", "other"):
            monkeypatch.setattr(harness, "CODE", code)
            monkeypatch.setattr(harness, "_git", lambda word, *_, changes=changes: changes if word == "diff" else "")
            folders.add(harness.of_this_code(tmp_path))
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "_git", lambda word, *_: "new.py" if word == "ls-files" else "")
    for text in ("one", "other"):  # of a file that git does not know yet
        (tmp_path / "new.py").write_text(text)
        folders.add(harness.of_this_code(tmp_path))
    assert len(folders) == 6
    assert all(folder.parent == tmp_path for folder in folders)


CELLS = ("as it is", "two banks")


def rows_of(updates: int) -> list[dict]:
    about = {"weights": "w", "updates": updates, "num_samples": 2}
    return [about | {"cell": cell, "seed": 0, "psnr_db_by_picture": [1.0, 2.0]} for cell in CELLS]


@pytest.mark.parametrize("table", ["recipe", "paper", "banks"])
def test_rows_of_several_lengths_are_not_mixed(table, monkeypatch):
    rows = [*rows_of(250), *rows_of(1000)]
    monkeypatch.setattr(tables, "grouped", lambda *_: {name: [r for r in rows if r["cell"] == name] for name in CELLS})
    with pytest.raises(ValueError, match="Rows of `recipe` must have equal weights, updates, num_samples, but got"):
        list(tables.TABLES[table]())


def test_a_row_takes_the_place_of_others_weights_and_lengths(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write_results("recipe", "command", rows_of(250))
    (new, _), about = rows_of(1000), {"weights": "w", "updates": 1000, "num_samples": 2}
    stays = partial(bench_recipe.is_of, about)
    harness.keep_rows("recipe", "command", [new], by=("cell", "seed"), order=bench_recipe.place, stays=stays)
    assert [row["updates"] for row in harness.read_results("recipe")["rows"]] == [1000]


def test_an_interval_over_seeds_is_not_one_of_single_pictures():
    rows = [{"image_psnr_db": v, "image_psnr_db_low": v - 0.1, "image_psnr_db_high": v + 0.1} for v in (20, 21, 22)]
    assert tables.psnr_of(rows[:1]) == (20, 19.9, 20.1)
    assert tables.psnr_of(rows) == pytest.approx((21, 21 - 4.303 / 3**0.5, 21 + 4.303 / 3**0.5))


def test_a_distance_needs_more_pictures_than_features():
    images = torch.rand(65, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert fashion_distance(images, images) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="more pictures than there are features, 64, but got 64"):
        fashion_distance(images, images[1:])


def test_plans_are_made_with_the_guidance_of_the_card(monkeypatch, tmp_path):
    make_dit_pipe().save_pretrained(tmp_path)
    card = tmp_path / RESULTS
    card.parent.mkdir()
    card.write_text(json.dumps({"training": {"settings": {"guidance": 1.75}}}))
    guided, rows, call = [], [], DiTPipeline.__call__

    @wraps(call)
    def watched(self, **arguments):
        guided.append(arguments["guidance_scale"])
        return call(self, **arguments)

    monkeypatch.setattr(DiTPipeline, "__call__", watched)
    monkeypatch.setattr(bench_budget, "STEPS", 2)
    monkeypatch.setattr(bench_budget, "PLANNING", 2)
    monkeypatch.setattr(bench_budget, "CHOICES", ("w4a8", "w8a8"))
    monkeypatch.setattr(bench_budget, "TARGETS_DB", (10.0,))
    monkeypatch.setattr(bench_budget, "keep_rows", lambda _name, _command, made, **_: rows.extend(made))
    bench_budget.main(part="sizes,psnr", num_samples=2, model=tmp_path)
    assert rows
    assert set(guided) == {1.75}
