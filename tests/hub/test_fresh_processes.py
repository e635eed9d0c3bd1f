"""A published checkpoint in processes that have loaded nothing yet, from an empty cache, over HTTP.

Few processes, each of which takes seconds for its imports, and many ways of loading in each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
from diffusers import DiffusionPipeline
from fresh_process import used
from hub_server import TOKEN, WEIGHTS, Hub, send

hub, online = hub_server.hub, hub_server.online
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def start(way: str, repo: str, hub: Hub, cache: Path, **environment: str) -> subprocess.Popen:
    without = {"HF_HUB_OFFLINE", "HF_TOKEN"}
    inherited = {key: value for key, value in os.environ.items() if key not in without}
    path = os.pathsep.join([str(ROOT), inherited.get("PYTHONPATH", "")])
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": path,
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "fresh_process.py"), way, repo],
        env=inherited | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def facts_of(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_every_way_to_load(hub, packed_dir, packed_pipe, tmp_path):
    send(hub, Path(packed_dir))
    send(hub, Path(packed_dir), repo="user/private", private=True)
    packed_pipe.save_pretrained(tmp_path / "variant", variant="w4")
    send(hub, tmp_path / "variant", revision="w4")
    expected = used(DiffusionPipeline.from_pretrained(packed_dir))

    hub.fail("GET", WEIGHTS, after=5000)  # the client goes on where it was
    hub.fail("GET", WEIGHTS, status=403)
    facts = facts_of(start("imported", "user/tiny", hub, tmp_path / "cache"))
    assert "403" in facts["dropped"]
    assert facts["half"] == []
    for way in ("pipeline", "class", "branch", "cached", "commit", "private"):
        assert facts[way] == expected, way
    assert facts["component"] == facts["auto"] == expected[0]
    assert "RepositoryNotFound" in facts["no token"] or "OSError" in facts["no token"]

    facts = facts_of(start("plain", "user/tiny", hub, tmp_path / "cold"))
    assert "Unknown quantization type, got msfp" in facts["plain"]
    assert "trust_remote_code" in facts["untrusted"]
    assert facts["imported"] is False
    assert facts["pipeline"] == expected
    assert (facts["class"], facts["scheme"]) == ("MSFPDDPMPipeline", "w4a4")

    facts = facts_of(start("factory", "user/tiny", hub, tmp_path / "cache", HF_HUB_OFFLINE="1", HF_TOKEN=""))
    assert facts == {"imported": False, "pipeline": expected}


def test_the_factory_for_diffusers_is_as_thin_as_the_one_it_has():
    from diffusers.quantizers.sdnq import sdnq_quantizer

    lines = len((HERE / "upstream_factory.py").read_text().splitlines())
    assert lines <= len(Path(sdnq_quantizer.__file__).read_text().splitlines())
