"""What a Keras user types and a trainer has under another name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Arguments of Keras' `fit`, `evaluate`, `predict` and `train_on_batch`, some of older versions.
ARGUMENTS = {
    "initial_epoch": "`epochs` counts epochs more, and `trainer.epoch` counts on by itself: leave it out",
    "return_dict": "logs are always a dict: leave it out",
    "reset_metrics": "metrics start anew with each epoch: leave it out",
    "workers": "a `keras.utils.PyDataset` has its own: pass it there",
    "use_multiprocessing": "a `keras.utils.PyDataset` has its own: pass it there",
    "max_queue_size": "a `keras.utils.PyDataset` has its own: pass it there",
}
# Attributes of a compiled `keras.Model`.
ATTRIBUTES = {
    "compile": "the loss, the optimizer and the metrics are options of the trainer: `tl.Trainer(model, policy, "
    "loss=..., optimizer=..., metrics=[...])`",
    "optimizer": "there may be several, with a state of their own for each group: read and set learning rates by "
    "`trainer.learning_rates[group]`",
    "metrics": "they are options of the trainer, and their values are in `trainer.history`",
    "loss": "it is an option of the trainer; override `compute_loss` for one of your own",
    "summary": "call `print(trainer.explain())`",
    "save_weights": "call `trainer.save('name.weights.h5')`",
    "load_weights": "call `trainer.load('name.weights.h5')`",
    "test_on_batch": "call `trainer.evaluate(x, y, verbose=0)`",
    "predict_on_batch": "call `trainer.predict(x)`",
    "test_step": "override `eval_step`",
    "make_train_function": "override `train_step`; the trainer compiles it",
    "call": "override `forward`",
    "get_layer": "call `trainer.model.get_layer(name)`",
    "layers": "read `trainer.model.layers`",
    "weights": "read `trainer.model.weights`",
    "trainable_variables": "read `trainer.selection.trained`",
    "trainable_weights": "read `trainer.selection.trained`",
    "trainable": "the policy says what trains: assign `trainer.policy`",
    "run_eagerly": "it is an option of the trainer",
    "steps_per_execution": "it is the trainer's option `steps_per_call`, which is chosen by itself",
    "fit_generator": "call `trainer.fit(generator)`",
}
_OPTION = "it is an option of the trainer. Make a new one for another value; `save` and `load` carry the run over"
# What Keras users assign to a model, and options of a trainer: as attributes they would do nothing.
ASSIGNED = {
    "optimizer": ATTRIBUTES["optimizer"],
    "learning_rate": "assign `trainer.learning_rates[group]`; without groups of your own, the group is 'default'",
    "trainable": ATTRIBUTES["trainable"],
    "steps_per_execution": ATTRIBUTES["steps_per_execution"],
    **dict.fromkeys(
        ("clip_norm", "nonfinite", "max_skipped", "remat", "jit_compile", "run_eagerly", "steps_per_call"), _OPTION
    ),
}


def check_no_others(method: Callable[..., Any], others: Mapping[str, Any]) -> None:
    """Check that a method of a trainer was given no arguments that it does not have.

    Args:
        method: The method.
        others: What it was given beside its own.

    Raises:
        TypeError: There are some.
    """
    for name in others:
        own = list(inspect.signature(method).parameters)
        said = f"`{method.__name__}` has no argument `{name}`"
        raise TypeError(f"{said}: {ARGUMENTS[name]}." if name in ARGUMENTS else f"{said}.{_nearest(name, own)}")


def missing(owner: object, name: str) -> str:
    """Return what to say of an attribute that a trainer does not have."""
    said = f"{type(owner).__name__!r} has no attribute {name!r}"
    if name in ATTRIBUTES:
        return f"{said}: {ATTRIBUTES[name]}."
    return f"{said}.{_nearest(name, [each for each in dir(type(owner)) if each[0] != '_'])}"


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""
