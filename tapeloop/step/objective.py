"""The loss and the metrics, computed by Keras' own code, and the running means of what a step returns."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._backend.patching import all_patched
from tapeloop._backend.tracing import untraced
from tapeloop.data.batch import shapes, spec_of
from tapeloop.errors import DataError, TapeloopError
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo, raw
from tapeloop.step.metrics import is_keras_own, reset, result_of


class Objective:
    """A loss and metrics as `keras.Model.compile` takes them, kept apart from the model.

    A model of Keras with no layers is compiled in the user's model's stead: its public `compute_loss` and
    `compute_metrics` do what `fit` does, and the user's model is not written to.
    """

    def __init__(
        self,
        loss: Any,
        loss_weights: Any,
        metrics: Any,
        weighted_metrics: Any,
        output_names: list[str] | None,
    ) -> None:
        _check_names("loss", loss, keras.losses, ())
        for option, asked in (("metrics", metrics), ("weighted_metrics", weighted_metrics)):
            _check_names(option, asked, keras.metrics, ("accuracy", "acc", "crossentropy", "ce"))
        self.given_loss = loss
        self.has_loss = loss is not None
        self.was_updated = False
        self._named: dict[str, keras.metrics.Metric] | None = None  # once they are built
        # Keras' own `compute_loss` and `compute_metrics` on an empty model do what `fit` does (names, weights, several
        # outputs), and the user's model is not written to.
        self._stand_in = keras.Model()
        # By these names Keras finds the losses and metrics of an output that are given in a dict.
        if output_names is not None:
            self._stand_in.output_names = output_names
        self._stand_in.compile(
            optimizer=None,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            jit_compile=False,
        )

    def loss(self, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
        """Return the scalar loss of a batch.

        Raises:
            DataError: The targets do not fit the model's outputs, or there are none.
        """
        if y is None:
            raise DataError(
                "The loss needs targets, but the batch has none. Batches are `(inputs, targets)` or "
                "`(inputs, targets, sample_weight)`; for a loss without targets override `compute_loss`. "
                f"The model's output is {shapes(y_pred)}."
            )
        with _fitting(y, y_pred, sample_weight):
            # Keras makes the metrics' variables in their first call, of which nothing may be left in the running sums.
            if not self._stand_in.built:
                # The one thing that is made while the user's part is traced: it needs the shapes of the outputs.
                with untraced():
                    self._build(*spec_of((y, y_pred, sample_weight)))
            return self._stand_in.compute_loss(None, y, y_pred, sample_weight)

    def update(self, y: Any, y_pred: Any, sample_weight: Any) -> None:
        """Take a batch into the metrics.

        Raises:
            DataError: The targets do not fit a metric.
        """
        self.was_updated = True
        with _fitting(y, y_pred, sample_weight):
            self._stand_in.compute_metrics(None, y, y_pred, sample_weight)

    def results(self) -> dict[str, tf.Tensor]:
        """Return the metrics since the last reset, as Keras names them."""
        if not self._stand_in.built:
            return {}
        results: dict[str, tf.Tensor] = {}
        if self._named is None:
            self._named = self._by_name()
        for name, metric in self._named.items():
            value = result_of(metric)
            # A metric of the user's may say several things.
            results |= value if isinstance(value, dict) else {name: value}
        return results

    def reset(self) -> None:
        """Start the metrics anew."""
        for metric in self._single():
            reset(metric)

    def _single(self) -> list[keras.metrics.Metric]:
        """Return the metrics, those that the trainer was made with out of the one in which Keras keeps them."""
        kept = [(getattr(each, "metrics", ()) if is_keras_own(each) else ()) or [each] for each in self._logged()]
        return [metric for metrics in kept for metric in metrics]

    def _logged(self) -> list[keras.metrics.Metric]:
        """Return the metrics that say something: the total is the step's to report, since it has the penalties too."""
        return [metric for metric in self._stand_in.metrics if metric.name != "loss"]

    def _by_name(self) -> dict[str, keras.metrics.Metric]:
        """Return the metrics under the names by which Keras logs them."""
        # Keras tells them by what it makes of the results: here each metric is its own.
        with all_patched((metric, "result", functools.partial(_itself, metric)) for metric in self._single()):
            results = {each.name: each.result() for each in self._logged()}
        named: dict[str, keras.metrics.Metric] = {}
        for name, result in results.items():
            named |= result if isinstance(result, dict) else {name: result}
        return named

    def check_averages(self, parts: str, remedy: str) -> None:
        """Check that the losses are means over examples, as averaging over parts of a batch takes them to be.

        Args:
            parts: Who computes a part of a batch.
            remedy: What else the user can do.

        Raises:
            ValueError: One of them is not.
        """
        for loss in tf.nest.flatten(self._stand_in.loss):
            reduction = getattr(loss, "reduction", None)
            # The first is a sum, the second is divided by weights of the piece: neither is a mean over examples.
            if reduction in ("sum", "mean_with_sample_weight"):
                raise ValueError(
                    f"{parts} average losses by examples, which the reduction {reduction!r} of {loss!r} is not "
                    f"made for. Take 'sum_over_batch_size', or {remedy}."
                )

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics, in the collections in which Keras keeps those of a compiled model."""
        return list(self._stand_in.metrics)

    @property
    def variables(self) -> list[tf.Variable]:
        """What the metrics keep; nothing before the first batch."""
        return [raw(variable) for variable in self._stand_in.metrics_variables] if self._stand_in.built else []

    def _build(self, *specs: Any) -> None:
        """Make the variables of the loss and the metrics from the shapes of a batch; nothing is computed."""

        def make(y: Any, y_pred: Any, sample_weight: Any) -> None:
            self._stand_in.compute_loss(None, y, y_pred, sample_weight)
            self._stand_in.compute_metrics(None, y, y_pred, sample_weight)

        tf.function(make, autograph=False).get_concrete_function(*specs)
        self._stand_in.built = True
        self._stand_in.reset_metrics()


def _check_names(option: str, asked: Any, module: Any, special: tuple[str, ...]) -> None:
    """Check that Keras knows the losses or metrics that are asked for by name.

    Raises:
        ValueError: It does not.
    """
    for name in tf.nest.flatten(asked):
        if not isinstance(name, str) or name in special:
            continue
        try:
            module.get(name)
        except ValueError:
            names = [*special, *(each for each in vars(module) if each[0] != "_")]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"See `keras.{module.__name__.rpartition('.')[2]}`."
            raise ValueError(f"`{option}` is {name!r}, and Keras has none of that name. {hint}") from None


@contextlib.contextmanager
def _fitting(y: Any, y_pred: Any, sample_weight: Any) -> Iterator[None]:
    """Say the shapes where a loss or metric refuses a batch."""
    try:
        yield
    except TapeloopError:
        raise
    except (ValueError, TypeError, KeyError, tf.errors.InvalidArgumentError) as error:
        raise DataError(
            f"The loss or a metric does not fit the batch: the targets are {shapes(y)}, the model's output is "
            f"{shapes(y_pred)}, the sample weights are {shapes(sample_weight)}. "
            f"Make the targets fit the output, or choose a loss for what they are. ({error})"
        ) from error


def _itself(metric: keras.metrics.Metric) -> keras.metrics.Metric:
    return metric


def added_losses(selection: Selection) -> list[tf.Tensor]:
    """Return what layers added by `add_loss`, and the weight penalties, of all that trains and of nothing else."""
    # Of the parts that are frozen neither counts: they could change nothing but the logs.
    losses = [
        tf.reduce_sum(tf.cast(loss, keras.config.floatx()))
        for submodel in selection.tree.layers
        if submodel not in selection.idle
        for loss in keras_internals.added_losses(submodel.object)
    ]
    return losses + [_penalty(variable) for variable in selection.trained if variable.is_penalized]


def _penalty(variable: VariableInfo) -> tf.Tensor:
    return tf.cast(variable.variable.regularizer(raw(variable.variable)), keras.config.floatx())
