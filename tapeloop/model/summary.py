"""Tables in plain text: which submodels train or are frozen, by which rule and at what cost; the paths of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from tapeloop._table import Table, format_bytes, table
from tapeloop._validation import whole_number
from tapeloop.model.rows import Info, Row, folded, own_variables, unfolded
from tapeloop.model.tree import AnyModel, SubmodelInfo, Tree, VariableInfo

HEADER = ("submodel", "parameters", "group", "state", "rule", "mode", "optimizer state")
RIGHT = {"parameters", "optimizer state"}


class Selected(Protocol):
    """What is shown of a `Selection`, which shows itself by this file."""

    @property
    def tree(self) -> Tree:
        """The model."""

    @property
    def groups(self) -> Mapping[str, tuple[VariableInfo, ...]]:
        """What trains, by group."""

    @property
    def group_of(self) -> Mapping[VariableInfo, str]:
        """The group of each variable that trains."""

    @property
    def trained(self) -> tuple[VariableInfo, ...]:
        """What trains."""

    @property
    def frozen(self) -> tuple[VariableInfo, ...]:
        """What could train and is in no group."""

    @property
    def non_trainable(self) -> tuple[VariableInfo, ...]:
        """What Keras itself never trains."""

    @property
    def inference(self) -> tuple[SubmodelInfo, ...]:
        """What runs in inference mode."""

    @property
    def rules(self) -> Mapping[VariableInfo, str]:
        """By which rule each variable trains or not."""


def explain(selection: Selected, state_bytes: Callable[[VariableInfo], int] | None = None, depth: int = 3) -> Table:
    """Return a table of a selection: a row for each submodel, with repeated ones in one row, totals last.

    Args:
        selection: The selection.
        state_bytes: The bytes of optimizer state held for a variable; without it, none are shown.
        depth: How many levels are shown. A submodel is unfolded only if its variables and submodels differ in group,
            rule or mode.

    Raises:
        ValueError: `depth` is no whole number of 1 or more.
    """
    tree, depth = selection.tree, whole_number("depth", depth, 1)

    @functools.cache
    def cells(info: Info) -> tuple[str, ...]:
        return _cells(selection, info, state_bytes)

    # What is treated alike inside says all in one row: a deep model with a frozen backbone fits on a screen.
    rows = folded(unfolded(tree, tree.submodels[0], lambda submodel: _differs(selection, submodel), depth), cells)
    header = HEADER if state_bytes is not None else HEADER[:-1]
    shown = [_line(row, header, cells(row.infos[0])) for outer in rows for row in outer.flat()]
    return table(header, shown, RIGHT, _totals(selection, state_bytes))


def _line(row: Row, header: tuple[str, ...], cells: tuple[str, ...]) -> tuple[str, ...]:
    """Return the cells of a row, with its name; of several submodels, with what each of them has, so many times."""
    times = f"{len(row.infos)} x " if len(row.infos) > 1 else ""
    return (row.label, *(times * (name in RIGHT and cell != "0 B") + cell for name, cell in zip(header[1:], cells)))


def _totals(selection: Selected, state_bytes: Callable[[VariableInfo], int] | None) -> list[tuple[str, str]]:
    variables, trained = selection.tree.variables, size_of(selection.trained)
    total, groups = size_of(variables), list(selection.groups)
    totals = [
        ("parameters", f"{total:,}"),
        (
            "  train",
            f"{trained:,} ({trained / max(total, 1):.1%}) in {len(groups)} group{'s' * (len(groups) != 1)}"
            f"{': ' * bool(groups)}{', '.join(groups)}",
        ),
        ("  frozen", f"{size_of(selection.frozen):,}"),
        ("  non-trainable", f"{size_of(selection.non_trainable):,} (statistics, seeds, Keras' flags)"),
    ]
    if state_bytes is not None:
        totals += [("optimizer state", format_bytes(sum(map(state_bytes, variables))))]
    penalized = [variable for variable in variables if variable.is_penalized]
    if penalized:
        counted = sum(variable in selection.group_of for variable in penalized)
        totals += [("weight penalties", f"{counted} count, {len(penalized) - counted} of frozen variables do not")]
    return totals


def paths(model: AnyModel) -> None:
    """Print the paths of a model, for filters to match: a row for each submodel and variable.

    Args:
        model: A Keras model or layer, a `tf.Module`, or a mapping from names to such. A model that makes its variables
            in its first call shows them after that call.

    Raises:
        TypeError: `model` is none of these.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> tl.paths(model)
        path         type        shape   Keras' flag
        --------------------------------------------
        (model)      Sequential
        base         Dense
        base/kernel  float32     (4, 3)  trainable
        base/bias    float32     (3,)    trainable
        head         Dense
        head/kernel  float32     (3, 2)  trainable
        head/bias    float32     (2,)    trainable
    """
    print(table(("path", "type", "shape", "Keras' flag"), _path_rows(Tree.of(model))))


def _path_rows(tree: Tree) -> list[tuple[str, ...]]:
    return [
        (all_paths(info), type(info.object).__name__, "", "")
        if isinstance(info, SubmodelInfo)
        else (all_paths(info), info.dtype, str(info.shape), keras_flag(info))
        for info in with_variables(tree)
    ]


def with_variables(tree: Tree) -> list[SubmodelInfo | VariableInfo]:
    """List each submodel of a model with the variables directly in it, as a table of paths shows them."""
    rows: list[SubmodelInfo | VariableInfo] = []
    # The tree lists parents before children, in the order in which the model holds them: the order of the table.
    for submodel in tree.submodels:
        rows += [submodel, *own_variables(tree, submodel)]
    return list(dict.fromkeys(rows))  # of a tied weight, the row under its first owner names all paths


def all_paths(info: SubmodelInfo | VariableInfo) -> str:
    """Return all paths of a submodel or variable in one line."""
    return " = ".join(path or "(model)" for path in info.paths)


def size_of(variables: Iterable[VariableInfo]) -> int:
    """Return how many numbers these variables hold."""
    return sum(variable.size for variable in variables)


def keras_flag(variable: VariableInfo) -> str:
    """Return whether Keras trains a variable, and why not if it is a seed."""
    return "trainable" if variable.trainable else "seed" if variable.seed else "non-trainable"


def _differs(selection: Selected, submodel: SubmodelInfo) -> bool:
    """Tell whether the variables and submodels inside `submodel` are treated in more than one way."""
    variables = [variable for variable in selection.tree.variables_in[submodel] if variable.trainable]
    treatments = {(selection.group_of.get(variable), selection.rules[variable]) for variable in variables}
    inside = {s for variable in variables for s in variable.submodels if s.is_inside(submodel)}
    return len(treatments) > 1 or len({s in selection.inference for s in inside}) > 1


def _cells(selection: Selected, shown: Info, state_bytes: Callable[[VariableInfo], int] | None) -> tuple[str, ...]:
    """Return what a row says of a submodel or variable, after its name."""
    # A variable of its own runs in the mode of the innermost submodel that holds it.
    submodel = shown if isinstance(shown, SubmodelInfo) else shown.submodels[-1]
    variables = (shown,) if isinstance(shown, VariableInfo) else selection.tree.variables_in[shown]
    # Statistics and seeds do not train anyway: they say something only of a submodel that has nothing else.
    deciding = [variable for variable in variables if variable.trainable] or list(variables)
    trained = [variable for variable in deciding if variable in selection.group_of]
    rules = _unique(selection.rules[variable] for variable in deciding)
    if not trained:
        state = "frozen" if deciding[0].trainable else "non-trainable"
    elif len(trained) == len(deciding):
        state = "trains"
    else:
        state = f"trains {size_of(trained) / size_of(variables):.1%}"
    return (
        f"{size_of(variables):,}",
        ", ".join(_unique(selection.group_of[variable] for variable in trained)) or "-",
        state,
        rules[0] if len(rules) == 1 else "mixed",
        "inference" if submodel in selection.inference else "train",
        *([] if state_bytes is None else [format_bytes(sum(map(state_bytes, variables)))]),
    )


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
