"""`--set help`: the stages of recipes and their settings, from the registry of methods."""

import json

from rich.markup import escape
from rich.table import Table

from ...methods import METHODS
from ...recipes import CORRECTION, RECIPES
from ...results import plain
from .settings import settings_of
from .terminal import stdout

HELP = "help"


def asked_for(items: list[str] | None) -> list[str]:
    """Stages whose settings were asked for: `help` means all, `STAGE.help` one.

    Raises:
        ConfigError: there is no such stage.
    """
    names: list[str] = []
    for item in items or ():
        stage, dot, name = item.rpartition(".")
        if name == HELP:
            names += [stage] if dot else METHODS
    return [name for name in dict.fromkeys(names) if METHODS[name]]


def print_stages(names: list[str]) -> None:
    """A table of settings for each stage."""
    for name in names:
        recipes = [recipe for recipe, stages in RECIPES.items() if name in {stage.name for stage in stages}]
        title = f"stage {name}, of the recipes {', '.join(recipes)}" if recipes else f"stage {name}"
        title += " of all recipes, at their end" if name == CORRECTION.name else ""
        setting_names = [f"{name}.{setting.name}" for setting in settings_of(METHODS[name].config)]
        table = Table(title=title, title_justify="left", show_lines=True)
        table.add_column("setting", no_wrap=True, min_width=max(map(len, setting_names)))
        for heading in ("type", "default", "meaning"):
            table.add_column(heading)
        for setting in settings_of(METHODS[name].config):
            cells = (f"{name}.{setting.name}", setting.type_name, _value(setting.default), setting.meaning)
            table.add_row(*map(escape, cells))
        stdout.print(table)
    stdout.print(
        "Values are JSON, or Python's True, False and None; anything else is text: `--set talora.minutes=5`. Recipes "
        "may set other values than these defaults; `--num-inference-steps` and `--seed` hold for all stages that are "
        "not told otherwise.",
        highlight=False,
        markup=False,
    )


def _value(default: object) -> str:
    return "" if default == () else json.dumps(plain(default))
