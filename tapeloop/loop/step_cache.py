"""The steps of a trainer: made when they are first needed, kept for the selections used last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.folding.option import Folding
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree, raw
from tapeloop.step.accumulation import Microbatches
from tapeloop.step.metrics import StepMetrics, layer_metrics, renamed, reset
from tapeloop.step.plan import Planner, StepParts

MOST_STEPS = 64  # compiled steps kept, of those used last: a random policy has no end of selections


class StepCache:
    """Makes and keeps a trainer's steps, one for each kind and selection.

    Attributes:
        parts: What all of them share.
        folding: Whether their frozen parts are folded.
    """

    def __init__(self, parts: StepParts, microbatches: Microbatches, folding: Folding) -> None:
        self.parts = parts
        self.folding = folding
        self._microbatches = microbatches
        self._steps: dict[tuple[str, Selection], CompiledStep] = {}
        self._traces_gone = 0
        self._held: tuple[tuple[Tree, int], list[keras.metrics.Metric]] | None = None
        self._built: set[str] = set()  # the kinds of steps for which the model is built

    def get(self, kind: str, selection: Selection) -> CompiledStep:
        """Return the step of a kind for a selection: the same one each time."""
        # Two spellings of one policy share a step: selections are equal by variables and modes.
        step = self._steps.pop((kind, selection), None)
        if step is None:
            step = CompiledStep(Planner(kind, selection, self.parts), self._microbatches, self.folding)
        self._steps[kind, selection] = step  # the step used last stands last
        # Its compiled functions go, so that a random policy does not fill the memory; see `docs/notes.md` for what
        # stays.
        if len(self._steps) > MOST_STEPS:
            gone = self._steps.pop(next(iter(self._steps)))
            self._traces_gone += gone.trace_count * (gone.kind == "train")
        return step

    def trace_count(self) -> int:
        """Return how often training steps were traced."""
        return self._traces_gone + sum(step.trace_count for step in self._steps.values() if step.kind == "train")

    def start_fit(self) -> None:
        """Have what is found by trial be found anew."""
        for step in self._steps.values():
            step.try_again()

    def build(self, model: Model, specs: Callable[[], Iterator[Any]], kind: str = "train") -> None:
        """Make the variables of a model that makes them in its first call, by tracing a step that trains nothing.

        So are those of the layers and models among the trainer's own attributes.

        Args:
            model: The model.
            specs: Gives signatures of batches; the next is tried if a layer needs to know more than the first says.
            kind: The kind of the step: one that predicts needs no targets, and may leave parts unbuilt.
        """
        if self._built & {kind, "train"}:
            return
        tree = Tree.of(model)
        # Nobody can say whether a `tf.Module` is built; Keras layers say it themselves.
        modules = len(tree.submodels) - len(tree.layers) - isinstance(model, Mapping)
        is_built = not modules and all(submodel.object.built for submodel in tree.layers)
        # What the trainer holds beside it counts for training alone.
        if not is_built or (kind == "train" and self.parts.attributes.unbuilt()):
            for spec in specs():
                try:
                    self.parts.build_model(model, spec, kind)
                    break
                except (ValueError, TypeError) as error:
                    failure = error
            else:
                raise failure
        self._built.add(kind)

    def reset(self, kind: str, tree: Tree) -> None:
        """Reset what the steps of a kind log."""
        self.parts.means[kind].reset()
        if kind == "train":
            self.parts.updates.statistics.reset()
        self.parts.objective.reset()
        # A metric that a step returns may be kept nowhere else.
        returned = [m for (k, _), s in self._steps.items() if k == kind for m in s.planner.metrics.by_name.values()]
        for metric in dict.fromkeys([*self.parts.attributes.metrics(), *self._layer_metrics(tree), *returned]):
            reset(metric)

    def _layer_metrics(self, tree: Tree) -> list[keras.metrics.Metric]:
        """Return the metrics that layers hold; of a model of 1,000 layers it takes 3 ms to find that none does."""
        key = tree, self.parts.interventions.count
        if self._held is None or self._held[0] != key:
            self._held = key, layer_metrics(tree)
        return self._held[1]

    def forget(self) -> None:
        """Let go of all steps: what they update is gone."""
        self._traces_gone = self.trace_count()
        self._steps.clear()

    def log_variables(self, kind: str, selection: Selection) -> dict[str, tf.Variable]:
        """Return the variables of what a step has logged since the reset, by names that say what each belongs to."""
        parts, returned = self.parts, self.get(kind, selection).planner.metrics.by_name
        metrics = {
            **{f"attribute/{name}": metric for name, metric in parts.attributes.named_metrics().items()},
            **{f"layer/{number}": metric for number, metric in enumerate(layer_metrics(selection.tree))},
            **{f"returned/{name}": metric for name, metric in returned.items()},
        }
        held = {name: [raw(variable) for variable in metric.variables] for name, metric in metrics.items()}
        held |= {"compiled": parts.objective.variables, **parts.means[kind].named_variables()}
        held |= parts.updates.statistics.named_variables() if kind == "train" else {}
        return {f"{name}/{n}": variable for name, variables in held.items() for n, variable in enumerate(variables)}

    def logs(self, kind: str, logged: Iterable[StepMetrics]) -> tuple[dict[str, Any], int]:
        """Return what some steps of a kind logged since the reset, and over how many examples."""
        logs, examples = self.parts.means[kind].results()
        logged = list(logged)
        if any(each.uses_compiled for each in logged):
            logs |= renamed(self.parts.objective.results(), {name for each in logged for name in each.returned})
        for each in logged:
            logs |= each.results()
        if kind == "train":
            logs |= self.parts.updates.statistics.results()
        return {name: on_the_host(value) for name, value in logs.items()}, examples


def on_the_host(value: Any) -> Any:
    """Return a log as a number, or as an array if it has several."""
    value = np.asarray(value)
    return value if value.ndim else float(value)
