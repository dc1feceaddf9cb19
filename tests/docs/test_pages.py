"""What the pages show is run, their links lead somewhere, and figures stand beside the commands that measured them."""

import contextlib
import doctest
import io
import re
import subprocess
import sys

import keras
import pytest

from tests.support.examples import ROOT
from tests.support.markdown import DOCS, PAGES, anchors, blocks, links, name_of

EACH = pytest.mark.parametrize("page", PAGES, ids=name_of)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# A measured number: one with a unit, or one in a table of which a column is named so.
FIGURE = re.compile(r"\b\d[\d,.]* ?(ms|us|s|KiB|MiB|GiB|KB|MB|GB|steps/s|examples/s)\b")
MEASURED = re.compile(r"\b(ms|us|MiB|accuracy|ratio)\b|/ (full|forward|by hand|floor)\b")
COMMAND = re.compile(r"`[^`]*\b(python (-m|examples/)|make \w|pytest)")
CHOSEN = "about 0.2 s"  # how long a call of the loop lasts


@EACH
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a page saves its runs
    keras.utils.clear_session()  # names of layers are counted
    keras.utils.set_random_seed(0)
    namespace, printed, checker = {"__name__": "__main__"}, "", doctest.OutputChecker()
    found = blocks(page.read_text())
    for number, block in enumerate(found):
        if block.kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                # Line numbers of an error are those of the page.
                exec(compile("\n" * (block.line - 1) + block.text, name_of(page), "exec"), namespace)
            printed = out.getvalue()
        elif block.kind == "text" and found[number - 1].kind == "python":
            example = doctest.Example("", block.text)
            assert checker.check_output(example.want, printed, FLAGS), checker.output_difference(
                example, printed, FLAGS
            )


@EACH
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_page_stands_in_the_navigation():
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS))


@EACH
def test_a_figure_stands_beside_the_command_that_measured_it(page):
    found, is_diary = blocks(page.read_text()), page.name == "notes.md"
    for number, block in enumerate(found):
        is_table = block.kind in ("table", "fence")
        # In the diary of experiments a section has its command; what is written about it refers to that.
        if not is_table and (is_diary or block.kind != "prose"):
            continue
        text = block.text.replace(CHOSEN, "")
        if FIGURE.search(text) or (is_table and MEASURED.search(text) and re.search(r"\d\.\d", text)):
            near = found[max(0, number - (8 if is_diary else 2)) : number + 2]
            assert any(COMMAND.search(each.text) for each in near), f"{name_of(page)}, line {block.line}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 150


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-3000:]
    assert (tmp_path / "guides" / "gan" / "index.html").exists()
