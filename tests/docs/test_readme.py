"""The README beside what it speaks of: the examples, the Makefile, and the table that an example prints."""

import pathlib
import re

import pytest

from tests.support.examples import ROOT, run
from tests.support.markdown import blocks

README = (ROOT / "README.md").read_text()


def test_the_quickstart_is_eight_lines_after_the_imports_and_the_model():
    quickstart = next(block.text for block in blocks(README) if block.kind == "python")
    assert "load_digits" in quickstart
    assert len(quickstart.split("\n\n")[-1].splitlines()) <= 8


def test_the_contract_table_is_what_the_example_prints():
    printed = run("freeze_contract").strip()
    for page in (README, (ROOT / "docs" / "freeze-contract.md").read_text()):
        table = re.search(r"\| \| Keras, `base.*?\n\n", page, re.DOTALL).group().strip()
        assert table in printed


@pytest.mark.parametrize("command", ["make demo", "make test", "make docs", "make bench"])
def test_the_commands_are_in_the_makefile(command):
    assert command in README
    assert f"\n{command.split()[1]}: " in (ROOT / "Makefile").read_text()


def test_no_example_is_left_untested_or_out_of_the_list():
    tested = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    listed = (ROOT / "docs" / "examples.md").read_text()
    for path in (ROOT / "examples").glob("*.[pi]*"):  # scripts and notebooks
        assert f'"{path.stem}"' in tested
        assert f"(../examples/{path.name})" in listed
