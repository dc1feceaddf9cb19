"""The commands as a whole: help, version, the benchmark suite, and what is missing."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import typer

import tapeloop
from tapeloop.__main__ import main
from tapeloop.cli import benchmarks, checkpoints
from tapeloop.cli.app import app
from tests.support.commands import ask

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = "", "paths", "explain", "frontier", "checkpoints list", "checkpoints verify", "checkpoints show", "launch"


def test_the_version():
    assert ask("--version") == (0, f"tapeloop {tapeloop.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_examples_that_can_be_given(command):
    status, said, _ = ask(f"{command} --help")
    examples = re.findall(r"^  (tapeloop .*?)(?:  +#.*| \|.*)?$", said, re.MULTILINE)
    assert status == 0
    assert len(examples) >= 2
    for example in examples:
        _, *arguments = shlex.split(example)
        found = typer.main.get_command(app)
        while hasattr(found, "commands"):
            found = found.commands[arguments.pop(0)]
        assert command == "" or found.name == command.split()[-1]
        found.make_context(found.name, arguments)  # raises if the command does not take them


def test_without_the_package_for_it_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "tapeloop.cli.app")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "The command line needs the package `typer`: pip install 'tapeloop[cli]'\n"


def test_a_fault_of_our_own_is_no_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tapeloop.cli.answer", None)
    monkeypatch.delitem(sys.modules, "tapeloop.cli.app")
    monkeypatch.delitem(sys.modules, "tapeloop.cli.checkpoints")
    monkeypatch.delitem(sys.modules, "tapeloop.cli.benchmarks")
    with pytest.raises(ModuleNotFoundError, match=r"tapeloop\.cli\.answer"):
        main()


@pytest.fixture
def started(monkeypatch):
    """The processes that are started, which are not started; their exit status is 7."""
    found = []

    def run(command, *, env, check):
        found.append((command, env["PYTHONPATH"].split(os.pathsep)[0]))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    return found


@pytest.mark.parametrize("arguments", ["", "--help", "run --suite quick --arms tapeloop full"])
def test_the_benchmark_suite_gets_all_arguments_and_gives_its_status(started, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the suite beside the package is used from anywhere
    assert ask(f"bench {arguments}") == (7, "", "")
    assert started == [([sys.executable, "-m", "benchmarks", *arguments.split()], str(ROOT))]


def test_the_suite_of_the_working_directory_comes_first(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("benchmarks/__main__.py", "tapeloop/__init__.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert ask("bench report")[0] == 7
    assert started[0][1] == str(tmp_path)


@pytest.mark.parametrize("installed", [True, False])
def test_without_the_suite_it_says_where_that_is(started, tmp_path, monkeypatch, installed):
    monkeypatch.chdir(tmp_path)
    if installed:
        monkeypatch.setattr(benchmarks, "PACKAGE", tmp_path / "site-packages" / "tapeloop")
    else:  # what Python would run here is another's
        (tmp_path / "benchmarks").mkdir()
    status, said, error = ask("bench run")
    assert (status, said, started) == (2, "", [])
    assert error.startswith("The benchmark suite comes with tapeloop's repository and is not installed. Run `tapeloop")


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (MemoryError(), 2, "MemoryError"),
        (PermissionError(13, "Permission denied", "run"), 2, "PermissionError: [Errno 13] Permission denied: 'run'"),
        (tapeloop.CheckpointError("There is none."), 1, "There is none."),
    ],
)
def test_what_nobody_has_foreseen_does_not_read_as_an_answer(monkeypatch, raised, status, text):
    def verified(folder):
        raise raised

    monkeypatch.setattr(checkpoints, "verified", verified)
    assert ask("checkpoints verify run") == (status, "", f"{text}\n")
