"""What a command answers, for people and for machines."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

PIPE_COLUMNS = 10_000  # of a table that no terminal shows: its lines are not folded, so that they can be searched


class BadUsage(Exception):
    """What was asked cannot be done: there is no such model, policy, data or folder."""


@dataclass(frozen=True)
class Answer:
    """What a command found out.

    Attributes:
        shown: Lines and tables, for people.
        data: The same as JSON has it, for machines.
        is_wrong: Whether something is wrong with what was asked about.
    """

    shown: Sequence[str | Table]
    data: Mapping[str, Any]
    is_wrong: bool = False

    def print(self, *, as_json: bool) -> None:
        """Print the answer on the standard output."""
        if as_json:
            sys.stdout.write(f"{json.dumps(_plain(self.data), indent=2)}\n")
            return
        for each in self.shown:
            # A text stands as it is: a console would fold the lines of a table that `explain` has drawn.
            sys.stdout.write(f"{each if isinstance(each, str) else _drawn(each)}\n")


def table(header: Sequence[str], rows: Iterable[Iterable[str]], right: Collection[str] = ()) -> Table:
    """Return a table.

    Args:
        header: The names of the columns; if all are empty, they are not shown.
        rows: The cells of each row.
        right: The names of the columns whose cells stand on the right, such as numbers.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(header))
    for number, name in enumerate(header):
        # In a terminal that is too narrow, the first column, which names what a row is about, is folded last.
        side: Literal["left", "right"] = "right" if name in right else "left"
        made.add_column(name, justify=side, overflow="fold", no_wrap=number == 0)
    for row in rows:
        made.add_row(*row)
    return made


def _drawn(made: Table) -> str:
    text = io.StringIO()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_COLUMNS
    # Brackets in the names of layers are no markup; and no variable of the environment makes the text a terminal.
    console = Console(
        file=text, width=width, color_system=None, force_terminal=False, markup=False, highlight=False, emoji=False
    )
    console.print(made)
    # Cells are filled up with spaces, those of the last column too.
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _plain(value: Any) -> Any:
    """Return a value without NaN and Inf, which JSON does not know."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
