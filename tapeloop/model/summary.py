"""Tables in plain text: which submodels train or are frozen, by which rule and at what cost; the paths of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tapeloop._text import format_bytes
from tapeloop._validation import whole_number
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, SubmodelInfo, Tree, VariableInfo

HEADER = ("submodel", "parameters", "group", "state", "rule", "mode", "optimizer state")
RIGHT = {"parameters", "optimizer state"}


def explain(selection: Selection, state_bytes: Callable[[VariableInfo], int], depth: int = 3) -> str:
    """Return a table of a selection: a row for each submodel, totals last.

    Args:
        selection: The selection.
        state_bytes: The bytes of optimizer state held for a variable.
        depth: How many levels are shown. A submodel is unfolded only if its variables and submodels differ in group,
            rule or mode.

    Raises:
        ValueError: `depth` is no whole number of 1 or more.
    """
    shown = _unfold(selection, selection.tree.submodels[0], whole_number("depth", depth, 1))
    lines = table(HEADER, [_row(selection, each, state_bytes) for each in shown], RIGHT)
    variables, trained = selection.tree.variables, _size(selection.trained)
    total = _size(variables)
    penalized = [variable for variable in variables if variable.is_penalized]
    counted = sum(variable in selection.group_of for variable in penalized)
    lines += [
        "-" * max(map(len, lines)),
        f"parameters       {total:,}",
        f"  train          {trained:,} ({trained / total:.1%}) in {len(selection.groups)} "
        f"group{'s' * (len(selection.groups) > 1)}: {', '.join(selection.groups)}",
        f"  frozen         {_size(selection.frozen):,}",
        f"  non-trainable  {_size(selection.non_trainable):,} (statistics, seeds, Keras' flags)",
        f"optimizer state  {format_bytes(sum(map(state_bytes, variables)))}",
    ]
    if penalized:
        lines += [f"weight penalties {counted} count, {len(penalized) - counted} of frozen variables do not"]
    return "\n".join(lines)


def paths(model: Model) -> None:
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
    print("\n".join(_path_rows(Tree.of(model))))


def _path_rows(tree: Tree) -> list[str]:
    rows = [
        (all_paths(info), type(info.object).__name__, "", "")
        if isinstance(info, SubmodelInfo)
        else (all_paths(info), info.dtype, str(info.shape), keras_flag(info))
        for info in with_variables(tree)
    ]
    return table(("path", "type", "shape", "Keras' flag"), rows, set())


def with_variables(tree: Tree) -> list[SubmodelInfo | VariableInfo]:
    """List each submodel of a model with the variables directly in it, as a table of paths shows them."""
    rows: list[SubmodelInfo | VariableInfo] = []
    # The tree lists parents before children, in the order in which the model holds them: the order of the table.
    for submodel in tree.submodels:
        rows += [submodel, *_own_variables(tree, submodel)]
    return list(dict.fromkeys(rows))  # of a tied weight, the row under its first owner names all paths


def all_paths(info: SubmodelInfo | VariableInfo) -> str:
    """Return all paths of a submodel or variable in one line."""
    return " = ".join(path or "(model)" for path in info.paths)


def keras_flag(variable: VariableInfo) -> str:
    """Return whether Keras trains a variable, and why not if it is a seed."""
    return "trainable" if variable.trainable else "seed" if variable.seed else "non-trainable"


def _own_variables(tree: Tree, submodel: SubmodelInfo) -> list[VariableInfo]:
    """List the variables that are directly in a submodel, and in none of its children."""
    deeper = {variable for child in tree.children[submodel] for variable in tree.variables_in[child]}
    return [variable for variable in tree.variables_in[submodel] if variable not in deeper]


def _size(variables: Iterable[VariableInfo]) -> int:
    return sum(variable.size for variable in variables)


def _unfold(selection: Selection, submodel: SubmodelInfo, depth: int) -> list[SubmodelInfo | VariableInfo]:
    """List the children and variables of a submodel, and those of each child that differs inside, down to `depth`."""
    tree = selection.tree
    shown: list[SubmodelInfo | VariableInfo] = []
    for child in tree.children[submodel]:
        if tree.variables_in[child]:
            shown.append(child)
            # What is treated alike inside says all in one row: a deep model with a frozen backbone fits on a screen.
            if depth > 1 and _differs(selection, child):
                shown += _unfold(selection, child, depth - 1)
    return shown + _own_variables(tree, submodel)


def _differs(selection: Selection, submodel: SubmodelInfo) -> bool:
    """Tell whether the variables and submodels inside `submodel` are treated in more than one way."""
    variables = [variable for variable in selection.tree.variables_in[submodel] if variable.trainable]
    treatments = {(selection.group_of.get(variable), selection.rules[variable]) for variable in variables}
    inside = {s for variable in variables for s in variable.submodels if s.is_inside(submodel)}
    return len(treatments) > 1 or len({s in selection.inference for s in inside}) > 1


def _row(
    selection: Selection, shown: SubmodelInfo | VariableInfo, state_bytes: Callable[[VariableInfo], int]
) -> tuple[str, ...]:
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
        state = f"trains {_size(trained) / _size(variables):.1%}"
    return (
        shown.path,
        f"{_size(variables):,}",
        ", ".join(_unique(selection.group_of[variable] for variable in trained)) or "-",
        state,
        rules[0] if len(rules) == 1 else "mixed",
        "inference" if submodel in selection.inference else "train",
        format_bytes(sum(map(state_bytes, variables))),
    )


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: set[str]) -> list[str]:
    """Return the lines of a table.

    Args:
        header: The names of the columns.
        rows: Their cells.
        right: The names of those that are aligned to the right.
    """
    columns = []
    for column in zip(header, *rows):
        width, pad = max(map(len, column)), str.rjust if column[0] in right else str.ljust
        columns.append([pad(cell, width) for cell in column])
    lines = ["  ".join(row).rstrip() for row in zip(*columns)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
