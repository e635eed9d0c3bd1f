"""What a fresh process does with a published checkpoint: `python fresh_process.py WAY REPO`, prints one JSON object.

It finds the Hub, the token and the cache in the environment. Imports stand where a user would write them: what is
imported before what is the question.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path


def digest(model) -> str:
    """Of all tensors, by name."""
    made = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        made.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return made.hexdigest()


def used(pipe) -> list[str]:
    """Digests of the model and of two samples."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    return [digest(pipe.unet), hashlib.sha256(images.tobytes()).hexdigest()]


def error_of(call) -> str:
    try:
        return repr(call())
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def imported(repo: str) -> dict:
    import diffusers

    import diffusers_msfp  # noqa: F401

    load = diffusers.DiffusionPipeline.from_pretrained
    facts = {"dropped": error_of(lambda: load(repo))}
    half = Path(os.environ["HF_HOME"]).rglob("snapshots/*/unet/*.safetensors")
    facts["half"] = [str(path) for path in half]
    facts["pipeline"] = used(load(repo))
    facts["class"] = used(diffusers.DDPMPipeline.from_pretrained(repo))
    facts["branch"] = used(load(repo, revision="w4", variant="w4"))
    facts["cached"] = used(load(repo, local_files_only=True))
    from huggingface_hub import HfApi

    commit = HfApi().model_info(repo).sha
    facts["commit"] = used(load(repo, revision=commit))
    facts["component"] = digest(diffusers.UNet2DModel.from_pretrained(repo, subfolder="unet"))
    facts["auto"] = digest(diffusers.AutoModel.from_pretrained(repo, subfolder="unet"))
    facts["no token"] = error_of(lambda: load("user/private", token=False))
    facts["private"] = used(load("user/private", token="hf_dummy"))
    return facts


def plain(repo: str) -> dict:
    from diffusers import DiffusionPipeline

    load = DiffusionPipeline.from_pretrained
    facts = {"plain": error_of(lambda: load(repo))}
    facts["untrusted"] = error_of(lambda: load(repo, custom_pipeline="pipeline"))
    facts["imported"] = "diffusers_msfp" in sys.modules
    pipe = load(repo, custom_pipeline="pipeline", trust_remote_code=True)
    return facts | {
        "pipeline": used(pipe),
        "class": type(pipe).__name__,
        "scheme": pipe.quantization_report()["unet"]["scheme"],
    }


def factory(repo: str) -> dict:
    sys.path.insert(0, str(Path(__file__).parent))
    import upstream_factory
    from diffusers import DiffusionPipeline

    upstream_factory.install()
    facts = {"imported": "diffusers_msfp" in sys.modules}
    return facts | {"pipeline": used(DiffusionPipeline.from_pretrained(repo))}


if __name__ == "__main__":
    time.sleep = lambda _: None  # the client's patience between tries
    way, repo = sys.argv[1:]
    facts = {"imported": imported, "plain": plain, "factory": factory}[way](repo)
    sys.stdout.write(json.dumps(facts) + "\n")
