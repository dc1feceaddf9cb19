"""Tables in plain text of what trains, what is frozen, by which rule and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tapeloop._validation import whole_number
from tapeloop.model.filters import is_inside
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, SubmodelInfo, Tree, VariableInfo

HEADER = ("submodel", "parameters", "group", "state", "rule", "mode", "optimizer state")
RIGHT = {"parameters", "optimizer state"}


def explain(selection: Selection, state_bytes: Callable[[VariableInfo], int], depth: int = 3) -> str:
    """Return a table of what trains, a row a submodel, totals last.

    Args:
        selection: What trains.
        state_bytes: The bytes of optimizer state held for a variable.
        depth: How many levels are shown. Below the first, a submodel is unfolded only where what it holds differs
            in group, rule or mode.

    Raises:
        ValueError: `depth` is no whole number of 1 or more.
    """
    unfolded = _unfold(selection, selection.tree.submodels[0], whole_number("depth", depth, 1))
    rows = [_row(selection, shown, state_bytes) for shown in unfolded]
    everything = selection.tree.variables
    trained = sum(variable.size for variable in selection.trained)
    total = sum(variable.size for variable in everything)
    held_by_keras = sum(variable.size for variable in selection.non_trainable)
    lines = _table(HEADER, rows, RIGHT)
    width = max(map(len, lines))
    return "\n".join(
        [
            *lines,
            "-" * width,
            f"parameters       {total:,}",
            f"  train          {trained:,} ({trained / total:.1%}) in {len(selection.groups)} "
            f"group{'s' * (len(selection.groups) > 1)}: {', '.join(selection.groups)}",
            f"  frozen         {sum(v.size for v in selection.frozen):,}",
            f"  non-trainable  {held_by_keras:,} (statistics, seeds, Keras' flags)",
            f"optimizer state  {format_bytes(sum(map(state_bytes, everything)))}",
            *_penalties(selection),
        ]
    )


def paths(model: Model) -> None:
    """Print what there is to match in a model: a row for each submodel and variable, with type, shape and flag.

    Args:
        model: A Keras model or layer, a `tf.Module`, or a mapping from names to such. One that makes its variables in
            its first call shows them after it.

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
    rows = []
    shown: set[SubmodelInfo | VariableInfo] = set()

    def unfold(submodel: SubmodelInfo) -> None:
        if submodel in shown:
            return
        shown.add(submodel)
        rows.append((_all_paths(submodel), type(submodel.object).__name__, "", ""))
        inside = tree.children[submodel]
        deeper = {variable for child in inside for variable in tree.held[child]}
        for variable in tree.held[submodel]:
            if variable not in deeper and variable not in shown:
                shown.add(variable)
                flag = "trainable" if variable.trainable else "seed" if variable.seed else "non-trainable"
                rows.append((_all_paths(variable), variable.dtype, str(variable.shape), flag))
        for child in inside:
            unfold(child)

    unfold(tree.submodels[0])
    return _table(("path", "type", "shape", "Keras' flag"), rows, set())


def _all_paths(found: SubmodelInfo | VariableInfo) -> str:
    return " = ".join(path or "(model)" for path in found.paths)


def _penalties(selection: Selection) -> list[str]:
    """Say which weight penalties count, where there are any."""
    penalized = [variable for variable in selection.tree.variables if variable.is_penalized]
    counted = sum(variable in selection.group_of for variable in penalized)
    left_out = len(penalized) - counted
    return [f"weight penalties {counted} count, {left_out} of frozen variables do not"] if penalized else []


def format_bytes(count: int) -> str:
    """Say a number of bytes in the largest fitting unit: `1.5 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _unfold(selection: Selection, submodel: SubmodelInfo, depth: int) -> list[SubmodelInfo | VariableInfo]:
    """List what is directly in `submodel`, and below it what is in those that differ inside, down to `depth`."""
    tree = selection.tree
    inside = [child for child in tree.children[submodel] if tree.held[child]]
    held = {variable for child in inside for variable in tree.held[child]}
    shown: list[SubmodelInfo | VariableInfo] = []
    for child in inside:
        shown.append(child)
        if depth > 1 and _differs(selection, child):
            shown += _unfold(selection, child, depth - 1)
    return shown + [variable for variable in tree.held[submodel] if variable not in held]


def _differs(selection: Selection, submodel: SubmodelInfo) -> bool:
    """Tell whether the variables and submodels inside `submodel` are treated in more than one way."""
    held = [variable for variable in selection.tree.held[submodel] if variable.trainable]
    modes = {
        inner in selection.inference for variable in held for inner in variable.submodels if is_inside(inner, submodel)
    }
    return (
        len({(selection.group_of.get(variable), selection.rules[variable]) for variable in held}) > 1 or len(modes) > 1
    )


def _row(
    selection: Selection, shown: SubmodelInfo | VariableInfo, state_bytes: Callable[[VariableInfo], int]
) -> tuple[str, ...]:
    submodel = shown if isinstance(shown, SubmodelInfo) else shown.submodels[-1]
    held = (shown,) if isinstance(shown, VariableInfo) else selection.tree.held[shown]
    deciding = [variable for variable in held if variable.trainable] or list(held)
    trained = [variable for variable in deciding if variable in selection.group_of]
    rules = _unique(selection.rules[variable] for variable in deciding)
    return (
        shown.path,
        f"{sum(variable.size for variable in held):,}",
        ", ".join(_unique(selection.group_of[variable] for variable in trained)) or "-",
        _state(held, deciding, trained),
        rules[0] if len(rules) == 1 else "mixed",
        "inference" if submodel in selection.inference else "train",
        format_bytes(sum(map(state_bytes, held))),
    )


def _state(held: Sequence[VariableInfo], deciding: Sequence[VariableInfo], trained: Sequence[VariableInfo]) -> str:
    if not trained:
        return "frozen" if any(variable.trainable for variable in deciding) else "non-trainable"
    if len(trained) == len(deciding):
        return "trains"
    return f"trains {sum(v.size for v in trained) / sum(v.size for v in held):.1%}"


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: set[str]) -> list[str]:
    cells = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width) for cell, width, name in zip(row, widths, header)
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
