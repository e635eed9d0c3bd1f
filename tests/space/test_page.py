"""The page without a browser: what its button yields, what it shows, what a Space's folder holds, what is refused."""

import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import yaml
from conftest import make_dit, make_dit_pipe, make_vae
from diffusers import DDIMScheduler, DiTPipeline
from gradio_client import Client
from huggingface_hub import ModelCard
from PIL import Image
from pipelines import make_small_pipe, make_small_wan

from diffusers_msfp import FinetuneConfig, cli, finetune
from diffusers_msfp.cli.app import main
from diffusers_msfp.cli.shared.load import SourceError
from diffusers_msfp.cli.space import base_of, open_page
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.space import Candidate, build_page, launch, markup, page
from diffusers_msfp.space.show import Show
from diffusers_msfp.space.writer import GRADIO


@pytest.fixture
def adapted(packed_pipe, tiny_pipe) -> Candidate:
    finetune(packed_pipe, tiny_pipe, FinetuneConfig(train_steps=1, num_inference_steps=3, batch_size=2, rank=2))
    return Candidate(packed_pipe)


def components(built: gr.Blocks, kind: type) -> dict:
    """Those of a kind by label."""
    return {block.label: block for block in built.blocks.values() if type(block) is kind}


def test_a_run_is_shown_until_its_result(adapted, tiny_pipe, monkeypatch):
    monkeypatch.setattr("diffusers_msfp.space.show.SECONDS_BETWEEN_PICTURES", 0)
    show = Show([Candidate(tiny_pipe), adapted])
    frames = list(show.frames([], "DDIM", 4, {"seed": 7}))
    assert len(frames) == 4
    for index, frame in enumerate(frames[:-1]):
        assert f"Step {index + 1} of 4" in frame.progress
        assert re.search(r"adapter [01]\b", frame.progress)
        assert frame.strip.count('class="tick"') == index + 1
        assert [picture.size for picture in frame.pictures] == [(512, 512)] * 2
        assert frame.figures is None
        assert frame.history == []
    end = frames[-1]
    assert "Done: 4 steps" in end.progress
    assert re.search(r"agree to \d+\.\d dB PSNR", end.progress)
    assert re.findall(r'<th scope="col">(\w+)</th>', end.figures) == ["float32", "w4a4"]
    assert len(re.findall(r"[\d.]+ ms", end.figures)) == 2
    assert [caption for _, caption in end.history] == ["seed 7 · DDIM, 4 steps"]
    *_, again = show.frames(end.history, "UniPC", 2, {"seed": 8})
    assert [caption for _, caption in again.history] == ["seed 8 · UniPC, 2 steps", "seed 7 · DDIM, 4 steps"]
    assert len(end.history) == 1


@pytest.mark.parametrize(
    ("names", "wishes", "asked"),
    [
        ({"3": "dog, hound"}, {"class_label": 3}, "dog"),
        (None, {"class_label": 7}, "class 7"),
        ("text", {"prompt": "a fox " * 30}, " ".join(["a fox"] * 9) + " a …"),
    ],
)
def test_results_say_what_was_asked(names, wishes, asked):
    pipe = make_small_pipe() if names == "text" else DiTPipeline(make_dit(), make_vae(), DDIMScheduler(), names)
    *_, end = Show([Candidate(pipe)]).frames([], "DDIM", 1, {"seed": 0} | wishes)
    assert [caption for _, caption in end.history] == [f"{asked} · seed 0 · DDIM, 1 steps"]


def test_one_alone_has_one_picture(packed_pipe):
    *_, end = Show([Candidate(packed_pipe)]).frames([], "DDIM", 2, {"seed": 0})
    assert end.pictures.size == (512, 512)
    assert end.strip == ""
    assert "less" not in end.figures
    assert "dB" not in end.progress


def test_first_frame(packed_pipe):
    show = Show([Candidate(packed_pipe)])
    assert show.first_frame().pictures.size == (512, 512)
    assert show.first_frame().history == []
    large = Show([Candidate(make_dit_pipe())]).first_frame()
    assert large.pictures is None
    assert "Generate" in large.progress


