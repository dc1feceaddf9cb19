"""Handing over to the benchmark suite, which stands beside the package in a checkout and is not installed."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from tapeloop.cli.answer import BadUsage

PACKAGE = pathlib.Path(__file__).parents[1]


def run(arguments: Sequence[str]) -> int:
    """Run `python -m benchmarks` and return its exit status.

    Raises:
        BadUsage: The suite is not there.
    """
    here = pathlib.Path.cwd()
    # As Python does: what stands in the working directory comes first.
    home = here if (here / "benchmarks").exists() else PACKAGE.parent
    if not ((home / "benchmarks" / "__main__.py").exists() and (home / PACKAGE.name / "__init__.py").exists()):
        raise BadUsage(
            "The benchmark suite comes with tapeloop's repository and is not installed. Run `tapeloop bench` in a "
            "checkout, or `python -m benchmarks` there, which is the same; `make bench` sets up what it needs first."
        )
    searched = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": searched}, check=False).returncode
