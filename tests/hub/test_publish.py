"""`publish` to a Hub on loopback, by the real client: what arrives, what is refused, what a failure leaves behind."""

import hashlib
import json
import shutil
from pathlib import Path

import hub_server
import huggingface_hub
import pipelines
import pytest
import torch
from conftest import ONE_BLOCK, equal_state, make_unet
from diffusers import DiffusionPipeline
from hub_server import WEIGHTS, Hub, rehearse, send
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffusers_msfp import MSFPConfig, cli, publish, quantize_pipeline
from diffusers_msfp.errors import CheckpointError, ConfigError, HubError, MSFPError
from diffusers_msfp.hub.layout import components, pipeline_index
from diffusers_msfp.plugin.quantize import quantize_model

hub, online = hub_server.hub, hub_server.online


@pytest.fixture
def folder(packed_dir, tmp_path) -> Path:
    """A checkpoint of one's own."""
    return Path(shutil.copytree(packed_dir, tmp_path / "packed"))


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def download(server: Hub, into: Path, **arguments) -> Path:
    return Path(huggingface_hub.snapshot_download("user/tiny", endpoint=server.url, cache_dir=into, **arguments))


def as_the_hub(server: Hub, monkeypatch) -> None:
    """For those who do not ask for another endpoint."""
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_published_loads_bit_for_bit(hub, folder, packed_pipe, tmp_path):
    before = digests(folder)
    report = send(hub, folder)
    assert digests(folder) == before
    assert set(report.files) == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "preview.png",
        "results/checkpoint.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS,
    }
    assert report.url.endswith(report.commit)
    there = download(hub, tmp_path / "cache")
    assert digests(there)[WEIGHTS] == before[WEIGHTS]
    assert equal_state(DiffusionPipeline.from_pretrained(there).unet, packed_pipe.unet)
    again = send(hub, folder)
    assert again.commit == report.commit, "nothing has changed, so nothing is committed"


