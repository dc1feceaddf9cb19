"""Reading the pages of the documentation: blocks of code, links, headings, tables."""

import re
from dataclasses import dataclass

from tests.support.examples import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page):
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """Some lines of a page that belong together.

    Attributes:
        kind: `"heading"`, `"table"`, `"prose"`, or what a fence says after its backticks, `"fence"` if it says nothing.
        text: The lines, those of a fence without the backticks.
        line: The number of the first of them, from 1.
    """

    kind: str
    text: str
    line: int


def blocks(markdown):
    """Take a page apart."""
    found, lines, number = [], markdown.splitlines(), 0
    while number < len(lines):
        start = number
        fence = re.match(r"( *)```(\S*)", lines[number])
        if fence:
            number += 1
            while lines[number].strip() != "```":
                number += 1
            inner = [line.removeprefix(fence[1]) for line in lines[start + 1 : number]]
            found.append(Block(fence[2] or "fence", "\n".join(inner), start + 2))
            number += 1
        elif not lines[number].strip():
            number += 1
        elif lines[number].startswith("#"):
            found.append(Block("heading", lines[number], start + 1))
            number += 1
        else:
            while number < len(lines) and lines[number].strip() and not re.match(r" *```|#+ ", lines[number]):
                number += 1
            text = "\n".join(lines[start:number])
            found.append(Block("table" if text.startswith("|") else "prose", text, start + 1))
    return found


def links(markdown):
    """Where the links and pictures of a page lead to, those in code left out."""
    text = "\n".join(block.text for block in blocks(markdown) if block.kind in ("prose", "table", "heading"))
    return LINK.findall(re.sub(r"`[^`]*`", "", text))


def anchors(markdown):
    """The anchors of a page's headings, as both GitHub and Python-Markdown make them."""
    titles = [block.text.lstrip("#").strip() for block in blocks(markdown) if block.kind == "heading"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
