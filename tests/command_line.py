"""The program, as a user calls it."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

from diffusers_msfp.cli.app import main


def program(*arguments: object) -> subprocess.CompletedProcess:
    """The program in this process: to start one takes longer than most verbs do."""
    command, before, code = ["diffusers-msfp", *map(str, arguments)], sys.argv, 0
    out, err = io.StringIO(), io.StringIO()
    try:
        sys.argv = command
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as done:
        code = done.code or 0
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
