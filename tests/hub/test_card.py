"""Cards: every figure comes from a results file, what is missing is named, the client reads the metadata."""

import json
import re
import shutil
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hub_server import rehearse
from huggingface_hub import ModelCard

from diffusers_msfp import FinetuneConfig, finetune, publish
from diffusers_msfp.assets import TUNED_MODELS
from diffusers_msfp.checkpoint.digest import fingerprint
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.hub import render_card
from diffusers_msfp.hub.plots import plot_router, plot_timesteps
from diffusers_msfp.hub.prepare import pages, task_of
from diffusers_msfp.hub.results import CHECKPOINT, Results, read_results

CARDS = [file.parents[1] for file in sorted(Path(__file__).parents[2].glob(f"model_cards/*/{CHECKPOINT}"))]

FACTS = {
    "repo": "user/tiny",
    "arguments": '"user/tiny"',
    "base_model": "org/base",
    "license": "mit",
    "pipeline_tag": "unconditional-image-generation",
    "pipeline_class": "DDPMPipeline",
    "components": {
        "unet": {
            "scheme": "w4a4",
            "layers": 65,
            "weight_formats": {"fp4_e2m1": 25, "fp4_e1m2": 40},
            "input_formats": {"fp4_ue2m2": 64, "float": 1},
            "bits_per_weight": 4.127,
            "parameters": 1_805_121,
            "file_bytes": 1_017_432,
            "adapters": None,
        }
    },
    "preview": {"num_samples": 8, "num_inference_steps": 20, "seed": 3},
}
ADAPTERS = {
    "placement": "side",
    "reads": "codes",
    "num_adapters": 2,
    "num_timesteps": 1000,
    "ranks": {"8": 60, "4": 5},
    "intervals": [[[0, 399, 0], [400, 999, 1]]],
}
EVALUATION = {
    "figures": {
        "candidate_to_reference": {
            "frechet_distance": {"value": 12.345678, "low": 11.1, "high": 13.9, "bias": 0.1},
            "psnr_db": {"value": 18.51, "low": 18.2, "high": 18.9, "bias": 0},
        },
        "candidate_to_real": {},
        "classifier_score": {"reference": {"value": 3.2, "low": 3.1, "high": 3.3, "bias": 0}},
    },
    "omitted": {"candidate_to_real.recall": "needs 100 pictures in each set for neighbourhoods, but got 16"},
    "traj_rel_l2": 0.0345,
    "eps_rel_l2": 0.128,
    "eps_rel_l2_by_timestep": {"950": 0.066, "500": 0.071, "0": 0.56},
    "settings": {
        "num_samples": 2000,
        "num_inference_steps": 20,
        "seed": 0,
        "features": "fashion",
        "scheduler": "DDIMScheduler",
    },
    "candidate": "/home/somebody/w4a4",
    "bytes_reference": 3_600_000,
    "bytes_quantized": 1_017_432,
}
COMPARISON = {"eps_mse": 0.016, "eps_rel_l2": 0.13, "eps_rel_l2_by_timestep": {"0": 0.5}, "image_psnr_db": 13.9}
SPEED = {
    "model": "/home/somebody/w4a4",
    "threads": 2,
    "rows": [
        {"provider": "bf16:cl", "batch": 1, "seconds": 0.02, "seconds_low": 0.019, "seconds_high": 0.021, "speedup": 1},
        {"provider": "msfp", "batch": 1, "seconds": 0.01, "seconds_low": 0.009, "seconds_high": 0.011, "speedup": 2},
    ],
}


def test_temporal_maintenance_is_told():
    temporal = {"timesteps": [0.0, 950.0], "block": ["a", "b", "c"], "sets": ["a", "b"], "cached": ["c"]}
    facts = FACTS | {"components": {"unet": FACTS["components"]["unet"] | {"temporal": temporal}}}
    text = render_card(facts, Results())
    assert (
        "3 layers depend on the timestep alone. For each of 2 timesteps 2 layers have a range of their own, and\n1 have"
        in text
    )
    assert "Temporal features are maintained after TFMQ-DM" in text


