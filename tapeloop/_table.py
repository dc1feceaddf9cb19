"""Tables: one text that prints as it is, and shows as HTML in a notebook; and numbers of bytes in them."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from typing import Any


class Table(str):
    """A table in plain text.

    Attributes:
        html: The same table for a notebook. It sets no colours, so that it is readable on light and dark pages.
    """

    html: str

    def __repr__(self) -> str:
        # In a terminal, too, what a call returns is to be read, and not counted for line breaks.
        return str(self)

    def _repr_html_(self) -> str:
        return self.html


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str] = (),
    totals: Sequence[tuple[str, str]] = (),
) -> Table:
    """Return a table.

    Args:
        header: The names of its columns.
        rows: The cells of each row.
        right: The columns that are aligned to the right.
        totals: Names and values that stand below it. A name that begins with blanks is part of the one before.
    """
    columns = []
    for name, *cells in zip(header, *rows):
        column, pad = [name, *cells], str.rjust if name in right else str.ljust
        width = max(map(len, column))
        columns.append([pad(cell, width) for cell in column])
    lines = ["  ".join(row).rstrip() for row in zip(*columns)]
    line = "-" * max(map(len, lines))
    below = [f"{name:<16} {value}" for name, value in totals]
    made = Table("\n".join([lines[0], line, *lines[1:], *([line, *below] if totals else [])]))
    made.html = html_table(header, rows, right) + (html_table((), totals) if totals else "")
    return made


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = (), caption: str = ""
) -> str:
    """Return a table as HTML, with all that it is given escaped.

    Args:
        header: The names of its columns; without any, the first cell of each row is its name.
        rows: The cells of each row.
        right: The columns that are aligned to the right.
        caption: What stands above it.
    """
    aligned = ["right" if name in right else "left" for name in header] or ["left", "left"]
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    head = "".join(_cell("th", name, align) for name, align in zip(header, aligned))
    body = "".join(f"<tr>{''.join(_cell('td', cell, align) for cell, align in zip(row, aligned))}</tr>" for row in rows)
    return f"<table>{said}{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _cell(tag: str, text: str, align: str) -> str:
    # Notebooks align cells to the right unless they are told otherwise. Blanks in front would be lost.
    indent = "; padding-left: 2em" * (tag == "td" and text.startswith(" "))
    return f'<{tag} style="text-align: {align}{indent}">{html.escape(text.strip())}</{tag}>'


def shortened(items: Sequence[Any], most: int) -> list[Any]:
    """Return the items, or, if there are more than `most`, the first and the last of them with None in between."""
    if len(items) <= most:
        return list(items)
    first = most // 3
    return [*items[:first], None, *items[len(items) - (most - first - 1) :]]


def format_bytes(count: int) -> str:
    """Return a number of bytes in the largest fitting unit: `1.5 MiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    # As it is shown: 1023.99 KiB would be 1024.0 KiB.
    while round(size, 1) >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.{int(units[0] != 'B')}f} {units[0]}"


def format_count(number: int, one: str, several: str | None = None) -> str:
    """Return a number of things: `1 step`, `2,000 steps`; `several` is the plural, by default with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