def test_licence_and_task_come_from_the_base(hub, folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["_name_or_path"] = "/home/somebody/.cache/models--org--base/snapshots/0123/unet"
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    report = send(hub, folder, license=None, base_model=None)
    assert (report.base_model, report.license) == ("org/base", "openrail++")
    card = ModelCard(hub.files("user/tiny")["README.md"].decode())
    assert card.data.base_model == "org/base"
    assert card.data.pipeline_tag == "text-to-image"
    assert b"somebody" not in b"".join(hub.files("user/tiny").values()), "paths of this machine stay here"


def test_an_own_licence_replaces_the_base_s(hub, folder):
    hub.add("org/base", {"README.md": b"---\nlicense: other\nlicense_name: special\nlicense_link: LICENSE\n---\n"})
    send(hub, folder, license=None)
    data = ModelCard(hub.files("user/tiny")["README.md"].decode()).data
    assert (data.license_name, data.license_link) == ("special", "https://huggingface.co/org/base/blob/main/LICENSE")
    send(hub, folder, license="mit")
    assert ModelCard(hub.files("user/tiny")["README.md"].decode()).data.get("license_name") is None


@pytest.mark.parametrize("says_its_base", [True, False])
def test_the_base_of_what_was_made_from_a_quantized_one_is_the_float_model(hub, folder, says_its_base):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_name_or_path": "user/quantized"}))
    base = "base_model: org/base\nbase_model_relation: quantized\n" if says_its_base else ""
    hub.add("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.add("user/quantized", {"README.md": b"---\nlicense: mit\ntags: [msfp]\nbase_model: user/older\n---\n"})
    hub.add("user/older", {"README.md": f"---\nlicense: mit\ntags: [msfp]\n{base}---\n".encode()})
    if says_its_base:
        assert send(hub, folder, license=None, base_model=None).base_model == "org/base"
    else:
        with pytest.raises(ConfigError, match="must name the model that was quantized"):
            send(hub, folder, license="mit", base_model=None)


def test_an_older_version_leaves_nothing_behind_that_would_be_loaded(hub, folder, packed_pipe, tmp_path):
    sharded = tmp_path / "sharded"
    packed_pipe.save_pretrained(sharded, max_shard_size="20KB")
    send(hub, sharded)
    hub.add("user/tiny", hub.files("user/tiny") | {"notes.txt": b"mine"})
    report = send(hub, folder)
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in report.removed
    there = hub.files("user/tiny")
    assert [p for p in there if p.endswith(".safetensors")] == [WEIGHTS]
    assert there["notes.txt"] == b"mine"


def test_revisions_and_pull_requests_leave_main_alone(hub, folder):
    hub.add("user/tiny", {"a.txt": b"a"})
    report = send(hub, folder, revision="w4")
    assert 'revision="w4"' in report.snippet
    assert 'revision="w4"' in hub.files("user/tiny", "w4")["README.md"].decode()
    report = send(hub, folder, create_pr=True)
    assert report.url.endswith("/discussions/1")
    assert WEIGHTS in hub.files("user/tiny", "refs/pr/1")
    assert list(hub.files("user/tiny")) == ["a.txt"]
    with pytest.raises(ConfigError, match="A pull request goes to main, but got `revision='w4'`"):
        send(hub, folder, create_pr=True, revision="w4")


def test_private(hub, folder):
    send(hub, folder, private=True)
    assert hub.repos["user/tiny"].private
    hub.add("user/open", {"a.txt": b"a"})
    with pytest.raises(ConfigError, match="user/open exists and is public"):
        send(hub, folder, repo="user/open", private=True)
    assert list(hub.files("user/open")) == ["a.txt"]


def test_figures_of_another_checkpoint_are_refused(folder, tiny_dir, tmp_path):
    other = tmp_path / "other"
    quantize_pipeline(DiffusionPipeline.from_pretrained(tiny_dir), "w8a8", num_samples=1).save_pretrained(other)
    few = {"num_samples": 1, "num_inference_steps": 2}
    for measured, message in ((other, "must be of the checkpoint"), (folder, "")):
        found = cli.compare(tiny_dir, str(measured), **few).to_dict()
        file = tmp_path / "comparison.json"
        file.write_text(json.dumps(found))
        if message:
            with pytest.raises(ConfigError, match=message):
                rehearse(folder, tmp_path / "dry", results=[file])
        else:
            rehearse(folder, tmp_path / "dry", results=[file])
    assert {cli.bench(str(folder), ["msfp"], repeats=2).checkpoint} == {found["checkpoint"]}


def test_a_dry_run_leaves_the_checkpoint_alone(folder, tmp_path, monkeypatch):
    for name in ("README.md", "pipeline.py"):
        (folder / name).touch()  # as in one that was downloaded
    before = digests(folder)
    monkeypatch.chdir(folder)
    arguments = {"license": "mit", "base_model": "org/base", "num_samples": 1, "num_inference_steps": 1}
    for out in (folder, folder / "dry", folder.parent):
        with pytest.raises(ConfigError, match="must be (new|written beside)"):
            publish(".", "user/tiny", dry_run=out, **arguments)
    made = publish(".", "user/tiny", dry_run=True, **arguments)
    assert made.out == str(folder.with_name(f"{folder.name}-publish"))
    assert digests(folder) == before


def test_a_dry_run_writes_what_would_be_uploaded_and_needs_no_hub(folder, tmp_path):
    report = rehearse(folder, tmp_path / "out")
    assert digests(tmp_path / "out").keys() == report.files.keys()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", custom_pipeline="pipeline", trust_remote_code=True)
    assert pipe.quantization_report()["unet"]["scheme"] == "w4a4"
    assert json.loads(pipe.to_json_string())["_class_name"] == "DDPMPipeline"
    again = rehearse(folder, tmp_path / "out")
    assert again.files.keys() == report.files.keys()
    with pytest.raises(ConfigError, match="must be new or hold an earlier dry run, but it holds something else"):
        rehearse(folder, tmp_path)
    (tmp_path / "out" / ".git").mkdir()
    with pytest.raises(ConfigError, match="is a git repository, whose history would go too"):
        rehearse(folder, tmp_path / "out")
    assert (tmp_path / "out" / ".git").is_dir()


def test_variants(hub, folder, packed_pipe, tmp_path):
    packed_pipe.save_pretrained(tmp_path / "variant", variant="w4")
    report = send(hub, tmp_path / "variant")
    assert report.snippet.endswith('"user/tiny", variant="w4")')
    there = download(hub, tmp_path / "cache")
    assert equal_state(DiffusionPipeline.from_pretrained(there, variant="w4").unet, packed_pipe.unet)


@pytest.mark.parametrize("sharded", [True, False])
def test_text_encoders_are_pushed_as_they_were_saved(hub, sharded, monkeypatch, tmp_path):
    as_the_hub(hub, monkeypatch)
    folder = tmp_path / "model"
    model = pipelines.make_clip()
    quantize_model(model, MSFPConfig("w4a16"))
    hub.add("user/text", {"README.md": hub_server.BASE_CARD})
    told = {"repo_id": "user/text", "push_to_hub": True, "token": hub_server.TOKEN}
    model.save_pretrained(folder)
    (folder / "mine.txt").write_text("no part of the model")
    model.save_pretrained(folder, variant="fp16", max_shard_size="10KB" if sharded else "1GB", **told)
    there = {name: data for name, data in hub.files("user/text").items() if name != ".gitattributes"}
    assert "README.md" in there
    here = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert there == {name: here[name] for name in here.keys() - {"mine.txt", "model.safetensors"}}
    assert (sum(name.endswith(".safetensors") for name in there) > 1) == sharded
    assert equal_state(type(model).from_pretrained(folder, variant="fp16"), model)


def test_denoisers_are_pushed_without_a_former_index(hub, monkeypatch, tmp_path):
    as_the_hub(hub, monkeypatch)
    folder = tmp_path / "model"
    unet = make_unet(**ONE_BLOCK)
    quantize_model(unet, MSFPConfig("w4a16"))
    unet.save_pretrained(folder, max_shard_size="10KB")
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", HfApi(endpoint=hub.url).upload_folder)
    monkeypatch.setattr("diffusers.models.modeling_utils.create_repo", HfApi(endpoint=hub.url).create_repo)
    hub.add("user/unet", {"README.md": hub_server.BASE_CARD})
    unet.save_pretrained(folder, push_to_hub=True, repo_id="user/unet", token=hub_server.TOKEN)
    there = {name for name in hub.files("user/unet") if not name.startswith((".", "README"))}
    assert there == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_arguments_by_their_places_are_those_of_the_text_encoder_s_own_method(tmp_path):
    model = pipelines.make_clip()
    quantize_model(model, MSFPConfig("w4a16"))
    model.save_pretrained(tmp_path, True, None, False, "5GB", "fp16")
    assert (tmp_path / "model.fp16.safetensors").is_file()
    assert equal_state(type(model).from_pretrained(tmp_path, variant="fp16"), model)


def test_on_the_command_line(folder):
    from diffusers_msfp.cli.app import app

    command = ["publish", str(folder), "--repo", "user/tiny", "--license", "mit", "--base-model", "org/base"]
    result = CliRunner().invoke(app, [*command, "--dry-run", "--num-samples", "1", "--num-inference-steps", "1"])
    assert result.exit_code == 0, result.output
    assert "8 files would be uploaded" in result.stdout
    assert 'from_pretrained("user/tiny")' in result.stdout
    assert "not measured: speed: mkdir -p DIR/results && diffusers-msfp bench" in result.stderr
    shutil.rmtree(f"{folder}-publish")
    result = CliRunner().invoke(
        app, [*command, "--dry-run", "--num-samples", "1", "--num-inference-steps", "1", "--json"]
    )
    assert json.loads(result.stdout)["repo"] == "user/tiny"


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_connection_that_drops_in_an_upload(hub, folder, packed_pipe, tmp_path):
    hub.add("user/tiny", {"a.txt": b"a"})
    hub.fail("PUT", "/lfs/", after=10_000, times=100)
    with pytest.raises(HubError, match="user/tiny must be reachable and writable, but: .*the same command goes on"):
        send(hub, folder)
    assert list(hub.files("user/tiny")) == ["a.txt"]
    hub.failures.clear()
    report = send(hub, folder)
    assert equal_state(DiffusionPipeline.from_pretrained(download(hub, tmp_path)).unet, packed_pipe.unet)
    assert report.commit == hub.repos["user/tiny"].refs["main"]


def test_what_was_sent_is_not_sent_again(hub, folder):
    hub.fail("POST", "/commit/", status=500, times=1)
    with pytest.raises(HubError, match="out of luck|500"):
        send(hub, folder)
    sent = [r for r in hub.requests if r.startswith("PUT")]
    assert sent
    send(hub, folder)
    assert [r for r in hub.requests if r.startswith("PUT")] == sent


def test_a_dropped_connection_and_rate_limits_are_waited_out(hub, folder):
    hub.fail("PUT", "/lfs/", after=100, times=1)
    hub.fail("POST", "/preupload/", status=429, times=2, headers={"Retry-After": "0"})
    send(hub, folder)
    assert WEIGHTS in hub.files("user/tiny")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("PUT", "/lfs/", 507), ("POST", "/api/repos/create", 403), ("POST", "/preupload/", 429), ("GET", "/tree/", 404)],
    ids=["full disk", "forbidden", "rate limit", "no tree"],
)
def test_refusals_of_the_hub_are_one_error(hub, folder, method, path, status):
    hub.fail(method, path, status=status, times=100)
    with pytest.raises(HubError, match=str(status)):
        send(hub, folder)
    assert WEIGHTS not in (hub.files("user/tiny") if "user/tiny" in hub.repos else {})


