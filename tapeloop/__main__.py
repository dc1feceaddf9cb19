"""The door of the command line: `tapeloop`, or `python -m tapeloop`."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Run the command line, or say what to install for it.

    Raises:
        SystemExit: With the exit status: always.
    """
    try:
        app = importlib.import_module("tapeloop.cli.app").app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f"The command line needs the package `{error.name}`: pip install 'tapeloop[cli]'\n")
        sys.exit(2)
    app(prog_name="tapeloop")


if __name__ == "__main__":
    main()
