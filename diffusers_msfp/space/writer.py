"""The files of a Hugging Face Space that serves the page."""

import shutil
from pathlib import Path

from huggingface_hub import SpaceCardData

from ..checkpoint.describe import config_of_origin, read_config

GRADIO = "6.31.0"  # the page is tested with it
PYTHON = "3.11"

APP = '''\
"""A quantized model beside full precision."""

try:
    from diffusers_msfp.cli import space_run

    space_run({source!r}, reference={reference!r}, title={title!r}{variant})
except KeyboardInterrupt:  # while it is still loading
    raise SystemExit(130) from None
'''
REQUIREMENTS = "diffusers-msfp[cpu,space]\n"
README = """\
---
{header}
---

# {title}

A diffusion model in low-bit floating point{beside}.
Made by `diffusers-msfp space create`. To try it here:

```sh
pip install -r requirements.txt
python app.py
```

To publish it: `hf upload USER/SPACE . --repo-type space`. It runs on a CPU; ZeroGPU is provided for, but untried.
"""


BESIDE = " beside full precision, from the same noise"


def is_space(folder: Path) -> bool:
    """Whether a folder is what `write_space` wrote."""
    app = folder / "app.py"
    return app.is_file() and "diffusers_msfp" in app.read_text(encoding="utf-8", errors="replace")


def write_space(
    folder: Path,
    title: str,
    source: str,
    reference: str | None,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    variant: str | None = None,
) -> list[str]:
    """Write a Space; what is a folder here is copied into it, what is a Hub id stays one.

    Args:
        folder (`Path`): to be filled; must exist.
        title (`str`): of the Space and its page.
        source (`str`): folder or Hub id of the quantized pipeline.
        reference (`str`, *optional*): folder or Hub id of the full-precision one.
        license, license_name, license_link (`str`, *optional*): of the model, in the Hub's words; none if not known.
        variant (`str`, *optional*): of the weights that the page reads.

    Returns:
        `list[str]`: names of all files, sorted.
    """
    locations: dict[str, str | None] = {}
    models: list[str] = []
    for name, location in (("model", source), ("reference", reference)):
        if location is not None and Path(location).is_dir():
            _copy(Path(location), folder / name)
            locations[name] = name
        else:
            locations[name] = location
            models += [location] if location else []
    card = SpaceCardData(
        title=title,
        emoji="🪶",
        colorFrom="indigo",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        license=license,
        license_name=license_name,
        license_link=license_link,
        models=models or None,
    )
    texts = {
        "app.py": APP.format(
            title=title,
            source=locations["model"],
            reference=locations["reference"],
            variant=f", variant={variant!r}" if variant else "",
        ),
        "requirements.txt": REQUIREMENTS,
        "README.md": README.format(header=card.to_yaml(), title=title, beside=BESIDE if reference else ""),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _copy(source: Path, target: Path) -> None:
    """A pipeline's folder without what is hidden, and without the paths of this machine that configs remember."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for file in [*target.rglob("config.json"), *target.rglob("model_index.json")]:
        origin = read_config(file.parent, file.name).get("_name_or_path")
        if isinstance(origin, str) and (Path(origin).is_absolute() or Path(origin).exists()):
            file.write_bytes(config_of_origin(file, None))
