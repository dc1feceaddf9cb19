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
    return _printed(str(ROOT / "examples" / f"{name}.py"))


# As a notebook does, with the value of a last expression printed where a notebook shows it.
CELLS = """
import ast, json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] == "code":
        code = ast.parse("".join(cell["source"]))
        shown = ast.Expression(code.body.pop().value) if isinstance(code.body[-1], ast.Expr) else None
        exec(compile(code, f"cell {number}", "exec"), names)
        if shown is not None:
            print(eval(compile(shown, f"cell {number}", "eval"), names))
"""


def run_notebook(name):
    """Run the cells of a notebook in their order, in a process of its own, and return what it printed and showed."""
    return _printed("-c", CELLS, str(ROOT / "examples" / f"{name}.ipynb"))


def _printed(*arguments):
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr
