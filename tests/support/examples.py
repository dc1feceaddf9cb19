"""Running the examples."""

import contextlib
import io
import pathlib
import runpy
import subprocess
import sys
from unittest import mock

ROOT = pathlib.Path(__file__).parents[2]


def run(name):
    """Run an example as a script, in this process, and return what it printed."""
    path, printed = str(ROOT / "examples" / f"{name}.py"), io.StringIO()
    out, error = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with mock.patch.object(sys, "argv", [path]), out, error:
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def run_by_itself(name):
    """Run an example as a user would, in a process of its own, and return what it printed."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr
