"""The loop: steps kept by selection, a model built by its first batch, an epoch run and its logs gathered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tapeloop import _compat
from tapeloop.data import Batches
from tapeloop.errors import DataError
from tapeloop.modes import inlined_functions
from tapeloop.objective import Means, Objective, shapes
from tapeloop.policy import VariablePolicy
from tapeloop.progress import Display
from tapeloop.selection import Selection
from tapeloop.step import Step
from tapeloop.tree import Model, Tree

MOST_STEPS = 64  # compiled steps kept, of those used last: a random policy has no end of selections


@dataclass(frozen=True)
class Phase:
    """A stretch of training during which one selection held.

    Attributes:
        step: The step at which it began, counted over all fits.
        epoch: The epoch in which it began, likewise.
        policy: The policy that held.
        selection: What trained.
    """

    step: int
    epoch: int
    policy: VariablePolicy
    selection: Selection = field(repr=False)


@dataclass(frozen=True)
class Due:
    """What trains next.

    Attributes:
        step: The compiled step.
        policy: The policy that it is for.
        every_steps: At which multiples of steps it is to be asked anew within an epoch, or None.
    """

    step: Step
    policy: VariablePolicy
    every_steps: int | None


@dataclass
class History:
    """What a fit recorded.

    Attributes:
        history: For each log, its value at the end of each epoch: a float, or an array for a metric that has several.
        epoch: The number of each epoch, counted over all fits of the trainer.
        phases: What trained from which step on.
    """

    history: dict[str, list[Any]] = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)


class LazyLogs(Mapping[str, Any]):
    """Logs that are fetched when somebody looks."""

    def __init__(self, fetch: Callable[[], Mapping[str, Any]]) -> None:
        self._fetch = functools.cache(fetch)

    def __getitem__(self, name: str) -> Any:
        return self._fetch()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetch())

    def __len__(self) -> int:
        return len(self._fetch())


class Loop:
    """Runs a trainer's steps, each compiled once for a selection.

    Attributes:
        tracing: The kind and the selection of the step that is being traced, while one is.
        building: Whether a step is being traced only to build the model.
        steps_done: How many steps were trained.
        epochs_done: How many epochs were trained.
        last_logs: The logs of the last epoch.
    """

    def __init__(self, bodies: Mapping[str, Callable[[Any], Any]], objective: Objective, autograph: bool) -> None:
        self.tracing: tuple[str, Selection] | None = None
        self.building = False
        self.steps_done = 0
        self.epochs_done = 0
        self.last_logs: Mapping[str, Any] = {}
        self._bodies = bodies
        self._objective = objective
        self._autograph = autograph
        self._steps: dict[tuple[str, Selection], Step] = {}
        self._means = {kind: Means() for kind in bodies}
        self._traces_gone = 0
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
        step = self._steps.pop((kind, selection), None)
        if step is None:
            body = functools.partial(self._traced, kind, selection)
            step = Step(kind, body, selection, self._autograph)
            if len(self._steps) >= MOST_STEPS:
                gone = self._steps.pop(next(iter(self._steps)))
                self._traces_gone += gone.trace_count * (gone.kind == "train")
        self._steps[kind, selection] = step  # the one used last stands last
        return step

    def trace_count(self) -> int:
        """Return how often training steps were traced."""
        return self._traces_gone + sum(step.trace_count for step in self._steps.values() if step.kind == "train")

    def fit(
        self,
        phases: Callable[[Mapping[str, Any], bool], Due],
        evaluation: Callable[[], Step],
        batches: Batches,
        validation: Batches | None,
        epochs: int,
        shown: Display,
    ) -> History:
        """Train for some epochs on `batches`, evaluating after each on `validation`.

        Args:
            phases: Gives what trains now, by the last logs; its second argument tells whether an epoch starts, for then
                the model is read anew.
            evaluation: Gives the step that evaluates.
            batches: What to train on.
            validation: What to evaluate on.
            epochs: How many epochs.
            shown: Where progress is shown.
        """
        history = History()

        def choose(logs: Mapping[str, Any], starting: bool = False) -> Due:
            due = phases(logs, starting)
            if not history.phases or history.phases[-1].selection != due.step.selection:
                history.phases.append(Phase(self.steps_done, self.epochs_done, due.policy, due.step.selection))
            return due

        for number in range(1, epochs + 1):
            due = choose(self.last_logs, starting=True)
            if validation is not None and number == 1:
                due.step.trace(batches.peek())
                evaluation().trace(validation.peek())
            logs = self.run(due.step, batches, shown, f"epoch {number}/{epochs}", due.every_steps, choose)
            if validation is not None:
                evaluated = self.run(evaluation(), validation, shown, "  validation")
                logs |= {f"val_{name}": value for name, value in evaluated.items()}
            self.epochs_done += 1
            self.last_logs = logs
            history.epoch.append(self.epochs_done)
            for name, value in logs.items():
                history.history.setdefault(name, []).append(value)
        return history

    def run(
        self,
        step: Step,
        batches: Batches,
        shown: Display,
        title: str,
        every_steps: int | None = None,
        choose: Callable[[Mapping[str, Any]], Due] | None = None,
    ) -> dict[str, Any]:
        """Run a step over one epoch of batches and return its logs; every so many steps, `choose` the step anew."""
        means = self._means[step.kind]
        means.reset()
        self._objective.reset()
        logs = functools.partial(self._logs, means)
        shown.start(title, batches.per_epoch)
        try:
            for number, batch in enumerate(batches.epoch()):
                if every_steps is not None and choose is not None and number and self.steps_done % every_steps == 0:
                    due = choose(LazyLogs(logs))
                    step, every_steps = due.step, due.every_steps
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
        self._means[kind].update(result, weight)
        return None

    def _traced_to_build(self, batch: Any) -> None:
        with inlined_functions():
            self._bodies["train"](batch)

    def _logs(self, means: Means) -> dict[str, Any]:
        values = {**means.results(), **self._objective.results()}
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
