"""The steps of a trainer: made when they are first needed, kept for the selections used last."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._backend.patching import inlined_functions
from tapeloop.data.batch import Features, examples_of
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree
from tapeloop.optimization.updates import Updates
from tapeloop.step.atomic import Transaction
from tapeloop.step.clock import Clock
from tapeloop.step.compilation import Compilation
from tapeloop.step.metrics import StepMetrics, layer_metrics, metrics_in, renamed
from tapeloop.step.objective import Objective
from tapeloop.step.remat import Remat
from tapeloop.step.running_means import RunningMeans

MOST_STEPS = 64  # compiled steps kept, of those used last: a random policy has no end of selections


class CompiledTrainStep(CompiledStep):
    """A step that trains, wholly or not at all.

    Attributes:
        transaction: What sees to it.
    """

    def __init__(self, transaction: Transaction, compilation: Compilation, clock: Clock, remat: Remat) -> None:
        around = functools.partial(remat.applied, transaction.selection)
        ours = dataclasses.replace(compilation, autograph=False)  # the transaction has AutoGraph convert the user's
        selection, own, note = transaction.selection, transaction.own, transaction.note
        super().__init__("train", transaction.run, selection, ours, clock, around, own, note)
        self.transaction = transaction
        self._microbatches = transaction.microbatches.count

    @property
    def is_driven(self) -> bool:
        """Whether the host runs step by step, here also since it may have to repeat one."""
        return super().is_driven or self.transaction.microbatches.adapts

    def _whole(self, spec: Any) -> Any:
        return self.transaction.whole(spec)

    def _functions(self, traced: Any) -> list[Any]:
        self._used |= self.transaction.used
        return self.transaction.functions

    def _rest(self, features: Features) -> Any:
        return self.transaction.run(features, self._split)

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


class StepCache:
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
        clock: Clock,
        compilation: Compilation,
        remat: Remat,
        kept: Callable[[], list[tf.Variable]],
        others: Callable[[], list[tf.Variable]],
        is_plain: Callable[[], bool],
        attributes: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Keep what steps are made of.

        Args:
            bodies: What a step of each kind computes: `"train"`, `"eval"` and `"predict"`.
            objective: The loss and the metrics.
            updates: What becomes of gradients.
            clock: Where loops keep how far they have come.
            compilation: How steps are compiled.
            remat: What is computed twice to save memory.
            kept: Gives the variables that the trainer has among its own attributes.
            others: Gives these and those of the models that it has there.
            is_plain: Tells whether a training step has one update, which comes last.
            attributes: Gives the trainer's own attributes.
        """
        self.tracing: tuple[str, Selection] | None = None
        self.building = False
        self.means = {kind: RunningMeans() for kind in bodies}
        self._bodies = bodies
        self._objective = objective
        self._updates = updates
        self._clock = clock
        self._compilation = compilation
        self._remat = remat
        self._kept_variables = kept
        self._others = others
        self._is_plain = is_plain
        self._attributes = attributes
        self._metrics: dict[tuple[str, Selection], StepMetrics] = {}
        self._numbers: dict[tuple[str, Selection], dict[str, Any]] = {}
        self._kept: dict[tuple[str, Selection], CompiledStep] = {}
        self._traces_gone = 0
        self._built: set[str] = set()  # the kinds of steps for which the model is built

    @property
    def run_eagerly(self) -> bool:
        """Whether steps run op by op."""
        return self._compilation.run_eagerly

    def build(self, model: Model, specs: Callable[[], Iterator[Any]], kind: str = "train") -> None:
        """Make the variables of a model that makes them in its first call, by tracing a step that trains nothing.

        Args:
            model: The model.
            specs: Gives signatures of batches.
            kind: Which step is to run: one that predicts needs no targets, and may leave parts unbuilt.
        """
        if self._built & {kind, "train"}:
            return
        tree = Tree.of(model)
        modules = len(tree.submodels) - len(tree.layers) - isinstance(model, Mapping)
        if modules or not all(submodel.object.built for submodel in tree.layers):
            self.building = True
            try:
                self._trace_to_build(specs(), kind)
            finally:
                self.building = False
        self._built.add(kind)

    def train(self, selection: Selection) -> CompiledTrainStep:
        """Return the step that trains a selection: the same one each time."""
        step = self._kept.get(("train", selection))
        if not isinstance(step, CompiledTrainStep):
            body = functools.partial(self._body, "train", selection)
            parts = (
                self._updates,
                self._clock,
                self._objective,
                body,
                self.means["train"],
                self._kept_variables,
                self._others,
            )
            transaction = Transaction(selection, *parts, self._compilation, self._is_plain)
            step = CompiledTrainStep(transaction, self._compilation, self._clock, self._remat)
        return self._keep(step)

    def other(self, kind: str, selection: Selection) -> CompiledStep:
        """Return the step that evaluates or predicts under a selection: the same one each time."""
        step = self._kept.get((kind, selection))
        if step is None:
            body = functools.partial(self._other, kind, selection)
            step = CompiledStep(kind, body, selection, self._compilation, self._clock, own=self._kept_variables)
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
            keras_internals.forget_added_losses(submodel.object)
        logged = self._metrics.setdefault((kind, selection), StepMetrics())
        self._numbers.pop((kind, selection), None)
        self._objective.was_updated = False
        self.tracing = (kind, selection)
        try:
            with logged.watching(self._held_metrics(selection.tree)) as watch:
                result = self._bodies[kind](batch)
        finally:
            self.tracing = None
        logged.uses_compiled = self._objective.was_updated
        if kind == "predict":
            return result
        return logged.scalars(kind, result, watch, self._objective.results() if logged.uses_compiled else ())

    def _held_metrics(self, tree: Tree) -> list[Any]:
        """Return the metrics that the trainer has among its attributes, or a layer of the model has."""
        mine = [metric for value in self._attributes().values() for metric in metrics_in(value)]
        return list({id(metric): metric for metric in (*mine, *layer_metrics(tree))}.values())

    def reset(self, kind: str, tree: Tree) -> None:
        """Start what steps of a kind log anew."""
        self.means[kind].reset()
        self._objective.reset()
        returned = [m for (k, _), logged in self._metrics.items() if k == kind for m in logged.by_name.values()]
        for metric in {id(metric): metric for metric in (*self._held_metrics(tree), *returned)}.values():
            metric.reset_state()

    def take_logs(self, kind: str, selection: Selection) -> dict[str, Any]:
        """Return what a step logged on one batch, and start all that it logs anew: inside the step."""
        logged = self._metrics[kind, selection]
        logs: dict[str, Any] = dict(self.means[kind].take(logged.scalar_names))
        if logged.uses_compiled:
            logs |= renamed(self._objective.results(), logged.returned)
            self._objective.reset()
        for name, metric in logged.by_name.items():
            result = metric.result()
            logs |= result if isinstance(result, Mapping) else {name: result}
            metric.reset_state()
        return logs

    def logs(self, kind: str, selections: Iterable[Selection]) -> tuple[dict[str, Any], int]:
        """Return what the steps of a kind for some selections logged since the reset, and over how many examples."""
        logs, examples = self.means[kind].results()
        found = [self._metrics[kind, selection] for selection in selections if (kind, selection) in self._metrics]
        if any(logged.uses_compiled for logged in found):
            logs |= renamed(self._objective.results(), {name for logged in found for name in logged.returned})
        for logged in found:
            for name, metric in logged.by_name.items():
                result = metric.result()
                logs |= result if isinstance(result, Mapping) else {name: result}
        return {name: on_the_host(value) for name, value in logs.items()}, examples

    def note_number(self, name: str, value: Any) -> None:
        """Note that a step that is being traced has read a number among the trainer's attributes."""
        if self.tracing is not None and not tf.executing_eagerly():
            self._numbers.setdefault(self.tracing, {})[name] = value

    def warn_stale(self, step: CompiledStep) -> None:
        """Warn of numbers among the trainer's attributes that have changed since a step was traced with them."""
        read, now = self._numbers.get((step.kind, step.selection), {}), self._attributes()
        for name in [name for name, value in read.items() if name in now and not _is_same(now[name], value)]:
            warnings.warn(
                f"`self.{name}` was {read.pop(name)!r} when the {step.kind} step was traced, and is {now[name]!r} now: "
                f"the compiled step goes on with the former. Make it a variable, `self.{name} = "
                f"tf.Variable({now[name]!r}, trainable=False)`, and `assign` to it.",
                stacklevel=2,
            )

    def _trace_to_build(self, specs: Iterator[Any], kind: str) -> None:
        """Trace a step for batches of the first of some signatures, or where a layer needs to know more, the next."""

        def run(batch: Any) -> None:
            with inlined_functions():
                self._bodies[kind](batch)

        try:
            tf.function(run, autograph=self._compilation.autograph).get_concrete_function(next(specs))
        except (ValueError, TypeError):
            for spec in specs:
                self._trace_to_build(iter([spec]), kind)
                return
            raise


def on_the_host(value: Any) -> Any:
    """Return a log as a number, or as an array of several."""
    value = np.asarray(value)
    return value if value.ndim else float(value)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or bool(one == other) or (one != one and other != other)
