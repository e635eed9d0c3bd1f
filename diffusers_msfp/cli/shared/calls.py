"""What a user says on how a pipeline is called, prompts and guidance; and a last stage that calls it."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline

from ...errors import ConfigError, NothingToDoError
from ...methods.correction.fit import CorrectionConfig, correct_output
from ...sampling.calls import DEFAULT_PROMPTS
from .terminal import stderr


def text_file(prompts: object) -> str | Path | None:
    """The file that prompts are in, if they are in one; see `read_prompts`."""
    return prompts if isinstance(prompts, str | Path) else None


def read_prompts(prompts: str | Path | Sequence[str] | None) -> list[str] | None:
    """Prompts as they are, or of a file: one on each line that is not blank.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    if prompts is None or not isinstance(prompts, str | Path):
        return None if prompts is None else list(prompts)
    try:
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`--prompts` must be a text file with a prompt on each line, but {prompts}: {error}"
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"`--prompts` must be a text file with a prompt on each line, but {prompts} holds none.")
    return found


def call_settings(
    pipe: DiffusionPipeline | None, prompts: Sequence[str] | None, guidance_scale: float | None, *, samples: bool = True
) -> dict[str, Any]:
    """Arguments to pass on to a pipeline; says on standard error which prompts it gets where none are named.

    Args:
        pipe (`DiffusionPipeline`, *optional*): to be called; None for a model alone, which is not sampled.
        prompts (`Sequence[str]`, *optional*): that the user named.
        guidance_scale (`float`, *optional*): likewise.
        samples (`bool`): whether it will be called at all.

    Raises:
        ConfigError: the pipeline takes no prompts, or no guidance, but some were named.
    """
    name = "a model on its own" if pipe is None else type(pipe).__name__
    parameters = {} if pipe is None else inspect.signature(cast(Any, pipe).__call__).parameters
    for option, what, given in (("prompt", "prompts", prompts), ("guidance_scale", "guidance", guidance_scale)):
        if given is not None and option not in parameters:
            flag = option.replace("_", "-")
            raise ConfigError(f"`--{flag}` needs a pipeline that takes {what}, but {name} takes none. Leave it out.")
    if samples and prompts is None and "prompt" in parameters:
        built_in = "; ".join(DEFAULT_PROMPTS)
        stderr.print(
            f"No prompts were named (`--prompt`), so the {len(DEFAULT_PROMPTS)} built-in ones are used in turn; own "
            f"ones fit own data better. They are: {built_in}.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    return {} if guidance_scale is None else {"guidance_scale": guidance_scale}


def correct(pipe: DiffusionPipeline, original: DiffusionPipeline, config: CorrectionConfig, **more: Any) -> bool:
    """`correct_output`, where a model can be corrected; a line says why another is not."""
    try:
        correct_output(pipe, original, config, **more)
    except NothingToDoError as error:
        stderr.print(f"The output is left uncorrected: {error}", soft_wrap=True, highlight=False)
        return False
    return True
