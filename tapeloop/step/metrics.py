"""What a step logs: the scalars that it returns, and the metrics that it returns or updates."""

from __future__ import annotations

import contextlib
import numbers
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop._backend import keras_internals, tracing
from tapeloop._backend.patching import all_patched
from tapeloop._backend.variables import assign, read
from tapeloop._search import search
from tapeloop.model.tree import Tree, raw


class StepMetrics:
    """The metrics that one step logs beside its scalars.

    Attributes:
        by_name: Those that it returned, under the names that it gave, and those that it updated, under their own.
        uses_compiled: Whether it updates the metrics that the trainer was made with.
        returned: The names that it returned.
        scalar_names: Those of them that are scalars, in their order.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, keras.metrics.Metric] = {}
        self.uses_compiled = False
        self.returned: frozenset[str] = frozenset()
        self.scalar_names: tuple[str, ...] = ()

    @contextlib.contextmanager
    def watching(self, held: Iterable[keras.metrics.Metric]) -> Iterator[Watch]:
        """Note inside this context which of some metrics are updated, and what is read of them."""
        # On each metric itself: a layer may update its own metric deep inside of its `call`.
        watch = Watch(held)
        updating = [(metric, "update_state", watch.updating(metric)) for metric in watch.held]
        reading = [(metric, "result", watch.reading(metric)) for metric in watch.held]
        with all_patched([*updating, *reading]):
            yield watch

    def scalars(self, kind: str, returned: Any, watch: Watch, compiled: Iterable[str]) -> dict[str, Any]:
        """Return the scalars of what a step returned, having noted its metrics.

        Args:
            kind: `"train"` or `"eval"`.
            returned: What the step returned.
            watch: What was noted while it ran.
            compiled: The names of the metrics that the trainer was made with.

        Raises:
            TypeError: It is no mapping from names to scalars and metrics, or one of the scalars is read of a metric.
        """
        if not isinstance(returned, Mapping):
            raise TypeError(f'`{kind}_step` must return a mapping `{{"name": scalar}}`. Received: {returned!r}.')
        # Metrics are told from scalars by their class: a scalar is averaged over the epoch, a metric speaks for itself.
        metrics = {name: value for name, value in returned.items() if isinstance(value, keras.metrics.Metric)}
        scalars = {name: value for name, value in returned.items() if name not in metrics}
        for name, value in scalars.items():
            _check_scalar(kind, name, value)
        _check_not_read(kind, scalars, [*watch.held, *metrics.values()], watch)
        self.returned, self.scalar_names = frozenset(returned), tuple(scalars)
        self.by_name = {**metrics}
        taken = {*returned, *(compiled if self.uses_compiled else ())}
        # A metric that was updated and not returned is logged under its own name, or the next that is free.
        for metric in watch.updated:
            if metric not in self.by_name.values():
                name = _free(metric.name, taken)
                self.by_name[name] = metric
                taken.add(name)
        return scalars

    def results(self) -> dict[str, Any]:
        """Return what its metrics say; a metric may say several things."""
        logs: dict[str, Any] = {}
        for name, metric in self.by_name.items():
            result = result_of(metric)
            logs |= result if isinstance(result, Mapping) else {name: result}
        return logs


class Watch:
    """What a step does with metrics while it is traced, or run eagerly.

    Attributes:
        held: The metrics that are watched.
        updated: Those that it updated.
        results: What was read of them, by identity, with what keeps each alive.
    """

    def __init__(self, held: Iterable[keras.metrics.Metric]) -> None:
        self.held = list(held)
        self.updated: list[keras.metrics.Metric] = []
        self.results: dict[int, Any] = {}

    def updating(self, metric: keras.metrics.Metric) -> Any:
        """Return what notes that a metric is updated, and updates it."""
        update = metric.update_state

        def shadow(*args: Any, **kwargs: Any) -> Any:
            if metric not in self.updated:
                self.updated.append(metric)
            return update(*args, **kwargs)

        return shadow

    def reading(self, metric: keras.metrics.Metric) -> Any:
        """Return what notes that a metric is read, and reads it."""
        read = metric.result

        def shadow(*args: Any, **kwargs: Any) -> Any:
            result = read(*args, **kwargs)
            self.results |= {id(value): value for value in tf.nest.flatten(result)}
            return result

        return shadow


def _free(name: str, taken: Collection[str]) -> str:
    """Return a name that nothing else is logged under: `act`, `act_1`, `act_2`."""
    candidates = (name, *(f"{name}_{number}" for number in range(1, 2 + len(taken))))
    return next(candidate for candidate in candidates if candidate not in taken)


def renamed(logs: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return logs, those under a name that is taken under a free one."""
    found: dict[str, Any] = {}
    for name, value in logs.items():
        found[_free(name, {*taken, *found})] = value
    return found