def test_a_wrong_token(hub, folder):
    with pytest.raises(HubError, match="401|Invalid"):
        send(hub, folder, token="hf_other")


def test_someone_else_s_commit_in_between_is_not_overwritten(hub, folder, monkeypatch):
    original = huggingface_hub.HfApi.preupload_lfs_files

    def meanwhile(self, *arguments, **named):
        original(self, *arguments, **named)
        hub.add("user/tiny", {"theirs.txt": b"theirs"})

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(HubError, match="A commit has happened since"):
        send(hub, folder)
    assert list(hub.files("user/tiny")) == ["theirs.txt"]


@pytest.mark.parametrize("place", [WEIGHTS, "unet/config.json", "README.md"])
def test_other_bytes_than_were_sent_are_noticed(hub, folder, place, monkeypatch):
    commit = huggingface_hub.HfApi.create_commit

    def corrupt(self, *arguments, **named):
        done = commit(self, *arguments, **named)
        files = hub.repos["user/tiny"].commits[done.oid]
        files[place] = bytes([files[place][0] ^ 1]) + files[place][1:]
        if place == WEIGHTS:
            hub.objects[hashlib.sha256(files[place]).hexdigest()] = files[place]
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", corrupt)
    with pytest.raises(HubError, match=f"{place} of user/tiny must hash to"):
        send(hub, folder)


def test_a_missing_file_is_noticed(hub, folder, monkeypatch):
    commit = huggingface_hub.HfApi.create_commit

    def lose(self, *arguments, **named):
        done = commit(self, *arguments, **named)
        del hub.repos["user/tiny"].commits[done.oid]["preview.png"]
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lose)
    with pytest.raises(HubError, match=r"preview.png of user/tiny must have \d+ bytes .* but it has nothing"):
        send(hub, folder)


def test_a_connection_that_drops_in_a_download(hub, folder, packed_pipe, tmp_path):
    send(hub, folder)
    hub.fail("GET", WEIGHTS, after=5000)  # the client goes on where it was
    hub.fail("GET", WEIGHTS, status=403)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="403"):
        download(hub, tmp_path)
    assert not list(tmp_path.rglob("snapshots/*/unet/*.safetensors")), "half a file has no name to be loaded by"
    assert equal_state(DiffusionPipeline.from_pretrained(download(hub, tmp_path)).unet, packed_pipe.unet)


# ── what is refused before anything is sent ──────────────────────────────────────────────────────────────────


def refuse(folder: Path, reason: str, error: type[MSFPError] = CheckpointError, **changes) -> None:
    arguments = {
        "license": "mit",
        "base_model": "org/base",
        "num_samples": 1,
        "num_inference_steps": 1,
        "dry_run": folder.parent / "out",
    }
    with pytest.raises(error, match=reason):
        publish(folder, changes.pop("repo", "user/tiny"), **arguments | changes)
    assert not (folder.parent / "out").exists()


def test_arguments_that_make_no_sense(folder, hub):
    refuse(folder, "`repo` must be a Hub id like `user/name`, but got 'tiny'", ConfigError, repo="tiny")
    refuse(folder, "`base_model` must be a Hub id", ConfigError, base_model="../base")
    refuse(folder, "must name the model that was quantized", ConfigError, base_model=None)
    refuse(
        folder,
        "must say the licence, but the card of org/base does not",
        ConfigError,
        license=None,
        endpoint="http://127.0.0.1:9",
    )
    refuse(folder, "one of the Hub's identifiers", ConfigError, license="My Licence!")
    refuse(folder, "The licence `other` must come with its text", ConfigError, license="other")
    refuse(folder / "unet", "must be a pipeline's folder", ConfigError)
    refuse(
        folder,
        "The base must be a repository on the Hub, but org/none is not",
        ConfigError,
        base_model="org/none",
        endpoint=hub.url,
    )
    (folder / "LICENSE").write_text("All rights reserved.")
    report = publish(
        folder,
        "user/tiny",
        license="other",
        base_model="org/base",
        dry_run=folder.parent / "out",
        num_samples=1,
        num_inference_steps=1,
    )
    assert "LICENSE" in report.files


def test_all_that_is_missing_is_said_at_once(folder, tmp_path):
    with pytest.raises(ConfigError) as refused:
        publish(folder, "tiny", dry_run=tmp_path / "out", results=[tmp_path / "none.json"])
    said = str(refused.value)
    assert said.startswith("4 things must be put right before this can be published: (1) ")
    for part in (
        "`repo` must be a Hub id like `user/name`, but got 'tiny'",
        "(2) A card must name the model that was quantized, but none is known: pass `--base-model` with its Hub id, "
        "its URL, or `none`",
        "(3) A card must say the licence, but there is no base on the Hub to ask: pass `--license ID`",
        "none.json must be a JSON file",
    ):
        assert part in said, part


