"""What commands share: options, and ways to print a result."""

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import GenericAlias
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.table import Table

from ...errors import ConfigError
from ...results import Result
from ...sampling.solvers import SAMPLERS
from .settings import Setting, settings_of
from .terminal import set_verbosity, stdout

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="For pipelines that take prompts; repeatable.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance-scale", help="For pipelines with guidance; the pipeline's own by default.")
]
Sampler = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(SAMPLERS)} or own (the pipeline's); by default DDIM where it can be used."),
]
Variant = Annotated[
    str | None,
    typer.Option(help="Of the weights that are read, like `fp16`, where a model has it; else plain ones, or the only."),
]
Source = Annotated[str, typer.Argument(help="Folder, Hub id or single file of a pipeline.")]


Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing on standard error but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Give every step a line on standard error.")]


def with_verbosity(command: Callable) -> Callable:
    """Give a command the options `--quiet` and `--verbose`, which hold for its run.

    Raises:
        ConfigError: by the command, with both.
    """
    signature = inspect.signature(command)

    @wraps(command)
    def called(*, quiet: bool, verbose: bool, **given: object) -> object:
        if quiet and verbose:
            raise ConfigError("A run is either `--quiet` or `--verbose`, but got both. Leave one out.")
        set_verbosity(quiet=quiet, verbose=verbose)
        return command(**given)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()]
    for name, annotation in (("quiet", Quiet), ("verbose", Verbose)):
        added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        parameters.append(added)
    _take_signature(called, signature.replace(parameters=parameters))
    return called


def _take_signature(function: Callable, signature: inspect.Signature) -> None:
    """Let typer read this signature instead of the one of the function that is wrapped."""
    vars(function)["__signature__"] = signature
    function.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    vars(function).pop("__wrapped__", None)


def with_config(
    config: type, *, names: Mapping[str, tuple[str, ...]] | None = None, **own: object
) -> Callable[[Callable], Callable]:
    """Give a command one option for each field of a config, in the place of its parameter `config`.

    Types, defaults and help are those of the dataclass. A tuple of strings becomes an option that is repeated.

    Args:
        config (`type`): a dataclass, see `settings_of`.
        names (`Mapping[str, tuple[str, ...]]`, *optional*): field → names of its option; `--field-name` by default.
        **own: annotations that the command has for a field, instead of the derived ones.

    Returns:
        `Callable`: decorator of a function whose parameter `config` takes an instance.

    Raises:
        KeyError: a field that the docstring does not name.
    """
    settings = list(settings_of(config))

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        options = [_parameter(setting, (names or {}).get(setting.name, ()), own) for setting in settings]

        @wraps(command)
        def called(**given: object) -> object:
            values = {setting.name: _plain(setting, given.pop(setting.name)) for setting in settings}
            return command(config=config(**values), **given)

        parameters = []
        for parameter in signature.parameters.values():
            keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += options if parameter.name == "config" else [keyword]
        _take_signature(called, signature.replace(parameters=parameters))
        return called

    return decorate


def _parameter(setting: Setting, names: tuple[str, ...], own: Mapping[str, object]) -> inspect.Parameter:
    kind: Any = setting.type
    default, name = setting.default, setting.name.replace("_", "-")
    meaning = (setting.meaning[:1].upper() + setting.meaning[1:]).replace('`"', "`").replace('"`', "`")
    if get_origin(kind) is tuple:
        kind, default = GenericAlias(list, get_args(kind)[0]) | None, list(default) or None
        meaning += " Repeatable."
    option = typer.Option(*names or (f"--{name}/--no-{name}" if kind is bool else f"--{name}",), help=meaning)
    annotation = own.get(setting.name, Annotated[kind, option])
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(setting: Setting, value: Any) -> Any:
    """What typer makes of a repeated option, as configs have it."""
    return tuple(value or setting.default) if get_origin(setting.type) is tuple else value


def print_json(result: Result) -> None:
    """One object on standard output: exactly what its `to_dict` gives."""
    sys.stdout.write(json.dumps(result.to_dict()) + "\n")
    sys.stdout.flush()  # a verb may wait after it


_WORDS = {"True": True, "False": False, "None": None}


def parse_value(text: str) -> object:
    """A value as JSON or Python knows it; anything else is text."""
    try:
        return _WORDS[text] if text in _WORDS else json.loads(text)
    except ValueError:
        return text


def print_router(intervals: Sequence, num_adapters: int) -> None:
    """Which adapter serves which timesteps, where there is a choice."""
    if num_adapters == 1:
        return
    for group, runs in enumerate(intervals):
        title = f"router, layer group {group}" if len(intervals) > 1 else "router"
        table = Table("timesteps", "adapter", "share", title=title)
        for first, last, adapter in runs:
            table.add_row(f"{first} … {last}", f"{adapter}", f"{(last - first + 1) / (runs[-1][1] + 1):.0%}")
        stdout.print(table)
