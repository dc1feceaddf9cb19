"""What the command line answers about models: their paths, what trains, where a feature cache would cut them.

The one file of the command line that needs TensorFlow, whose import takes seconds.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import keras
import tensorflow as tf

from tapeloop import _public
from tapeloop.cli.answer import Answer, BadUsage, table
from tapeloop.cli.references import is_reference, object_at, value_of
from tapeloop.errors import TapeloopError
from tapeloop.model.filters import glob
from tapeloop.model.selection import Selection
from tapeloop.model.summary import all_paths, keras_flag, size_of, with_variables
from tapeloop.model.tree import Model, SubmodelInfo, Tree, VariableInfo
from tapeloop.policies.base import VariablePolicy
from tapeloop.policies.resolve import near_paths, nearest
from tapeloop.trainer import Trainer

PATHS = ("path", "type", "shape", "parameters", "Keras' flag")
POLICY = 'a policy such as `Freeze("backbone")`, or the `package.module:name` of one'
# What an expression on the command line may name, beside Python's own.
NAMES = {"keras": keras} | {name: getattr(_public, name) for name in _public.__all__}


def paths(model: str, pattern: str | None) -> Answer:
    """Return the paths of a model, or the variables that a glob matches.

    Args:
        model: The user's model, as the command line names it.
        pattern: The glob.

    Raises:
        BadUsage: There is no such model, or the glob is none.
    """
    tree = Tree.of(_model(model))
    if pattern is None:
        rows = with_variables(tree)
        # A model that makes its variables in its first call has none before.
        remedy = [] if tree.variables else ["Call it on a batch first, in the function that makes it."]
        shown = [_path_table(tree, rows), "", _counted(tree.variables), *remedy]
        return Answer(shown, {"paths": [_path_data(tree, each) for each in rows]})
    try:
        filter_ = glob(pattern)
    except ValueError as error:
        raise BadUsage(str(error)) from error
    matches = [variable for variable in tree.variables if filter_(variable)]
    data = {"glob": pattern, "matches": [_path_data(tree, each) for each in matches]}
    if not matches:
        weightless = [submodel.path for submodel in tree.submodels if filter_.identifies(submodel, tree)]
        near = near_paths(filter_, tree)
        hint = f"`{weightless[0]}` has no variables." if weightless else nearest(near, tree)
        return Answer([f"{filter_!r} matches no variable of the model. {hint}"], {**data, "near": near}, is_wrong=True)
    return Answer((_path_table(tree, matches), "", f"{pattern!r} matches {_counted(matches)}"), data)


def explain(model: str, policy: str, optimizer: str, depth: int) -> Answer:
    """Return what trains of a model, and at what cost.

    Args:
        model: The user's model, as the command line names it.
        policy: The policy, likewise.
        optimizer: The name of Keras' optimizer.
        depth: The number of levels of submodels that the table shows.

    Raises:
        BadUsage: There is no such model, policy or optimizer.
        PolicyError: The policy cannot be resolved for the model.
    """
    trainer = _trainer(model, policy, optimizer=optimizer)
    selection = trainer.selection
    state_bytes = functools.partial(trainer.state.optimizers.expected_bytes, selection)
    return Answer(
        (trainer.explain(depth),), {"policy": repr(trainer.policy), **_selection_data(selection, state_bytes)}
    )


def frontier(model: str, policy: str, data: str, loss: str, batch_size: int) -> Answer:
    """Return the part of a training step that a feature cache computes once for each example.

    Args:
        model: The user's model, as the command line names it.
        policy: The policy, likewise.
        data: The data, likewise.
        loss: The loss, likewise; or `auto`, or the name of one of Keras' losses.
        batch_size: Examples per batch, for arrays.

    Raises:
        BadUsage: There is no such model, policy, data or loss.
        TapeloopError: The model, the data, the loss and the policy do not fit together.
    """
    trainer, batches = _trainer(model, policy, loss=_loss(loss)), object_at("--data", data)
    try:
        found = trainer.frontier(batches, batch_size=batch_size)
    except ValueError as error:
        if isinstance(error, TapeloopError):
            raise
        raise TapeloopError(str(error)) from error  # only a batch shows that there is no loss
    # A step without a frontier is an answer too, and the one that scripts ask for by the exit status.
    return Answer((str(found),), {**asdict(found), "bytes": found.bytes}, is_wrong=not found)


def _trainer(model: str, policy: str, **options: Any) -> Trainer:
    # Both have been looked at by now: what a trainer still refuses is an option, or how the model was made.
    given = _model(model), _policy(policy)
    try:
        return Trainer(*given, ignore_model_step=True, **options)
    except (TypeError, ValueError) as error:
        raise BadUsage(str(error)) from error


def _model(reference: str) -> Model:
    found = object_at("MODEL", reference, lambda found: isinstance(found, (keras.Layer, tf.Module, Mapping)))
    try:
        Tree.of(found)
    except TypeError as error:
        raise BadUsage(f"MODEL: `{reference}` gives no model. {error}") from error
    return found


def _policy(text: str) -> VariablePolicy:
    if is_reference(text):
        found = object_at("--policy", text, lambda found: isinstance(found, VariablePolicy))
    else:
        found = value_of("--policy", text, NAMES)
    if not isinstance(found, VariablePolicy):
        raise BadUsage(f"--policy must be {POLICY}. Received: {text!r}, which gives {found!r}.")
    return found


def _loss(text: str) -> Any:
    if text == "auto":
        return loss_by_shapes
    if is_reference(text):
        # A function is the loss itself, and is not called; a class of Keras' losses is made without arguments.
        return object_at("--loss", text, lambda found: not isinstance(found, type))
    if text.isidentifier() and not keyword.iskeyword(text):
        return text  # the trainer knows Keras' names
    return value_of("--loss", text, NAMES)


def loss_by_shapes(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Return the squared error if targets have the shape of an output, the cross-entropy if they may be its classes.

    Where a step can be cut depends on what is frozen, and not on which loss it has.

    Args:
        targets: Of the shape of the outputs, or of theirs without the last dimension, which may also be 1.
        outputs: The outputs.

    Returns:
        The losses of the examples.

    Raises:
        ValueError: The targets have another shape.
    """
    if targets.shape.is_compatible_with(outputs.shape):
        return keras.losses.mean_squared_error(targets, outputs)
    classes = outputs.shape[:-1]
    if targets.shape.is_compatible_with(classes) or targets.shape.is_compatible_with([*classes, 1]):
        return keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True)
    raise ValueError("no default loss fits these shapes: give one by --loss")


def _counted(variables: list[VariableInfo] | tuple[VariableInfo, ...]) -> str:
    count = len(variables)
    return f"{count:,} variable{'s' * (count != 1)}, {size_of(variables):,} parameters"


def _path_table(tree: Tree, rows: list[Any]) -> Any:
    cells = []
    for info in rows:
        entry = _path_data(tree, info)
        shape = "" if entry["shape"] is None else str(tuple(entry["shape"]))
        flag = keras_flag(info) if isinstance(info, VariableInfo) else ""
        cells.append((all_paths(info), entry["type"], shape, f"{entry['parameters']:,}", flag))
    return table(PATHS, cells, right={"parameters"})


def _path_data(tree: Tree, info: SubmodelInfo | VariableInfo) -> dict[str, Any]:
    if isinstance(info, VariableInfo):
        said = {"kind": "variable", "type": info.dtype, "shape": list(info.shape), "parameters": info.size}
        return {"path": info.path, **said, "keras_flag": keras_flag(info), "paths": list(info.paths)}
    size = size_of(tree.variables_in[info])
    said = {"kind": "submodel", "type": type(info.object).__name__, "shape": None, "parameters": size}
    return {"path": info.path, **said, "keras_flag": None, "paths": list(info.paths)}


def _selection_data(selection: Selection, state_bytes: Any) -> dict[str, Any]:
    variables = []
    for variable in selection.tree.variables:
        group = selection.group_of.get(variable)
        state = "trains" if group is not None else "frozen" if variable.trainable else "non-trainable"
        said = {"state": state, "group": group, "rule": selection.rules[variable], "parameters": variable.size}
        variables.append({"path": variable.path, **said, "optimizer_state_bytes": state_bytes(variable)})
    counts = {
        "total": selection.tree.variables,
        "train": selection.trained,
        "frozen": selection.frozen,
        "non_trainable": selection.non_trainable,
    }
    return {
        "parameters": {name: size_of(some) for name, some in counts.items()},
        "optimizer_state_bytes": sum(variable["optimizer_state_bytes"] for variable in variables),
        "groups": {
            group: {"parameters": size_of(some), "multiplier": selection.multipliers.get(group, 1.0)}
            for group, some in selection.groups.items()
        },
        "inference": [submodel.path for submodel in selection.inference],
        "variables": variables,
    }
