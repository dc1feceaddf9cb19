"""What the README shows is run, and what it claims is seen."""

import pathlib
import re

import pytest

from tests.support.examples import ROOT, run

README = (ROOT / "README.md").read_text()


def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a snippet saves its run
    namespace, snippets = {}, re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 9
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md snippet {number + 1}", "exec"), namespace)
        if number == 0:
            assert f"```\n{namespace['trainer'].explain()}\n```" in README
            assert len([line for line in snippet.splitlines() if line.strip()]) <= 20
    assert namespace["trainer"].step == 1
    assert namespace["cached"].step == 6
    assert namespace["teaching"].step == 5
    assert namespace["logs"]["distance"] < 0.5
    assert namespace["resumed"].step % 8 == 0  # at the end of the best of its epochs


def test_the_contract_table_is_what_the_example_prints():
    table = re.search(r"\| \| Keras.*?\n\n", README, re.DOTALL).group().strip()
    assert table in run("freeze_contract")


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_commands_are_in_the_makefile(command):
    assert command in README
    assert f"\n{command.split()[1]}: " in (ROOT / "Makefile").read_text()


def test_no_example_is_left_untested():
    tested = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    assert all(f'"{path.stem}"' in tested for path in (ROOT / "examples").glob("*.[pi]*"))  # scripts and notebooks