def test_unknown_scheduler(packed_pipe):
    with pytest.raises(ConfigError, match="must be one of DDIM, DPM-Solver\\+\\+, UniPC, but got 'Euler'"):
        next(Show([Candidate(packed_pipe)]).frames([], "Euler", 2, {"seed": 0}))


def test_pictures_are_enlarged_by_whole_pixels():
    picture = np.random.default_rng(0).random((32, 32, 1))
    shown = np.asarray(markup.enlarge(picture))
    assert shown.shape == (512, 512, 3)
    assert np.array_equal(shown[::16, ::16, 0], (picture[..., 0] * 255).round().astype(np.uint8))
    assert np.array_equal(shown, shown[::16, ::16].repeat(16, 0).repeat(16, 1))
    assert markup.enlarge(np.zeros((600, 700, 3))).size == (700, 600)
    assert markup.beside([picture, picture]).size == (256 + 4 + 256, 256)


def test_adapter_strip():
    intervals = [(0, 249, 1), (250, 999, 0)]
    assert [markup.adapter_at(intervals, t) for t in (-0.4, 249, 250, 999, 1000)] == [1, 1, 0, 0, 0]
    strip = markup.adapter_strip([intervals], [900, 100])
    assert 'aria-label="adapter 0 for timesteps 999 to 250, adapter 1 for timesteps 249 to 0"' in strip
    assert re.findall(r'<rect x="([\d.]+)" y="6" width="([\d.]+)"', strip) == [("750.00", "250.00"), ("0.00", "750.00")]
    assert re.findall(r'x="([\d.]+)"[^>]*class="now"', strip) == ["896.50"]
    assert re.search(r'class="active"><i [^>]*></i>adapter 1<', strip)
    assert markup.adapter_strip([intervals, intervals]).count("<svg") == 2


def test_figures():
    table = markup.figures_table([("<b>", 4e6, 5e6, 0.02), ("w4a4", 1e6, 10e6, None)])
    assert "&lt;b&gt;" in table
    assert re.findall(r"<td>([^<]+)</td>", table) == [
        *("4 MB", "1 MB", "4.0× less"),
        *("5 MB", "10 MB", "2.0× more"),
        *("20 ms", "–", "–"),
    ]
    assert "equal" in markup.figures_table([("a", 1, 1, 1), ("a", 1, 1, 1)])


def test_the_page_has_only_what_the_pipeline_takes(packed_pipe, tiny_pipe):
    plain = build_page("Tiny", Candidate(packed_pipe), Candidate(tiny_pipe))
    assert set(components(plain, gr.Slider)) == {"Steps", "Line between the two"}
    assert set(components(plain, gr.Dropdown)) == {"Scheduler"}
    assert not components(plain, gr.Textbox)
    assert len(components(plain, gr.ImageSlider)) == 1
    by_class = build_page("Classes", Candidate(make_dit_pipe()))
    assert set(components(by_class, gr.Slider)) == {"Steps", "Guidance"}
    assert set(components(by_class, gr.Dropdown)) == {"Class", "Scheduler"}
    assert not components(by_class, gr.ImageSlider)
    assert list(components(by_class, gr.Image)) == ["float32"]


def test_served_and_called(packed_dir, tiny_dir, tmp_path):
    served = open_page(packed_dir, reference=tiny_dir)
    try:
        client = Client(launch(served), verbose=False, download_files=str(tmp_path))
        job = client.submit("DDIM", 3, 5, api_name="/generate")
        left, right = (np.asarray(Image.open(file)) for file in job.result(timeout=60)[0])
        assert left.shape == right.shape == (512, 512, 3)
        assert not np.array_equal(left, right)
        assert "Done: 3 steps" in job.outputs()[-1][1]
        port = int(served.local_url.rstrip("/").rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"needs a free port, but {port} is in use. Choose another: `--port N`"):
            launch(build_page("Second", Candidate(make_dit_pipe())), port)
    finally:
        served.close(verbose=False)