# The variables of Keras' own metrics, each with the value that Keras resets it to.
_STARTS: weakref.WeakKeyDictionary[keras.metrics.Metric, list[tuple[tf.Variable, tf.Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def is_keras_own(metric: keras.metrics.Metric) -> bool:
    """Tell whether a metric is reset by Keras' own code."""
    return type(metric).reset_state.__module__.startswith("keras.") and "reset_state" not in vars(metric)


def reset(metric: keras.metrics.Metric) -> None:
    """Reset a metric; one of Keras' own by its variables, since Keras takes 0.15 ms for each (`docs/notes.md`)."""
    if not is_keras_own(metric) or not tf.executing_eagerly():
        metric.reset_state()
        return
    variables, start = [raw(variable) for variable in metric.variables], _STARTS.get(metric, [])
    if list(map(id, variables)) == [id(variable) for variable, _ in start]:
        for variable, value in start:
            assign(variable, value)
        return
    metric.reset_state()
    _STARTS[metric] = [(variable, tf.identity(variable)) for variable in variables]


def result_of(metric: keras.metrics.Metric) -> Any:
    """Return what a metric says; one of Keras' means by its variables, since Keras takes 0.2 ms for each."""
    is_mean = type(metric).result is keras.metrics.Mean.result
    if not is_mean or "result" in vars(metric) or not tf.executing_eagerly():
        return metric.result()
    total, count = raw(metric.total), raw(metric.count)
    # A subclass may keep anything under these names, and Keras casts.
    are_variables = isinstance(total, tf.Variable) and isinstance(count, tf.Variable)
    if not are_variables or not total.dtype == count.dtype == metric.dtype:
        return metric.result()
    return tf.raw_ops.DivNoNan(x=read(total), y=read(count))


def layer_metrics(tree: Tree) -> list[keras.metrics.Metric]:
    """List the metrics that the layers of a model hold."""
    return [metric for layer in tree.layers for metric in keras_internals.own_metrics(layer.object)]


def _check_scalar(kind: str, name: Any, value: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"`{kind}_step` must return names as strings. Received: {name!r}.")
    is_tensor = tf.is_tensor(value) or isinstance(value, (tf.Variable, keras.Variable, np.ndarray, np.generic))
    is_number = isinstance(value, numbers.Number) or (
        is_tensor and tf.as_dtype(value.dtype).is_numpy_compatible and tf.as_dtype(value.dtype) != tf.string
    )
    # Whether a tensor of unknown rank is a scalar is known only when the step runs: the mean of it is logged.
    if not is_number or (is_tensor and getattr(value.shape, "rank", len(value.shape)) not in (0, None)):
        hint = "Flatten it: one entry for each scalar." if isinstance(value, (Mapping, list, tuple)) else (
            "Reduce it, such as by `tf.reduce_mean`." if is_number else "Leave it out, or give its number."
        )  # fmt: skip
        raise TypeError(
            f'`{kind}_step` must return scalars and metrics: `{{"name": scalar}}`. Received for {name!r}: {value!r}. '
            f"{hint}"
        )


def _check_not_read(
    kind: str, scalars: Mapping[str, Any], metrics: Iterable[keras.metrics.Metric], watch: Watch
) -> None:
    """Refuse scalars that are read of a metric, whose averages over an epoch would be averages of averages."""
    # A mean over the epoch of what is an average already would be an average of averages, which nobody asks for.
    variables = [raw(variable) for metric in metrics for variable in metric.variables]
    for name, value in scalars.items():
        # What `result` gave is known by identity; what was computed of it, the graph tells. Run eagerly, it does not.
        is_read = id(value) in watch.results
        if not is_read and tf.is_tensor(value) and not tf.executing_eagerly():
            is_read = _is_read(value, variables)
        if is_read:
            raise TypeError(
                f"`{kind}_step` returned for {name!r} what it read of a metric, which is an average already. Return "
                f'the metric itself, `{{"{name}": metric}}`: it is logged at the end of the epoch, and reset at its '
                "start."
            )


def _is_read(value: tf.Tensor, variables: Sequence[tf.Variable]) -> bool:
    """Tell whether a tensor of a graph is computed of one of these variables."""
    inside = set(map(id, tracing.captured_as(value.graph, variables)))
    ops = search([value.op], lambda op: [given.op for given in op.inputs]) if inside else {}
    return any(id(given) in inside for op in ops for given in op.inputs)
