"""The rows of tables and pictures of a model: submodels unfolded as far as they are shown, repeated ones folded."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo

Info: TypeAlias = SubmodelInfo | VariableInfo
LONGEST_BLOCK = 32  # rows: a block of a network in which all layers stand side by side


@dataclass(frozen=True)
class Row:
    """A submodel or variable as it is shown, or several that look alike.

    Attributes:
        label: Its path; that of several is `blocks/0..11`.
        infos: What it stands for.
        inner: The rows of what is in it, if they are shown.
    """

    label: str
    infos: tuple[Info, ...]
    inner: tuple[Row, ...] = ()

    def flat(self) -> Iterator[Row]:
        """Yield the row and all rows in it."""
        yield self
        for row in self.inner:
            yield from row.flat()


def unfolded(tree: Tree, parent: SubmodelInfo, opens: Callable[[SubmodelInfo], bool], depth: float) -> tuple[Row, ...]:
    """Return the rows of the children and variables of a submodel.

    Args:
        tree: The model.
        parent: The submodel.
        opens: Tells whether what is in a submodel is shown too.
        depth: How many levels are shown at most.
    """
    rows = []
    for child in tree.children[parent]:
        if tree.variables_in[child]:
            inner = unfolded(tree, child, opens, depth - 1) if depth > 1 and opens(child) else ()
            rows.append(Row(child.path, (child,), inner))
    return (*rows, *(Row(variable.path, (variable,)) for variable in own_variables(tree, parent)))


def own_variables(tree: Tree, submodel: SubmodelInfo) -> list[VariableInfo]:
    """List the variables that are directly in a submodel, and in none of its children."""
    deeper = {variable for child in tree.children[submodel] for variable in tree.variables_in[child]}
    return [variable for variable in tree.variables_in[submodel] if variable not in deeper]


def folded(rows: Sequence[Row], look: Callable[[Info], Hashable]) -> tuple[Row, ...]:
    """Return rows with those that repeat each other as one: `blocks/0`, `blocks/1` and `blocks/2` as `blocks/0..2`.

    Rows repeat each other if they follow one another, look alike with all that is in them, and differ in one number of
    their names, which counts up. So do blocks of several rows: `block1_conv`, `block1_bn`, `block2_conv`, `block2_bn`
    become `block1..2_conv` and `block1..2_bn`.

    Args:
        rows: The rows of one submodel.
        look: What else is shown of a submodel or variable.
    """
    rows = [replace(row, inner=folded(row.inner, look)) for row in rows]
    looks = [_looks(row, look) for row in rows]
    names = [re.split(r"(\d+)", row.label) for row in rows]
    done: list[Row] = []
    at = 0
    while at < len(rows):
        period, count, place = _repeats(names, looks, at)
        for first in range(at, at + period):
            repeated = rows[first : at + period * count : period]
            done.append(_merged(repeated, _numbered(names[first], place, count)))
        at += period * count
    return tuple(done)


def _looks(row: Row, look: Callable[[Info], Hashable]) -> Hashable:
    """Return what a row shows but for its name."""
    inside = tuple((inner.label.removeprefix(row.label), _looks(inner, look)) for inner in row.inner)
    return look(row.infos[0]), len(row.infos), inside


def _repeats(names: Sequence[Sequence[str]], looks: Sequence[Hashable], at: int) -> tuple[int, int, int]:
    """Return how many rows from one on make up a block that repeats, how often, and which part of the names counts."""
    for period in range(1, min(LONGEST_BLOCK, (len(names) - at) // 2) + 1):
        place = _counting(names[at], names[at + period]) if looks[at] == looks[at + period] else None
        if place is None:
            continue
        count, number = 1, int(names[at][place])
        while _continues(names, looks, range(at, at + period), period * count, (place, number + count)):
            count += 1
        if count > 1:
            return period, count, place
    return 1, 1, 0


def _continues(
    names: Sequence[Sequence[str]], looks: Sequence[Hashable], block: range, further: int, counted: tuple[int, int]
) -> bool:
    """Tell whether a block of rows comes again, so many rows further on, with a number in the place of another."""
    place, number = counted
    if block.stop + further > len(names):
        return False
    first = int(names[block.start][place])
    return all(
        looks[row] == looks[row + further]
        and _counting(names[row], names[row + further]) == place
        and (int(names[row][place]), int(names[row + further][place])) == (first, number)
        for row in block
    )


def _counting(one: Sequence[str], other: Sequence[str]) -> int | None:
    """Return the place of the number that alone differs between two names, in parts, and is higher in the second."""
    # Numbers stand in the odd places of what `re.split` returns.
    differ = [place for place, (a, b) in enumerate(zip(one, other)) if a != b]
    if len(one) != len(other) or len(differ) != 1 or differ[0] % 2 == 0:
        return None
    return differ[0] if int(one[differ[0]]) < int(other[differ[0]]) else None


def _numbered(name: Sequence[str], place: int, count: int) -> str:
    """Return the name of several rows: `block_0..11`."""
    parts = list(name)
    if count > 1:
        # With as many digits as the first has: `block_00..11`.
        parts[place] = f"{name[place]}..{str(int(name[place]) + count - 1).zfill(len(name[place]))}"
    return "".join(parts)


def _merged(rows: Sequence[Row], label: str) -> Row:
    """Return several rows that look alike as one."""
    inner = tuple(
        _merged(alike, label + alike[0].label.removeprefix(rows[0].label))
        for alike in zip(*(row.inner for row in rows))
    )
    return Row(label, tuple(info for row in rows for info in row.infos), inner)