def test_the_embedded_model_is_the_default():
    built = open_page()
    assert built.title == "Fashion-MNIST in four bits"
    assert len(components(built, gr.ImageSlider)) == 1
    with pytest.raises(SourceError, match="nothing-here"):
        open_page(reference="nothing-here")


def test_a_space_holds_nothing_of_this_machine(packed_dir, tmp_path):
    source = tmp_path / "mine"
    shutil.copytree(packed_dir, source)
    config = json.loads((source / "unet" / "config.json").read_text())
    (source / "unet" / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/unet"}))
    (source / ".git").mkdir()
    (source / ".git" / "secret").touch()
    (source / ".env").write_text("TOKEN=1")
    made = cli.space_create(str(source), tmp_path / "space")
    assert not [name for name in made.files if "/." in name]
    assert b"somebody" not in b"".join((tmp_path / "space" / name).read_bytes() for name in made.files)
    stored = json.loads((tmp_path / "space" / "model" / "unet" / "config.json").read_text())
    assert stored["quantization_config"] == config["quantization_config"]


def test_reference_from_the_model_card(packed_dir, tiny_dir, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.symlink_to(packed_dir)
    assert base_of(str(folder)) is None
    assert not components(open_page(str(folder)), gr.ImageSlider)
    assert "does not say what it was made from" in capsys.readouterr().err
    folder.unlink()
    shutil.copytree(packed_dir, folder)
    for base, shown in ((tiny_dir, 1), (f"[{tiny_dir}]", 1), ("nobody/nothing", 0)):
        (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
        assert len(components(open_page(str(folder)), gr.ImageSlider)) == shown
    assert "No full precision beside it: nobody/nothing cannot be loaded" in capsys.readouterr().err


def test_zero_gpu_decorates_the_run(packed_pipe, monkeypatch):
    """A stand-in for the module `spaces`, which is at hand on Spaces only."""

    class Spaces:
        decorated = []

        @classmethod
        def GPU(cls, function):  # noqa: N802
            cls.decorated.append(function.__name__)
            return function

    monkeypatch.setattr("diffusers_msfp.space.show.zero_gpu", Spaces)
    show = Show([Candidate(packed_pipe)])
    assert Spaces.decorated == ["steps"]
    assert show.first_frame().pictures is None
    assert len(list(show.frames([], "DDIM", 2, {"seed": 0}))) >= 1


def test_create(packed_dir, tiny_dir, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "space"
    result = cli.space_create(packed_dir, out, reference=tiny_dir, title='Say "4 bits"')
    assert {"app.py", "README.md", "requirements.txt", "model/model_index.json"} <= set(result.files)
    assert result.bytes == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert [p.name for p in out.parent.iterdir()] == ["space"]
    header = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert header["title"] == 'Say "4 bits"'
    assert (header["sdk"], header["sdk_version"], header["app_file"]) == ("gradio", GRADIO, "app.py")
    assert "license" not in header
    assert "models" not in header
    assert (out / "requirements.txt").read_text() == "diffusers-msfp[cpu,space]\n"
    asked = {}
    monkeypatch.setattr(cli, "space_run", lambda source, **more: asked.update(source=source, **more))
    runpy.run_path(str(out / "app.py"))
    assert asked == {"source": "model", "reference": "reference", "title": 'Say "4 bits"'}
    with pytest.raises(ConfigError, match="must not exist yet"):
        cli.space_create(packed_dir, out)
    again = cli.space_create("someone/model-w4a4", out, reference="someone/model", overwrite=True)
    assert again.files == ["README.md", "app.py", "requirements.txt"]
    header = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert header["models"] == ["someone/model-w4a4", "someone/model"]
    assert header["title"] == again.title == "model-w4a4"
    with pytest.raises(ConfigError, match="`--overwrite` replaces Spaces only"):
        cli.space_create("someone/model", packed_dir, overwrite=True)


def test_the_tested_gradio_is_one_that_the_extra_allows():
    extra = re.search(r'space = \["gradio>=(\d+),<(\d+)"\]', Path("pyproject.toml").read_text())
    assert int(extra[1]) <= int(GRADIO.split(".")[0]) < int(extra[2])


BAD = {
    "float": (["run", "{tiny}"], "must be quantized, but it is not: run `diffusers-msfp quantize` first"),
    "no pipeline": (["run", "{tiny}/unet"], "must hold model_index.json"),
    "nowhere": (["run", "nowhere"], "must be a folder, a file or a Hub id"),
    "bad reference": (["run", "{packed}", "--reference", "nowhere"], "must be a folder, a file or a Hub id"),
    "other reference": (["run", "{packed}", "--reference", "{embedded}"], "with 3 channels at 8"),
    "bad port": (["run", "--port", "0"], "greater than or equal to 1"),
    "create of float": (["create", "{tiny}", "--out", "{out}"], "must be quantized"),
    "create of nothing": (["create", "nowhere", "--out", "{out}"], "must be a folder or a Hub id like `user/model`"),
    "create beside nothing": (["create", "{packed}", "--out", "{out}", "--reference", "x"], "x must be a folder or a"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_line(arguments, reason, tiny_dir, packed_dir, tmp_path, monkeypatch, capfd):
    names = {"tiny": tiny_dir, "packed": packed_dir, "out": tmp_path / "out", "embedded": cli.space.EMBEDDED_MODEL}
    monkeypatch.setattr(sys, "argv", ["diffusers-msfp", "space", *[a.format(**names) for a in arguments]])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capfd.readouterr()
    assert stopped.value.code == 2
    assert shown.out == ""
    assert re.search(reason, " ".join(shown.err.split())), shown.err
    assert not (tmp_path / "out").exists()


def test_without_gradio(monkeypatch, packed_dir):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r'needs Gradio, but .*: `pip install "diffusers-msfp\[space\]"`'):
        page.require_gradio()
    with pytest.raises(ConfigError, match="needs Gradio"):
        cli.space_run(packed_dir)


def test_run_says_where(packed_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusers_msfp", "space", "run", packed_dir, "--port", str(port), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert json.loads(process.stdout.readline()) == {"address": f"http://127.0.0.1:{port}/"}
        finally:
            process.terminate()


@pytest.mark.parametrize("said_by", ["model", "reference"])
def test_a_space_has_the_licence_of_its_model(said_by, packed_dir, tiny_dir, tmp_path, capsys):
    places = {"model": packed_dir, "reference": tiny_dir}
    own = Path(shutil.copytree(places[said_by], tmp_path / "own"))
    (own / "README.md").write_text("---\nlicense: other\nlicense_name: special\nlicense_link: LICENSE\n---\n# Own\n")
    places[said_by] = str(own)
    cli.space_create(places["model"], tmp_path / "space", reference=places["reference"])
    data = ModelCard.load(tmp_path / "space" / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "special", f"{said_by}/LICENSE")
    assert "licence" not in capsys.readouterr().err
    cli.space_create(packed_dir, tmp_path / "without")
    assert ModelCard.load(tmp_path / "without" / "README.md").data.license is None
    assert "The model's licence is not known, so the Space names none" in capsys.readouterr().err


def test_pipelines_that_find_their_own_guidance():
    class Guided(type(make_small_pipe())):
        def __call__(self, prompt=None, guidance_scale=None, **others):
            return super().__call__(prompt, guidance_scale=guidance_scale or 1.0, **others)

    pipe = Guided(**make_small_pipe().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    candidate = Candidate(pipe)
    assert candidate.guidance_scale is None
    *_, end = Show([candidate]).frames([], "DDIM", 1, {"seed": 0, "prompt": "a hat"})
    assert end.pictures is not None


def test_videos_are_refused():
    with pytest.raises(ConfigError, match="WanPipeline puts out a WanPipelineOutput, which holds none"):
        Candidate(make_small_wan())