def test_a_full_card():
    facts = FACTS | {
        "components": {"unet": FACTS["components"]["unet"] | {"adapters": ADAPTERS, "adapter_parameters": 123_456}}
    }
    text = render_card(facts, Results(evaluation=EVALUATION, speed=SPEED))
    for part in (
        "| Fréchet distance, to full precision | 12.35 | 11.10 – 13.90 |",
        "| PSNR for equal noise (dB), to full precision | 18.51 | 18.20 – 18.90 |",
        "| classifier score, full precision | 3.200 | 3.100 – 3.300 |",
        "2000 pictures of each pipeline in 20 steps (DDIMScheduler), seed 0, features of `fashion` (so",
        "relative to full precision is\n0.0345 as the sampler uses it (`traj_rel_l2`",
        "0.1280 pooled over timesteps as they are (`eps_rel_l2`)",
        "1.0 MB instead of 3.6 MB",
        "| `msfp` | 1 | 10.0 ms | 9.0 – 11.0 | 2.00 |",
        "40 × `fp4_e1m2`, 25 × `fp4_e2m1` | 64 × `fp4_ue2m2`, 1 × float | 4.13 | 0.12 M | 1.0 MB | 4.51 |",
        "2 low-rank adapters on each of 65 layers (beside the weights, reading codes)",
        "Not measured: candidate_to_real.recall, needs 100 pictures",
        "layers that stay float, and the adapters, over the base's parameters",
        "they differ from full precision's, as the figures above say.",
        "TALoRA and DFA",
        "![error over timesteps](results/timesteps.png)",
        "![which adapter serves which timesteps](results/router.png)",
    ):
        assert part in text, part
    assert "temporal" not in text
    assert "Not measured: speed" not in text
    assert not re.search(r"\n\n\n|[ \t]\n|{[{%]", text), "blank lines, trailing blanks, left-over template"
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "msfp", "quantized", "w4a4", "talora"],
    }


@pytest.mark.parametrize(
    ("changes", "told", "adapters"),
    [
        ({"placement": "merged", "reads": None}, "the packed weights of 65 layers are the updated ones", False),
        ({}, "65 layers have a low-rank adapter beside the weights, reading codes, for all timesteps", True),
    ],
)
def test_one_adapter_has_no_router(changes, told, adapters):
    plan = ADAPTERS | {"num_adapters": 1, "intervals": [[[0, 999, 0]]]} | changes
    facts = FACTS | {"components": {"unet": FACTS["components"]["unet"] | {"adapters": plan, "adapter_parameters": 0}}}
    text = render_card(facts, Results())
    assert told in text
    assert "## Fine-tuning" in text
    assert "MSFP and DFA as reconstructed" in text
    assert ("and the adapters" in text) == adapters
    assert "talora" not in ModelCard(text).data.tags
    assert not re.search(r"\n\n\n|[ \t]\n|{[{%]", text)
    assert "results/router.png" not in pages(facts, Results())


def test_the_card_begins_with_the_two_lines_that_load_it():
    lines = render_card(FACTS, Results()).partition("\n---\n")[2].strip().splitlines()
    assert lines[:7] == [
        "# tiny",
        "",
        "```py",
        "import diffusers, diffusers_msfp  # pip install diffusers-msfp",
        "",
        'pipe = diffusers.DiffusionPipeline.from_pretrained("user/tiny")',
        "```",
    ]


def test_what_was_not_measured_is_named_and_not_invented():
    text = render_card(FACTS, Results())
    assert "## Quality\n\nNot measured." in text
    assert "## Speed\n\nNot measured." in text
    assert "- Not measured: quality with confidence intervals.\n- Not measured: speed.\n" in text
    assert "they differ from full precision's; by how much was not measured." in text
    assert "stay float, over the base's parameters" in text
    assert "as the figures above say" not in text
    assert "timesteps.png" not in text
    assert "TALoRA" not in text.partition("## Citation")[0]
    assert not re.search(r"\n\n\n|[ \t]\n|{[{%]", text)
    partly = render_card(FACTS, Results(comparison=COMPARISON))
    assert "PSNR of the pictures 13.9 dB." in partly
    said = COMPARISON | {
        "settings": {"num_samples": 16, "num_inference_steps": 20},
        "image_psnr_db_interval": [13.1, 14.72],
    }
    full = render_card(FACTS, Results(comparison=said))
    assert "PSNR of the pictures 13.9 dB (13.1 – 14.7, 95 %) over 16 samples of 20 steps." in full
    assert "- Not measured: quality with confidence intervals." in partly


@pytest.mark.parametrize(
    ("cls", "task"),
    [
        (DDPMPipeline, "unconditional-image-generation"),
        (StableDiffusionPipeline, "text-to-image"),
        (StableDiffusionImg2ImgPipeline, "image-to-image"),
    ],
)
def test_tasks(cls, task):
    assert task_of(cls) == task


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_results_are_told_by_their_fields(tmp_path):
    folder = tmp_path / "model"
    write(tmp_path / "model-evaluation" / "results.json", EVALUATION)
    write(folder / "results" / "a.json", SPEED)
    write(folder / "results" / "b.json", {"something": "else"})
    found = read_results(folder, [write(tmp_path / "c.json", COMPARISON)])
    assert (found.evaluation, found.comparison, found.speed) == (EVALUATION, COMPARISON, SPEED)
    assert found.sizes == (3_600_000, 1_017_432)
    assert not found.missing("org/base")
    assert "somebody" not in json.dumps(found.published()), "no paths of this machine"


