"""Old spellings of options, taken for one version more: they stand in no help, and say what they are called now."""

from typing import Any

from typer.core import TyperCommand

from .terminal import stderr

OLD_SPELLINGS = {
    "--num": "--num-samples",
    "--steps": "--num-inference-steps",
    "--calibration-samples": "--num-samples",
    "--keep": "--modules-to-not-convert",
    "--dfa-exponent": "--denoising-factor-exponent",
}
"""Option → what it is called now, in every command that has the new one and not the old."""


class Command(TyperCommand):
    """A command of the program."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, old spellings as new ones."""
        takes_value = {name: not getattr(each, "is_flag", False) for each in self.params for name in each.opts}
        old = {was: now for was, now in OLD_SPELLINGS.items() if now in takes_value and was not in takes_value}
        read, is_value = [], False
        for position, word in enumerate(args):
            if word == "--":
                read += args[position:]
                break
            name, equals, value = word.partition("=")
            if not is_value and name in old:
                stderr.print(
                    f"`{name}` is called `{old[name]}` now; the old spelling goes with the next version.",
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
                name = old[name]
                word = name + equals + value
            is_value = not is_value and not equals and takes_value.get(name, False)
            read.append(word)
        return super().parse_args(ctx, read)
