"""The steps of a trainer: made when they are first needed, kept for the selections used last."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from tapeloop import _compat
from tapeloop.batch import examples_of
from tapeloop.data import Batches
from tapeloop.frontier import Features
from tapeloop.modes import inlined_functions
from tapeloop.objective import Means, Objective
from tapeloop.remat import Remat
from tapeloop.selection import Selection
from tapeloop.step import Compilation, Step
from tapeloop.transaction import Transaction
from tapeloop.tree import Model, Tree
from tapeloop.updates import Updates

MOST_STEPS = 64  # compiled steps kept, of those used last: a random policy has no end of selections


class TrainStep(Step):
    """A step that trains, wholly or not at all.

    Attributes:
        transaction: What sees to it.
    """

    def __init__(self, transaction: Transaction, compilation: Compilation, remat: Remat) -> None:
        around = functools.partial(remat.applied, transaction.selection)
        ours = dataclasses.replace(compilation, autograph=False)  # the transaction has AutoGraph convert the user's
        super().__init__("train", transaction.run, transaction.selection, ours, around, transaction.own)
        self.transaction = transaction
        self._microbatches = transaction.microbatches.count

    @property
    def is_driven(self) -> bool:
        """Whether the host runs step by step, here also since it may have to repeat one."""
        return super().is_driven or self.transaction.microbatches.adapts

    def _whole(self, spec: Any) -> Any:
        return self.transaction.whole(spec)

    def _rest(self, features: Features) -> Any:
        return self.transaction.run(features, self._cut)

    def __call__(self, batch: Any) -> Any:
        """Train on a batch; where it runs out of memory and may, once more in smaller pieces."""
        microbatches = self.transaction.microbatches
        while microbatches.adapts:
            if self._microbatches != microbatches.count:
                self._microbatches = microbatches.count
                self.compile()
            if not self._compilation.run_eagerly:
                self._check(self._function, batch)
            kept = self.transaction.keep()
            try:
                return super().__call__(batch)
            except tf.errors.ResourceExhaustedError as error:
                self.transaction.out_of_memory(int(examples_of(batch)), error)
                kept.restore()
        return super().__call__(batch)


class Steps:
    """Makes and keeps a trainer's steps, each compiled once for a selection.

    Attributes:
        tracing: The kind and the selection of the step that is being traced, while one is.
        building: Whether a step is being traced only to build the model.
        means: The running means of what the steps of each kind return.
    """

    def __init__(
        self,
        bodies: Mapping[str, Callable[[Any], Any]],
        objective: Objective,
        updates: Updates,
        compilation: Compilation,
        remat: Remat,
        others: Callable[[], list[tf.Variable]],
        is_plain: Callable[[], bool],
    ) -> None:
        """Keep what steps are made of.

        Args:
            bodies: What a step of each kind computes: `"train"`, `"eval"` and `"predict"`.
            objective: The loss and the metrics.
            updates: What becomes of gradients.
            compilation: How steps are compiled.
            remat: What is computed twice to save memory.
            others: Gives the variables that the user keeps beside the model.
            is_plain: Tells whether a training step has one update, which comes last.
        """
        self.tracing: tuple[str, Selection] | None = None
        self.building = False
        self.means = {kind: Means() for kind in bodies}
        self._bodies = bodies
        self._objective = objective
        self._updates = updates
        self._compilation = compilation
        self._remat = remat
        self._others = others
        self._is_plain = is_plain
        self._kept: dict[tuple[str, Selection], Step] = {}
        self._traces_gone = 0
        self._built = False

    @property
    def run_eagerly(self) -> bool:
        """Whether steps run op by op."""
        return self._compilation.run_eagerly

    def build(self, model: Model, batches: Batches) -> None:
        """Make the variables of a model that makes them in its first call, by tracing a step that trains nothing."""
        if self._built:
            return
        tree = Tree.of(model)
        modules = len(tree.submodels) - len(tree.layers) - isinstance(model, Mapping)
        if modules or not all(submodel.object.built for submodel in tree.layers):
            self.building = True
            try:
                self._trace_to_build(batches.specs())
            finally:
                self.building = False
        self._built = True

    def train(self, selection: Selection) -> TrainStep:
        """Return the step that trains a selection: the same one each time."""
        step = self._kept.get(("train", selection))
        if not isinstance(step, TrainStep):
            body = functools.partial(self._body, "train", selection)
            parts = self._updates, self._objective, body, self.means["train"], self._others
            transaction = Transaction(selection, *parts, self._compilation, self._is_plain)
            step = TrainStep(transaction, self._compilation, self._remat)
        return self._keep(step)

    def other(self, kind: str, selection: Selection) -> Step:
        """Return the step that evaluates or predicts under a selection: the same one each time."""
        step = self._kept.get((kind, selection))
        if step is None:
            body = functools.partial(self._other, kind, selection)
            step = Step(kind, body, selection, self._compilation, own=self._others)
        return self._keep(step)

    def trace_count(self) -> int:
        """Return how often training steps were traced."""
        return self._traces_gone + sum(step.trace_count for step in self._kept.values() if step.kind == "train")

    def _keep(self, step: Any) -> Any:
        self._kept.pop((step.kind, step.selection), None)
        if len(self._kept) >= MOST_STEPS:
            gone = self._kept.pop(next(iter(self._kept)))
            self._traces_gone += gone.trace_count * (gone.kind == "train")
        self._kept[step.kind, step.selection] = step  # the one used last stands last
        return step

    def _other(self, kind: str, selection: Selection, batch: Any) -> Any:
        """What is compiled of a step that evaluates or predicts."""
        result = self._body(kind, selection, batch)
        if kind == "predict":
            return result
        self.means[kind].update(result, examples_of(batch))
        return None

    def _body(self, kind: str, selection: Selection, batch: Any) -> Any:
        """Run what the user wrote for a step of a kind."""
        for submodel in selection.tree.layers:
            _compat.forget_added_losses(submodel.object)
        self.tracing = (kind, selection)
        try:
            result = self._bodies[kind](batch)
        finally:
            self.tracing = None
        if kind != "predict" and not isinstance(result, Mapping):
            raise TypeError(f'`{kind}_step` must return a mapping `{{"name": scalar}}`. Received: {result!r}.')
        return result

    def _trace_to_build(self, specs: Iterator[Any]) -> None:
        """Trace a step for batches of the first of some signatures, or where a layer needs to know more, the next."""

        def run(batch: Any) -> None:
            with inlined_functions():
                self._bodies["train"](batch)

        try:
            tf.function(run, autograph=self._compilation.autograph).get_concrete_function(next(specs))
        except (ValueError, TypeError):
            for spec in specs:
                self._trace_to_build(iter([spec]))
                return
            raise
