"""The short examples do what they say, in forty lines each."""

import keras
import pytest

from tests.support.examples import ROOT, run
from tests.support.params import params

SHORT = sorted(path.stem for path in (ROOT / "examples" / "short").glob("*.py"))
SLOW = {"diffusion", "dqn", "resume", "sweep", "two_stage_transfer", "vae"}


@pytest.mark.parametrize("name", params(SHORT, SLOW))
def test_it_does_what_it_says_in_forty_lines(name, tmp_path, monkeypatch):
    assert len((ROOT / "examples" / "short" / f"{name}.py").read_text().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    keras.utils.clear_session()  # names of layers are counted
    assert run(f"short/{name}").strip()  # which checks its own claim


def test_there_are_twelve_and_the_documentation_lists_them():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert [name for name in SHORT if f"(../examples/short/{name}.py)" not in page] == []
    assert len(SHORT) == 12
