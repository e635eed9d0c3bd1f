"""What a fresh process does with a published checkpoint: `python fresh_process.py WAY REPO`, prints one JSON object.

It finds the Hub, the token and the cache in the environment.
"""

# ruff: noqa: E402, BLE001, T201

import hashlib
import json
import os
import sys
import time
from pathlib import Path

way, repo = sys.argv[1:]
time.sleep = lambda _: None  # the client's patience between tries
if way == "imported":
    import diffusers_msfp  # noqa: F401

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline, UNet2DModel
from huggingface_hub import HfApi

diffusers.utils.logging.disable_progress_bar()
facts = {}


def digest(model) -> str:
    """Of all tensors, by name."""
    made = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        made.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return made.hexdigest()


def sample(pipe) -> str:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    return hashlib.sha256(images.tobytes()).hexdigest()


def keep(name: str, pipe) -> None:
    facts[name] = [digest(pipe.unet), sample(pipe)]


def keep_error(name: str, call) -> None:
    try:
        facts[name] = repr(call())
    except Exception as error:
        facts[name] = f"{type(error).__name__}: {error}"


if way == "imported":
    if repo.startswith("/"):  # the original
        keep("pipeline", DiffusionPipeline.from_pretrained(repo))
    else:
        keep_error("dropped", lambda: DiffusionPipeline.from_pretrained(repo))
        cache = Path(os.environ["HF_HOME"])
        facts["half"] = [str(path) for path in cache.rglob("snapshots/*/unet/*.safetensors")]
        keep("pipeline", DiffusionPipeline.from_pretrained(repo))
        keep("class", diffusers.DDPMPipeline.from_pretrained(repo))
        keep("branch", DiffusionPipeline.from_pretrained(repo, revision="w4", variant="w4"))
        keep("cached", DiffusionPipeline.from_pretrained(repo, local_files_only=True))
        facts["component"] = digest(UNet2DModel.from_pretrained(repo, subfolder="unet"))
        facts["auto"] = digest(AutoModel.from_pretrained(repo, subfolder="unet"))
        commit = HfApi().model_info(repo).sha
        keep("commit", DiffusionPipeline.from_pretrained(repo, revision=commit))
        keep_error("no token", lambda: DiffusionPipeline.from_pretrained("user/private", token=False))
        keep("private", DiffusionPipeline.from_pretrained("user/private", token="hf_dummy"))
elif way == "plain":
    keep_error("plain", lambda: DiffusionPipeline.from_pretrained(repo))
    code = {"custom_pipeline": "pipeline"}
    keep_error("untrusted", lambda: DiffusionPipeline.from_pretrained(repo, **code))
    facts["imported"] = "diffusers_msfp" in sys.modules
    pipe = DiffusionPipeline.from_pretrained(repo, **code, trust_remote_code=True)
    keep("pipeline", pipe)
    facts["class"] = type(pipe).__name__
    facts["scheme"] = pipe.quantization_report()["unet"]["scheme"]
elif way == "factory":
    sys.path.insert(0, str(Path(__file__).parent))
    import upstream_factory

    upstream_factory.install()
    facts["imported"] = "diffusers_msfp" in sys.modules
    keep("pipeline", DiffusionPipeline.from_pretrained(repo))
print(json.dumps(facts))
