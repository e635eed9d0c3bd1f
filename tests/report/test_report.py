"""The quality report: its data are what was measured, its page says the same, loads nothing and escapes every name."""

import copy
import inspect
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_condition_unet, make_dit, make_dit_pipe, make_unet, make_vae
from diffusers import DDIMScheduler, DDPMPipeline, DiTPipeline, UNet2DModel
from pipelines import make_small_pipe

from diffusers_msfp import SplitConfig, cli, quantize_pipeline, split_shortcuts
from diffusers_msfp.cli.app import main
from diffusers_msfp.engines.choose import engine_set, set_engine
from diffusers_msfp.errors import ConfigError, StateError
from diffusers_msfp.evaluation import compare_pipelines, layer_snr
from diffusers_msfp.layers.convert import Conversion, convert, quant_layers
from diffusers_msfp.methods.temporal import FiniteSet
from diffusers_msfp.report import Report, collect_report, plots, render_report
from diffusers_msfp.report.layers import EDGE_BLOCK, advice, block_of, input_levels
from diffusers_msfp.report.page import psnr_meaning

RUN = {"num_samples": 4, "num_inference_steps": 3, "with_speed": False}
VOID = {"meta", "col", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Elements, texts, and whether every element that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def rendered(data: dict, **changes) -> str:
    more = {"name": "packed", "reference": "float", "bytes_quantized": 1_000_000, "bytes_reference": 3_500_000}
    return render_report(SimpleNamespace(to_dict=lambda: data | more | changes))


def page_of(report: Report, **changes) -> Page:
    return Page(rendered(report.to_dict(), **changes))


def loads_nothing(text: str) -> bool:
    """No address but in plain links, and nothing that could fetch."""
    page = Page(text)
    fetching = {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    assert not fetching & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name, value in attributes.items():
            if name in ("src", "srcset", "data", "poster", "xlink:href", "background", "action"):
                assert value.startswith("data:image/png;base64,")
            if name == "href":
                assert tag == "a"
            assert name == "href" or "//" not in (value or "") or value.startswith("data:image/png")
    css = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in css
    assert "@import" not in css
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    return True


@pytest.fixture(scope="module")
def reference() -> DDPMPipeline:
    return DDPMPipeline(make_unet(), DDIMScheduler())


@pytest.fixture(scope="module")
def measured(reference, _packed, packed_dir) -> Report:
    steps = []
    data = collect_report(
        copy.deepcopy(_packed),
        reference,
        folder=Path(packed_dir),
        on_progress=lambda *_, stage: steps.append(stage),
        **RUN,
    )
    assert steps == 3 * ["comparing"] + 3 * ["layers"]
    return data


def test_data_are_what_the_other_verbs_measure(measured, reference, packed_pipe, packed_dir):
    run = {"num_inference_steps": 3, "seed": 0}
    assert measured.comparison == compare_pipelines(reference, packed_pipe, num_samples=4, **run)
    ratios = layer_snr(reference, packed_pipe, num_samples=2, **run)
    rows = {layer["name"]: layer for layer in measured.layers}
    assert {name: row["snr_db"] for name, row in rows.items()} == {n: r.snr_db for n, r in ratios.items()}
    assert all(rows[name]["snr_db_by_timestep"] == ratio.by_timestep for name, ratio in ratios.items())
    for layer in cli.inspect(packed_dir).components["unet"].layers:
        for key in ("weight_format", "input_format", "engine"):
            assert rows[layer.name][key] == getattr(layer, key)
    names = list(rows)
    assert names.index("mid_block.resnets.0.conv1") < names.index("up_blocks.0.resnets.0.conv1")  # as they run
    assert measured.missing == {"speed": "Not measured, as asked for."}
    assert json.loads(json.dumps(measured.to_dict())) == measured.to_dict()


def test_histograms_count_inputs_and_carry_the_grid(measured, packed_pipe):
    rows = {layer["name"]: layer for layer in measured.layers}
    for name, layer in quant_layers(packed_pipe.unet):
        seen = rows[name]["input"]
        low, high = seen["bins"]
        assert sum(seen["counts"]) > 0
        if layer.input_format is None:
            assert seen["levels"] == []
            continue
        (levels,) = seen["levels"]
        assert levels == sorted(levels)
        assert len(levels) == len(layer.input_format.grid)
        x = layer.quantize_input(torch.linspace(2 * low, 2 * high, 500))
        nearest = (x[:, None] - torch.tensor(levels)).abs().min(1).values
        assert nearest.max() < 1e-5 * (high - low)
        assert x.min().item() == pytest.approx(levels[0])
        assert x.max().item() == pytest.approx(levels[-1])
    some = rows["conv_in"]["input"]
    assert some["range"][0] <= some["bins"][0] < some["bins"][1] <= some["range"][1]


def test_the_page_says_what_the_data_say(measured):
    page = page_of(measured)
    loads_nothing(rendered(measured.to_dict()))
    comparison = measured.comparison
    assert f"{comparison.eps_rel_l2:.4f}" in page.text
    assert f"{comparison.image_psnr_db:.1f} dB" in page.text
    assert "1.00 MB" in page.text
    assert "3.5 × smaller" in page.text
    cells = [a for a in page.all("td") if a.get("class", "").startswith("h")]
    changed = [layer for layer in measured.layers if not layer["unchanged"]]
    assert len(cells) == 3 * len(changed)
    told = sorted(cell["title"] for cell in cells)
    assert told == sorted(f"t = {t}: {r:.1f} dB" for row in changed for t, r in row["snr_db_by_timestep"].items())
    assert sum(a.get("class") == "histogram" for a in page.all("svg")) == len(measured.layers)
    assert len(page.all("circle")) == 3
    assert len(page.all("img")) == 3 * 4
    worst = min(changed, key=lambda layer: layer["snr_db"])
    assert f"{worst['snr_db']:.1f} dB {worst['name']}" in page.text
    assert "diffusers-msfp quantize float --scheme w4a4 --out packed" in page.text
    assert 'import diffusers, diffusers_msfp pipe = diffusers.DiffusionPipeline.from_pretrained("packed")' in page.text
    anchors = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert anchors <= {attributes.get("id") for _, attributes in page.elements}
    assert {"pictures", "error", "layers", "worst", "formats", "speed"} <= anchors
    assert "scheme_overrides" not in page.text  # the scheme has 8 bits for sums of residuals


def test_narrow_sums_of_residuals_get_advice(measured):
    data = copy.deepcopy(measured.to_dict())
    for layer in data["layers"]:
        assert layer["advice"] is None, layer["name"]
        if "conv_shortcut" in layer["name"]:
            layer |= {"input_format": "fp4_e2m1", "snr_db": -1.0}
            layer["advice"] = advice(layer)
    page = Page(rendered(data))
    assert '"conv_shortcut": "w4a8"' in page.text.partition("scheme_overrides=")[2][:60]
    assert "reads a sum of residuals: 8-bit input, see below" in page.text


def test_hostile_names_stay_text(measured):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
    data = copy.deepcopy(measured.to_dict())
    data["config"] |= {"scheme": evil, "scheme_overrides": {evil: evil}}
    data["model"] = data["origin"]["processor"] = data["dtype"] = evil
    for layer in data["layers"][:3]:
        layer["name"], layer["block"], layer["engine_refusals"] = evil + layer["name"], evil, {evil: evil}
    data["missing"]["speed"] = evil
    data["adapters"] = {"placement": evil, "num_adapters": 2, "intervals": [[(0, 499, 1), (500, 999, 0)]]}
    for changes in ({}, {"config": {evil: evil}, "method": evil}):
        text = rendered(data, **{"name": evil, "reference": evil} | changes)
        loads_nothing(text)
        assert "alert(1)" in Page(text).text
        assert all(a["src"].startswith("data:image/png;base64,") for a in Page(text).all("img"))
        assert "49" not in text.partition("<title>")[2].partition("</title>")[0]


def test_without_a_reference(packed_pipe, packed_dir):
    data = collect_report(packed_pipe, folder=Path(packed_dir), **RUN)
    assert set(data.missing) == {"comparison", "snr", "speed"}
    page = page_of(data, reference=None, bytes_reference=None)
    assert len(page.all("img")) == 4
    assert "Not here: error over timesteps, every layer over timesteps. It needs" in page.text
    anchors = {a["href"] for a in page.all("a") if a["href"].startswith("#")}
    assert anchors == {"#pictures", "#formats", "#speed", "#method"}
    assert sum(a.get("class") == "histogram" for a in page.all("svg")) == len(data.layers) > 20
    assert all(layer.engine is not None for _, layer in quant_layers(packed_pipe.unet))  # as before
    same = layer_inputs(data)
    set_engine(packed_pipe, "reference")
    assert layer_inputs(collect_report(packed_pipe, folder=Path(packed_dir), **RUN)) == same


def layer_inputs(data: Report) -> dict:
    return {layer["name"]: layer["input"]["counts"] for layer in data.layers}


def test_a_denoiser_alone(reference, packed_dir):
    unet = UNet2DModel.from_pretrained(Path(packed_dir) / "unet")
    alone = collect_report(unet, folder=Path(packed_dir) / "unet", **RUN | {"with_speed": True})
    assert set(alone.missing) == {"comparison", "snr", "pictures", "inputs"}
    assert set(alone.speed) == {"quantized", "bf16:cl"}
    page = page_of(alone, reference=None, bytes_reference=None, name="unet")
    assert 'model = diffusers.UNet2DModel.from_pretrained("unet")' in page.text
    assert f"{1e3 * alone.speed['quantized']['seconds']:.1f} ms" in page.text
    beside = collect_report(unet, reference, folder=Path(packed_dir) / "unet", **RUN)
    assert beside.comparison.eps_rel_l2 > 0
    assert beside.layers[0]["weight_format"]
    with pytest.raises(ConfigError, match="of the class of the reference's, UNet2DModel, but got UNet2DCondition"):
        collect_report(make_condition_unet(), reference, **RUN)


@pytest.fixture
def foreign(reference) -> DDPMPipeline:
    """Quantized by someone else: weights rounded in place, one layer untouched by them."""
    pipe = copy.deepcopy(reference)
    for name, module in pipe.unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "conv_in":
            module.weight.data = (module.weight.data * 16).round() / 16
    return pipe


def test_other_packages_models(reference, foreign):
    data = collect_report(foreign, reference, **RUN)
    rows = {layer["name"]: layer for layer in data.layers}
    assert rows["conv_in"]["unchanged"]
    assert rows["time_embedding.linear_1"]["unchanged"]
    assert not rows["conv_out"]["unchanged"]
    page = page_of(data)
    assert data.missing["formats"] in page.text
    assert f"{sum(row['unchanged'] for row in rows.values())} layers compute what the original's do" in page.text
    assert "diffusers-msfp quantize" not in page.text
    half = copy.deepcopy(reference).to(torch.bfloat16)
    data = collect_report(half, reference, **RUN)
    assert data.dtype == "bfloat16"
    assert all(30 < layer["snr_db"] < 100 for layer in data.layers)
    assert 'from_pretrained("packed", dtype=torch.bfloat16)' in page_of(data).text
    equal = page_of(collect_report(copy.deepcopy(reference), reference, **RUN))
    assert "layers compute what the original's do" in equal.text
    assert "What hurts most" not in equal.text


def test_adapters_have_grids_of_their_own_and_a_strip(reference, tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "v1-side"
    model = UNet2DModel.from_pretrained(golden)
    data = collect_report(model, folder=golden, **RUN)
    assert data.adapters["num_adapters"] == 2
    page = page_of(data, reference=None, bytes_reference=None)
    adapters = [a for a in page.all("rect") if a["class"].startswith("adapter")]
    assert len(adapters) == sum(map(len, data.adapters["intervals"]))
    assert "Then fine-tuned with 2 timestep-aware adapters per layer" in page.text


def test_parameter_sets_for_timesteps_have_grids_of_their_own(packed_pipe):
    layer = next(layer for _, layer in quant_layers(packed_pipe.unet) if layer.input_format is not None)
    scale, zero_point = layer.input_scale, layer.input_zero_point
    layer.store_input(torch.stack((scale, scale * 2)), torch.stack((zero_point, zero_point)))
    layer.route_by(FiniteSet(torch.tensor([0.0, 500.0])))
    assert len(input_levels(layer)) == 2


def test_a_transformer_with_labels_and_guidance():
    original = make_dit_pipe()
    pipe = quantize_pipeline(copy.deepcopy(original), "w4a4", num_samples=2, num_inference_steps=2)
    data = collect_report(pipe, original, **RUN | {"with_speed": True})
    assert data.component == "transformer"
    assert data.comparison.eps_rel_l2 > 0
    assert {layer["block"] for layer in data.layers} >= {"transformer_blocks.0", EDGE_BLOCK}
    assert set(data.speed) == {"quantized", "bf16:cl"}
    assert "attn1.to_q" in page_of(data).text


def test_a_pipeline_that_names_its_classes_beside_one_that_does_not(tmp_path):
    original = make_dit_pipe()
    original.labels = {}
    named = make_dit_pipe()
    named.labels = {"ship": 0, "dog": 1}
    quantize_pipeline(named, "w4a4", num_samples=2, num_inference_steps=2)
    named.save_pretrained(tmp_path)
    data = collect_report(named, original, folder=tmp_path, **RUN)
    assert data.component == "transformer"
    assert data.calibration_state == "frozen"


@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_the_engine_stays_what_it_was(packed_pipe, engine):
    set_engine(packed_pipe, engine, memory="low")
    collect_report(packed_pipe, **RUN)
    assert engine_set(packed_pipe.unet) == (engine, "low")
    assert all((layer.engine is None) == (engine == "reference") for _, layer in quant_layers(packed_pipe.unet))


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What the transformer's pipelines were called with."""
    seen, original = [], DiTPipeline.__call__

    def call(self, **arguments):
        seen.append(arguments)
        return original(self, **arguments)

    call.__signature__ = inspect.signature(original)
    monkeypatch.setattr(DiTPipeline, "__call__", call)
    return seen


@pytest.mark.parametrize("alone", [False, True])
def test_names_of_classes_stand_below_pictures(alone, calls):
    pipe = DiTPipeline(make_dit(), make_vae(), DDIMScheduler(), {"0": "ship, vessel", "1": "dog", "2": "frog"})
    quantized = quantize_pipeline(copy.deepcopy(pipe), "w4a4", num_samples=2, num_inference_steps=2)
    calls.clear()
    data = collect_report(quantized, None if alone else pipe, **RUN)
    drawn = [label for arguments in calls for label in arguments["class_labels"]][: RUN["num_samples"]]
    assert data.asked == [{0: "ship", 1: "dog", 2: "frog"}[label] for label in drawn]
    assert len(set(data.asked)) > 1
    assert data.asked[0] in page_of(data).text


@pytest.mark.parametrize("alone", [False, True])
def test_prompts_stand_below_pictures(alone):
    pipe = make_small_pipe()
    quantized = quantize_pipeline(copy.deepcopy(pipe), "w4a4", num_samples=2, num_inference_steps=2)
    prompts = ["a <b>ship</b>", "a dog", "a frog"]
    data = collect_report(quantized, None if alone else pipe, prompts=prompts, **RUN)
    assert data.asked == [*prompts, prompts[0]]
    assert "a <b>ship</b> a dog" not in rendered(data.to_dict())
    assert "a <b>ship</b>" in page_of(data).text
    with pytest.raises(ConfigError, match="`num_images_per_prompt` must be 1, but got 2. Leave it out and raise"):
        collect_report(quantized, None if alone else pipe, num_images_per_prompt=2, **RUN)


def test_nothing_was_asked(measured, packed_pipe):
    assert measured.asked == []
    assert collect_report(packed_pipe, sampler="euler", **RUN).asked == []


def test_an_observing_model_is_refused(reference):
    pipe = copy.deepcopy(reference)
    convert(pipe.unet, Conversion.plan(pipe.unet, "w4a4"))
    with pytest.raises(StateError, match="still observes its ranges"):
        collect_report(pipe, reference, **RUN)


def test_small_parts():
    assert block_of("up_blocks.1.resnets.0.conv1") == "up_blocks.1"
    assert block_of("mid_block.resnets.0.conv1") == "mid_block"
    assert {block_of(n) for n in ("conv_in", "time_embedding.linear_1", "time_text_embed.a.b")} == {EDGE_BLOCK}
    layer = {"name": "down_blocks.0.downsamplers.0.conv", "input_format": "fp4_e2m1", "weight_format": "fp6_e2m3"}
    assert advice(layer) == {"samplers": "w8a8"}
    assert advice(layer | {"weight_format": "fp4_e2m1"}) == {"samplers": "w4a8"}
    assert advice(layer | {"input_format": "fp8_e2m5"}) is None
    assert advice(layer | {"name": "conv_in"}) is None
    assert plots.shade_range([11.0, 12.0, 33.0]) == (10, 35)
    assert plots.shade_range([]) == (0, 5)
    assert [plots.shade(ratio, (10, 42)) for ratio in (-100, 10, 12.5, 41.9, 100)] == [0, 0, 1, 15, 15]
    assert "cannot be seen" in psnr_meaning(41)
    assert psnr_meaning(29) == "details differ"
    drawn = Page(str(plots.error_curve({"100": 0.1, "0": 1.0, "50": 0.0})))
    assert [dot["cx"] for dot in drawn.all("circle")] == ["52.0", "508.0"]  # noise on the left
    assert "100 %" in drawn.text
    assert plots.error_curve({"1": 0.0}) == ""


def program(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["diffusers-msfp", "report", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    shown = capsys.readouterr()
    return code, shown.out, shown.err


FAST = ("--num-samples", 2, "--num-inference-steps", 2, "--no-speed")


def test_the_program_writes_a_page(tiny_dir, packed_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "report.html"
    command = (packed_dir, "--reference", tiny_dir, "--out", out, *FAST)
    code, told, _ = program(monkeypatch, capsys, *command, "--json")
    assert code == 0
    data = json.loads(told)
    text = out.read_text(encoding="utf-8")
    loads_nothing(text)
    assert f"{data['comparison']['eps_rel_l2']:.4f}" in Page(text).text
    assert data["bytes_quantized"] == (Path(packed_dir) / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert data["bytes_reference"] > 3 * data["bytes_quantized"]
    assert str(Path(packed_dir).parent) not in text
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    out.write_text("mine")
    code, _, error = program(monkeypatch, capsys, *command)
    assert code == 2
    assert "must not exist yet" in error
    assert out.read_text() == "mine"
    code, told, _ = program(monkeypatch, capsys, packed_dir, "--out", out, "--overwrite", *FAST)
    assert code == 0
    assert "left out: comparison: It needs the full-precision original" in told
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{packed}", "--out", "{out}.txt"], "`out` must end in .html"),
        (["{packed}", "--out", "{out}.html", "--dtype", "int8"], "`dtype` must be one of float32, bfloat16, float16"),
        (["{packed}", "--out", "{out}.html", "--reference", "{tiny}/unet"], "must hold model_index.json"),
        (["{out}", "--out", "{out}.html"], "must be a folder, a file or a Hub id"),
        (["{broken}", "--out", "{out}.html"], "cannot be loaded"),
        (["{other}", "--out", "{out}.html"], "is quantized by `sdnq`, which is not installed: `pip install sdnq`"),
    ],
)
def test_bad_input_gives_one_line_and_no_page(arguments, reason, tiny_dir, packed_dir, tmp_path, monkeypatch, capsys):
    broken, other = tmp_path / "broken", tmp_path / "other"
    shutil.copytree(Path(tiny_dir) / "unet", broken)
    (broken / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(Path(tiny_dir) / "unet", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "sdnq"}}))
    monkeypatch.setitem(sys.modules, "sdnq", None)
    names = {"packed": packed_dir, "tiny": tiny_dir, "out": tmp_path / "out", "broken": broken, "other": other}
    code, told, error = program(monkeypatch, capsys, *[a.format(**names) for a in arguments])
    assert code == 2
    assert told == ""
    assert re.search(re.escape(reason), " ".join(error.split())), error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_parts_of_a_split_layer_share_its_error(tiny_pipe, packed_pipe):
    split_shortcuts(packed_pipe, tiny_pipe, SplitConfig(num_samples=1, num_inference_steps=2))
    rows = {row["name"]: row for row in collect_report(packed_pipe, tiny_pipe, **RUN).layers}
    assert set(rows) == {name for name, _ in quant_layers(packed_pipe.unet)}
    first, second = (rows[f"up_blocks.0.resnets.0.conv_shortcut.{part}"] for part in (0, 1))
    assert first["snr_db"] == second["snr_db"] is not None
    assert sum(first["input"]["counts"]) > 0
    alone = {row["name"]: row for row in collect_report(packed_pipe, **RUN).layers}
    assert alone.keys() == rows.keys()
    assert sum(alone[first["name"]]["input"]["counts"]) > 0
    assert first["input"]["levels"] != second["input"]["levels"]


@pytest.mark.browser
def test_a_browser_shows_it_without_complaint(measured, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(rendered(measured.to_dict()), encoding="utf-8")
    command = [
        shutil.which("chromium"),
        "--headless",
        "--no-sandbox",
        "--enable-logging=stderr",
        "--dump-dom",
        f"file://{file}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert len(Page(done.stdout).all("img")) == 12
