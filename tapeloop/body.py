"""The body of a step: what is computed on one batch, and the verbs that research code writes it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.errors import PolicyError
from tapeloop.loop.step_cache import StepCache
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree, VariableInfo, raw
from tapeloop.optimization.following import checked_decay, paired
from tapeloop.optimization.tape import GroupTape
from tapeloop.optimization.updates import Updates
from tapeloop.policies.base import VariablePolicy
from tapeloop.step.forward import call_model
from tapeloop.step.metrics import metrics_in
from tapeloop.step.objective import Objective, added_losses

OVERRIDABLE = ("forward", "compute_loss", "train_step", "eval_step")


class Body:
    """What a trainer does on one batch: the default, and what overrides are written with."""

    model: Model
    _policy: VariablePolicy
    _steps: StepCache
    _objective: Objective
    _updates: Updates

    # What research code overrides

    def forward(self, inputs: Any, training: bool) -> Any:
        """Call the model on a batch of inputs.

        Args:
            inputs: The inputs, as the data gives them.
            training: Whether the step trains; frozen submodels run in inference mode all the same.

        Returns:
            The model's outputs.
        """
        return call_model(self.model, inputs, training)

    def compute_loss(self, batch: Any, training: bool) -> Any:
        """Return the scalar loss of a batch, or `(scalar, {"name": scalar})` to log more.

        By default the batch is `(inputs, targets[, sample_weight])`; the loss is the trainer's, plus `added_losses()`,
        and the metrics are updated.

        Args:
            batch: One batch of the data.
            training: Whether the step trains.

        Example:
            >>> class Scaled(tl.Trainer):
            ...     def compute_loss(self, batch, training):
            ...         x, y = batch
            ...         loss = keras.ops.mean((self.forward(x, training) - y) ** 2)
            ...         return 0.5 * loss, {"unscaled": loss}
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> logs = Scaled(model).train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
            >>> bool(np.isclose(logs["unscaled"], 2 * logs["loss"]))
            True
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        outputs = self.forward(x, training)
        added = self.added_losses()
        if self._objective.has_loss:
            added.insert(0, self._objective.loss(y, outputs, sample_weight))
            self._objective.update(y, outputs, sample_weight)
        elif not added and not self._steps.building:
            raise ValueError(self._no_loss())
        return tf.add_n(added) if added else tf.zeros(())

    def train_step(self, batch: Any) -> Mapping[str, Any]:
        """Train on one batch. Override it with `with self.tape(...) as tape:` and `self.update(tape, loss)`.

        Args:
            batch: One batch of the data.

        Returns:
            What to log: scalars, averaged over the epoch by examples, and `keras.metrics.Metric` objects, which log
            their result and start anew each epoch.

        Example:
            >>> class Clipped(tl.Trainer):
            ...     def train_step(self, batch):
            ...         with self.tape() as tape:
            ...             loss = self.compute_loss(batch, training=True)
            ...         gradients = self.gradients(tape, loss)
            ...         self.apply({path: keras.ops.clip(g, -1.0, 1.0) for path, g in gradients.items()})
            ...         return {"loss": loss}
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> logs = Clipped(model, loss="mse").train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
        """
        with self.tape() as tape:
            loss, logs = _with_logs(self.compute_loss(batch, training=True))
        self.update(tape, loss)
        return {"loss": loss, **logs}

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        """Evaluate one batch.

        Args:
            batch: One batch of the data.

        Returns:
            What to log, as for `train_step`.
        """
        loss, logs = _with_logs(self.compute_loss(batch, training=False))
        return {"loss": loss, **logs}

    # What an overridden step is written with

    def tape(self, *groups: str, persistent: bool = False) -> GroupTape:
        """Return a gradient tape that watches the variables of these groups, and nothing else.

        Args:
            *groups: Names of groups; none means all of them.
            persistent: Whether gradients can be taken from it more than once.

        Raises:
            PolicyError: The policy has no group of that name.
        """
        if self._steps.building:
            return GroupTape((), persistent)
        selection = self._in_step("tape")
        unknown = [group for group in groups if group not in selection.groups]
        if unknown:
            raise PolicyError(
                f"`tape` was asked for the groups {unknown}, but the policy {self._policy!r} has the groups "
                f"{list(selection.groups)}."
            )
        variables = [v for group in groups or selection.groups for v in selection.groups[group]]
        return GroupTape(variables, persistent)

    @tf.autograph.experimental.do_not_convert
    def update(self, tape: GroupTape, loss: tf.Tensor) -> None:
        """Update the variables that `tape` watched by the gradient of `loss`, each by its group's optimizer.

        In this order: the loss is scaled where the model computes in float16, gradients are taken and checked, wait for
        the other micro-batches, are dropped if one of them or the loss is not finite, are clipped, and go to the
        optimizers; then the averages follow. With micro-batches, all updates of a step are made at its end: what is
        computed between them still sees the values from before.

        Args:
            tape: What `self.tape(...)` returned.
            loss: A scalar computed inside it, the mean over the batch.

        Raises:
            DisconnectedError, RuntimeError, TypeError, ValueError: As `gradients` does.
        """
        if not self._steps.building:
            self._in_step("update")
            self._updates.apply(self._updates.gradients(tape, loss), loss)

    @tf.autograph.experimental.do_not_convert
    def gradients(self, tape: GroupTape, loss: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the gradients of `loss` for the variables that `tape` watched, by path, to be changed and applied.

        Args:
            tape: What `self.tape(...)` returned.
            loss: A scalar computed inside it, the mean over the batch.

        Raises:
            DisconnectedError: A watched variable gets no gradient.
            RuntimeError: Called outside `train_step`, or with a tape that was used before.
            TypeError: `tape` is none of the trainer's.
            ValueError: `loss` is not a scalar.
        """
        if self._steps.building:
            return {v.path: tf.zeros(v.shape, v.dtype) for v in Tree.of(self.model).variables if v.trainable}
        self._in_step("gradients")
        return {variable.path: gradient for gradient, variable in self._updates.gradients(tape, loss)}

    @tf.autograph.experimental.do_not_convert
    def apply(self, gradients: Mapping[str, tf.Tensor]) -> None:
        """Update variables by gradients: the second half of `update`.

        Args:
            gradients: Gradients by the paths of variables that train, as `gradients` returned them or changed.

        Raises:
            PolicyError: A path is not one of a variable that trains.
            RuntimeError: Called outside `train_step`.
            TypeError: `gradients` is no mapping.
            ValueError: A gradient has not its variable's shape.
        """
        if not self._steps.building:
            self._updates.apply(_paired(gradients, self._in_step("apply")))

    @tf.autograph.experimental.do_not_convert
    def follow(self, target: Model | str, source: Model | str, *, decay: Any) -> None:
        """Move one submodel towards another: `target = decay * target + (1 - decay) * source`.

        That is how target networks, mean teachers and momentum encoders are kept. Weights and statistics move, seeds
        and whole numbers do not. With micro-batches it happens once a step, after the updates that come before it; in
        a step that is not finite it is undone. The target may also be a model of its own, kept beside the trainer's.

        Args:
            target: The submodel that moves, or its path. Freeze it, so that nothing else moves it.
            source: The submodel that it moves towards, of the same structure, or its path.
            decay: How much of the target is kept: a number from 0 (a copy) to 1, or a scalar tensor.

        Raises:
            RuntimeError: Called outside a step, or with micro-batches in a branch or a loop.
            TypeError: One of the submodels is none.
            ValueError: The two are not of one structure, or `decay` is out of range.

        Source: Polyak averaging, as in Lillicrap et al., Continuous control with deep reinforcement learning, 2016.

        Example:
            >>> class MeanTeacher(tl.Trainer):
            ...     def train_step(self, batch):
            ...         with self.tape() as tape:
            ...             loss = keras.ops.mean((self.model["student"](batch[0]) - batch[1]) ** 2)
            ...         self.update(tape, loss)
            ...         self.follow("teacher", "student", decay=0.9)
            ...         return {"loss": loss}
            >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> networks = {"student": student, "teacher": keras.models.clone_model(student)}
            >>> trainer = MeanTeacher(networks, tl.Freeze("teacher"))
            >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), progress="none")
        """
        decay = checked_decay(decay)
        if not self._steps.building:
            self._in_step("follow")
            self._updates.follow(paired(Tree.of(self.model), target, source), decay)

    def added_losses(self) -> list[tf.Tensor]:
        """Return what layers added by `add_loss` in the last call, and the weight penalties, of all that trains."""
        return [] if self._steps.building else added_losses(self._in_step("added_losses"))

    def _predict_step(self, batch: Any) -> Any:
        return self.forward(keras.utils.unpack_x_y_sample_weight(batch)[0], training=False)

    def _is_plain(self) -> bool:
        """Tell whether a training step is tapeloop's own from end to end, so that its one update comes last."""
        names = (*OVERRIDABLE, "tape", "update", "gradients", "apply", "added_losses")
        return all(getattr(getattr(self, name), "__func__", None) is vars(Body)[name] for name in names)

    def _no_loss(self) -> str:
        said = "There is no loss: `loss` is None and no layer adds one. "
        is_evaluated = self._steps.tracing is not None and self._steps.tracing[0] == "eval"
        if is_evaluated and type(self).train_step is not Body.train_step and type(self).eval_step is Body.eval_step:
            return (
                f"{said}`{type(self).__name__}` overrides `train_step` and evaluates by the default `eval_step`, which "
                "needs one: override `eval_step` too, or pass `loss=...`."
            )
        return f"{said}Pass `loss=...` to the trainer, or override `compute_loss`."

    def __getattr__(self, name: str) -> Any:
        """Say what is the matter if a subclass has not called the constructor, or the attribute is missing."""
        if name in ("_steps", "_loop", "_updates", "_objective", "_selections", "_policy", "model"):
            raise RuntimeError(
                f"`{type(self).__name__}.__init__` has not called `super().__init__(...)` yet: call it first, with the "
                "model and the trainer's options."
            )
        if hasattr(type(self), name):  # a property that raised an `AttributeError` of its own: let it come up
            return super().__getattribute__(name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.")

    def _attributes(self) -> dict[str, Any]:
        return vars(self)

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute, and note the numbers that a step reads while it is traced: they become constants."""
        value = super().__getattribute__(name)
        if isinstance(value, (int, float, np.number)):
            attributes = super().__getattribute__("__dict__")
            if name in attributes and name[0] != "_" and "_steps" in attributes:
                attributes["_steps"].note_number(name, value)
        return value

    def _kept(self) -> list[tf.Variable]:
        """Return the variables among this object's own attributes: counters, metrics, random states of a subclass."""
        found: list[Any] = []
        for value in vars(self).values():
            found += [variable for metric in metrics_in(value) for variable in metric.variables]
            if isinstance(value, (tf.random.Generator, keras.random.SeedGenerator)):
                found.append(value.state)
            elif isinstance(value, (tf.Variable, keras.Variable)):
                found.append(value)
        return [raw(variable) for variable in found]

    def _others(self) -> list[tf.Variable]:
        """Return what the user keeps beside the model: `_kept`, and the variables of models and layers among these."""
        parts = [part for value in vars(self).values() for part in _submodels_in(value) if part is not self.model]
        return [*self._kept(), *(variable.tf_variable for part in parts for variable in Tree.of(part).variables)]

    def _in_step(self, verb: str) -> Selection:
        """Return the selection of the step that is being traced; only one that trains may update."""
        kind, selection = self._steps.tracing or (None, None)
        if selection is None or (verb in ("update", "gradients", "apply") and kind != "train"):
            raise RuntimeError(
                f"`{verb}` was called outside a step that trains. It belongs in `train_step`, which `fit` compiles and "
                "runs."
            )
        return selection


def _submodels_in(value: Any) -> list[Model]:
    """List the layers, models and modules in an attribute, through lists, tuples and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in _submodels_in(item)]
    return [value] if isinstance(value, (keras.Layer, tf.Module)) else []


def _with_logs(loss: Any) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
    return loss if isinstance(loss, tuple) else (loss, {})


def _paired(gradients: Mapping[str, tf.Tensor], selection: Selection) -> list[tuple[tf.Tensor, VariableInfo]]:
    if not isinstance(gradients, Mapping):
        raise TypeError(
            "`apply` takes gradients by the paths of variables, as `gradients` returns them: "
            f'`{{"head/kernel": gradient}}`. Received: {gradients!r}.'
        )
    by_path = {path: variable for variable in selection.trained for path in variable.paths}
    unknown = [path for path in gradients if path not in by_path]
    if unknown:
        raise PolicyError(
            f"`apply` was given gradients for {unknown[:5]}, which do not train. What trains is "
            f"{[variable.path for variable in selection.trained[:5]]}{' and so on' * (len(selection.trained) > 5)}."
        )
    for path, gradient in gradients.items():
        shape = getattr(gradient, "shape", None)
        if shape is None or not by_path[path].variable.shape == tuple(shape):
            raise ValueError(
                f"`apply` takes a tensor of the shape {by_path[path].shape} for `{path}`. Received: {gradient!r}."
            )
    return [(tf.convert_to_tensor(gradient), by_path[path]) for path, gradient in gradients.items()]