def test_a_base_that_is_not_on_the_hub(folder, tmp_path):
    known = {"license": "mit", "dry_run": tmp_path / "out", "num_samples": 1, "num_inference_steps": 1}
    for base, told in (
        ("none", "A model that is not published, quantized by\n[MSFP]"),
        (
            "https://example.org/model",
            "[The float model](https://example.org/model), which is not on the Hub, quantized",
        ),
    ):
        report = publish(folder, "user/tiny", base_model=base, **known)
        assert report.base_model == base
        text = (tmp_path / "out" / "README.md").read_text()
        assert told in text
        assert ("read [its page](https://example.org/model)" in text) == (base != "none")
        card = ModelCard(text)
        assert (card.data.license, card.data.base_model, card.data.get("base_model_relation")) == ("mit", None, None)
        assert "huggingface.co" not in text
    report = publish(folder, "user/tiny", base_model="https://huggingface.co/org/base", **known)
    assert report.base_model == "org/base"
    assert ModelCard((tmp_path / "out" / "README.md").read_text()).data.base_model == "org/base"
    assert "base_elsewhere" not in (tmp_path / "out" / "results" / "checkpoint.json").read_text()
    with pytest.raises(ConfigError, match="The URL of a base must have no blanks"):
        publish(folder, "user/tiny", base_model="https://a b", **known)


def test_pickles(folder):
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    refuse(folder, "published as safetensors, but .*diffusion_pytorch_model.bin is a pickle")


@pytest.mark.usefixtures("unchecked")
def test_float_copies_and_tensors_that_nothing_reads(folder):
    file = folder / WEIGHTS
    tensors = load_file(file)
    save_file(tensors | {"conv_in.float_weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    refuse(folder, "`conv_in.float_weight` as F32, which nothing reads")
    save_file(tensors, file, metadata={"format": "pt"})
    save_file({"a": torch.zeros(1)}, folder / "unet" / "talora.safetensors")
    refuse(folder, "fetched by a plain download, but .*talora.safetensors would not be")


def test_a_float_variant_beside_the_packed_weights(folder, unet):
    unet.save_pretrained(folder / "unet-float", variant="fp32")
    shutil.move(folder / "unet-float" / "diffusion_pytorch_model.fp32.safetensors", folder / "unet")
    shutil.rmtree(folder / "unet-float")
    refuse(folder, "must be torch.uint8|must have shape|must hold")


def test_uncalibrated_and_damaged_and_float(folder, tiny_dir, tmp_path):
    from diffusers_msfp import MSFPConfig

    pipe = DiffusionPipeline.from_pretrained(tiny_dir, quantization_config=MSFPConfig())
    pipe.save_pretrained(tmp_path / "observing")
    refuse(tmp_path / "observing", "must be calibrated, but .* still observes")
    refuse(Path(shutil.copytree(tiny_dir, tmp_path / "float")), "MSFP-quantized pipeline")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    refuse(folder, "must load, but")


def test_parts_of_diffusers_own_pipelines(tmp_path):
    """Stable Diffusion's safety checker, whose library is the pipeline's own package."""
    pipe = quantize_pipeline(pipelines.make_small_pipe(), "w4a16")
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}))
    assert "safety_checker" in components(pipeline_index(tmp_path))
    for library, name in (("stable_diffusion", "SomebodysChecker"), ("somebody", "StableDiffusionSafetyChecker")):
        file.write_text(json.dumps(index | {"safety_checker": [library, name]}))
        with pytest.raises(ConfigError, match=f"`safety_checker` is {library}.{name}: a plain download refuses it"):
            pipeline_index(tmp_path)


def test_indices_that_plain_diffusers_would_not_open(folder):
    original = json.loads((folder / "model_index.json").read_text())
    for change, reason, error in (
        ({"_class_name": ["pipeline", "Mine"]}, "one of diffusers' own pipelines", ConfigError),
        ({"_class_name": "AutoencoderKL"}, "one of diffusers' own pipelines", ConfigError),
        ({"unet": ["mine", "UNet"]}, "must be classes of diffusers or transformers", ConfigError),
        ({"../up": ["diffusers", "UNet2DModel"]}, "must map components", CheckpointError),
        ({"unet": ["diffusers"]}, "must map components", CheckpointError),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "must hold the folder of `vae`", CheckpointError),
    ):
        (folder / "model_index.json").write_text(json.dumps(original | change))
        refuse(folder, reason, error)
