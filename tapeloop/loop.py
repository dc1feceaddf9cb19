"""The loop: steps kept by selection, a model built by its first batch, an epoch run and its logs gathered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tapeloop import _compat
from tapeloop.data import Batches
from tapeloop.errors import DataError
from tapeloop.modes import inlined_functions
from tapeloop.objective import Objective, shapes
from tapeloop.progress import Progress
from tapeloop.selection import Selection
from tapeloop.step import Step
from tapeloop.tree import Model, Tree


@dataclass
class History:
    """What a fit recorded.

    Attributes:
        history: For each log, its value at the end of each epoch: a float, or an array for a metric that has several.
        epoch: The number of each epoch, counted over all fits of the trainer.
    """

    history: dict[str, list[Any]] = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)


class Loop:
    """Runs a trainer's steps, each compiled once for a selection.

    Attributes:
        tracing: The kind and the selection of the step that is being traced, while one is.
        building: Whether a step is being traced only to build the model.
        steps_done: How many steps were trained.
        epochs_done: How many epochs were trained.
    """

    def __init__(self, bodies: Mapping[str, Callable[[Any], Any]], objective: Objective, autograph: bool) -> None:
        self.tracing: tuple[str, Selection] | None = None
        self.building = False
        self.steps_done = 0
        self.epochs_done = 0
        self._bodies = bodies
        self._objective = objective
        self._autograph = autograph
        self._steps: dict[tuple[str, Selection], Step] = {}
        self._built = False

    def build(self, model: Model, batch: Any) -> None:
        """Make the variables of a model that makes them in its first call, by tracing a step that trains nothing."""
        if self._built:
            return
        tree = Tree.of(model)
        modules = len(tree.submodels) - len(tree.layers) - isinstance(model, Mapping)
        if modules or not all(submodel.object.built for submodel in tree.layers):
            self.building = True
            try:
                tf.function(self._traced_to_build, autograph=self._autograph).get_concrete_function(_any_size(batch))
            finally:
                self.building = False
        self._built = True

    def step(self, kind: str, selection: Selection) -> Step:
        """Return the step of a kind for a selection: the same one each time."""
        if (kind, selection) not in self._steps:
            body = functools.partial(self._traced, kind, selection)
            self._steps[kind, selection] = Step(kind, body, selection, self._autograph)
        return self._steps[kind, selection]

    def trace_count(self, kind: str) -> int:
        """Return how often steps of a kind were traced."""
        return sum(step.trace_count for (of_kind, _), step in self._steps.items() if of_kind == kind)

    def fit(
        self,
        prepare: Callable[[str, Batches], Step],
        batches: Batches,
        validation: Batches | None,
        epochs: int,
        shown: Progress,
    ) -> History:
        """Train for some epochs on `batches`, evaluating after each on `validation`, with the steps of `prepare`."""
        history = History()
        step = prepare("train", batches)
        if validation is not None and epochs:
            prepare("eval", validation).trace(validation.peek())
        for number in range(1, epochs + 1):
            logs = self.run(step, batches, shown, f"epoch {number}/{epochs}")
            self.epochs_done += 1
            if validation is not None:
                evaluated = self.run(prepare("eval", validation), validation, shown, "  validation")
                logs |= {f"val_{name}": value for name, value in evaluated.items()}
            history.epoch.append(self.epochs_done)
            for name, value in logs.items():
                history.history.setdefault(name, []).append(value)
        return history

    def run(self, step: Step, batches: Batches, shown: Progress, title: str) -> dict[str, Any]:
        """Run a step over one epoch of batches and return its logs."""
        step.means.reset()
        self._objective.reset()
        logs = functools.partial(self._logs, step)
        shown.start(title, batches.per_epoch)
        try:
            for batch in batches.epoch():
                step(batch)
                self.steps_done += step.kind == "train"
                shown.advance(int(_examples(batch)), logs)
            final = logs()
            shown.end(final)
        finally:
            shown.close()
        return final

    def _traced(self, kind: str, selection: Selection, batch: Any) -> Any:
        """What is compiled: the body of a step; what it returns goes to the running means where it is logs."""
        for submodel in selection.tree.layers:
            _compat.forget_added_losses(submodel.object)
        self.tracing = (kind, selection)
        try:
            result = self._bodies[kind](batch)
        finally:
            self.tracing = None
        if kind == "predict":
            return result
        if not isinstance(result, Mapping):
            raise TypeError(f'`{kind}_step` must return a mapping `{{"name": scalar}}`. Received: {result!r}.')
        weight = tf.cast(_examples(batch), keras.config.floatx())
        self.step(kind, selection).means.update(result, weight)
        return None

    def _traced_to_build(self, batch: Any) -> None:
        with inlined_functions():
            self._bodies["train"](batch)

    def _logs(self, step: Step) -> dict[str, Any]:
        values = {**step.means.results(), **self._objective.results()}
        return {name: value.numpy() if value.shape.rank else float(value) for name, value in values.items()}


def _any_size(batch: Any) -> Any:
    """Return the signature of batches of any size like this one: the size of the first is nobody's to keep."""

    def spec(value: Any) -> Any:
        if not isinstance(value, tf.Tensor) or not value.shape.rank:
            return value
        return tf.TensorSpec([None, *value.shape[1:]], value.dtype)

    return tf.nest.map_structure(spec, batch)


def _examples(batch: Any) -> Any:
    """Return how many examples a batch has: the first dimension of its first tensor."""
    for tensor in tf.nest.flatten(batch):
        if tensor is not None and tensor.shape.rank:
            return tf.shape(tensor)[0] if tensor.shape[0] is None else tensor.shape[0]
    raise DataError(f"A batch must hold a tensor with the batch as its first dimension. Received: {shapes(batch)}.")