def test_results_of_an_earlier_version_are_read(tmp_path):
    older = dict(EVALUATION)
    older["settings"] = {"num": 2000, "steps": 20, "seed": 0, "features": "fashion", "scheduler": "DDIMScheduler"}
    older["bytes_candidate"], older["source"] = older.pop("bytes_quantized"), older.pop("candidate")
    speed = SPEED | {"rows": [row | {"steps": 1} for row in SPEED["rows"]]}
    compared = COMPARISON | {"bytes_ref": 2, "bytes_cand": 1}
    files = [write(tmp_path / f"{n}.json", each) for n, each in enumerate((older, speed, compared))]
    found = read_results(tmp_path / "model", files)
    assert found.evaluation == EVALUATION
    assert found.speed == SPEED | {"rows": [row | {"num_inference_steps": 1} for row in SPEED["rows"]]}
    assert found.comparison == COMPARISON | {"bytes_reference": 2, "bytes_quantized": 1}


def test_results_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="must be what `evaluate`, `compare` or `bench` prints"):
        read_results(tmp_path, [write(tmp_path / "a.json", {"rows": [{"provider": "x"}]})])
    for wrong in ({"traj_rel_l2": "0.1"}, {"image_psnr_db_interval": [1]}, {"image_psnr_db_interval": "12"}):
        with pytest.raises(ConfigError, match="must be what `evaluate`, `compare` or `bench` prints"):
            read_results(tmp_path, [write(tmp_path / "a.json", COMPARISON | wrong)])
    for text in ("{", '{"rows": NaN}', "[" * 10**5):
        with pytest.raises(ConfigError, match="must be a JSON file of finite numbers"):
            read_results(tmp_path, [write(tmp_path / "a.json", text)])
    with pytest.raises(ConfigError, match="must be a JSON file"):
        read_results(tmp_path, [tmp_path / "none.json"])
    write(tmp_path / "results" / "a.json", SPEED)
    with pytest.raises(ConfigError, match="A card takes one speed, but got .*a.json and .*b.json"):
        read_results(tmp_path, [write(tmp_path / "b.json", SPEED)])


def test_metadata_that_the_hub_would_not_take():
    with pytest.raises(ConfigError, match="A card must say `base_model`"):
        render_card(FACTS | {"base_model": None}, Results())


def test_plots_are_pictures():
    for png in (plot_timesteps(EVALUATION["eps_rel_l2_by_timestep"]), plot_router(ADAPTERS["intervals"], 2)):
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5000
    assert plot_timesteps({"0": 0.1, "10": 0.2}) == plot_timesteps({"10": 0.2, "0": 0.1})


def test_results_beside_a_checkpoint_are_published_with_its_card(packed_dir, tmp_path):
    folder = Path(shutil.copytree(packed_dir, tmp_path / "packed"))
    model = DiffusionPipeline.from_pretrained(folder).unet
    write(folder / "results" / "evaluation.json", EVALUATION)
    with pytest.raises(ConfigError, match="names no checkpoint"):
        rehearse(folder, tmp_path / "out")
    write(folder / "results" / "evaluation.json", EVALUATION | {"checkpoint": None})
    with pytest.raises(ConfigError, match="was measured with a float model"):
        rehearse(folder, tmp_path / "out")
    write(folder / "results" / "evaluation.json", EVALUATION | {"checkpoint": fingerprint([model])})
    write(folder / "notes.txt", "mine")
    report = rehearse(folder, tmp_path / "out")
    assert report.left_out == ["notes.txt"]
    assert list(report.missing) == ["speed"]
    assert (tmp_path / "out" / "results" / "timesteps.png").is_file()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "12.35" in text
    targets = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(targets) == 2
    assert all((tmp_path / "out" / target).is_file() for target in targets)


@pytest.mark.parametrize("placement", ["side", "merged"])
def test_adapters_are_no_parameters_of_the_model(packed_pipe, tiny_pipe, tmp_path, placement):
    config = FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2, placement=placement)
    finetune(packed_pipe, tiny_pipe, config)
    packed_pipe.save_pretrained(tmp_path / "tuned")
    known = {"license": "mit", "base_model": "org/base", "num_samples": 1, "num_inference_steps": 1}
    publish(tmp_path / "tuned", "user/tiny", dry_run=tmp_path / "out", **known)
    part = json.loads((tmp_path / "out" / CHECKPOINT).read_text())["components"]["unet"]
    assert part["parameters"] == tiny_pipe.unet.num_parameters()
    assert (part["adapter_parameters"] > 0) == (placement == "side")


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_cards_of_our_own_checkpoints_are_what_their_results_say(folder):
    facts = json.loads((folder / CHECKPOINT).read_text(encoding="utf-8"))
    made = pages(facts, read_results(folder))
    for place, content in made.items():
        assert (folder / place).is_file(), place
        if not place.endswith(".png"):
            assert (folder / place).read_bytes() == content, f"{place}: run tests/benchmarks/cards.py"


def test_we_have_cards_of_our_own():
    assert {folder.name for folder in CARDS} >= {folder.name for folder in TUNED_MODELS.values()}
