"""The user's step: what research code overrides, and the verbs that it is written with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tapeloop._backend.autograph import converted
from tapeloop._keras_names import ASSIGNED, missing
from tapeloop.model.tree import AnyModel, HasVariables, Tree
from tapeloop.optimization.tape import GroupTape
from tapeloop.optimization.target_networks import checked_decay, paired
from tapeloop.step.context import Building, StepContext, Training, outside
from tapeloop.step.forward import call_model
from tapeloop.step.plan import StepParts

OVERRIDABLE = ("forward", "compute_loss", "train_step", "eval_step")
# What the trainer's own training step is made of.
OWN_STEP = ("train_step", "compute_loss", "forward", "tape", "update", "gradients", "apply", "added_losses")


# What a subclass must not replace.
OWN_ATTRIBUTES = "model", "state", "_parts", "_loop", "_contents", "_features", "_seed", "_made"


class UserStep:
    """What a trainer computes on one batch. `Trainer` adds to it what a run is made of.

    Attributes:
        model: The model as it was passed.
    """

    def __init__(self, model: AnyModel, parts: StepParts) -> None:
        self.model: Any = model
        self._parts = parts

    # Overriding it

    def forward(self, inputs: Any, training: bool) -> Any:
        """Call the model on a batch of inputs, and return its outputs.

        Args:
            inputs: The inputs, as the data gives them.
            training: Whether the step trains; frozen submodels run in inference mode all the same.

        Raises:
            DataError: The inputs do not fit the model.
            TypeError: The model cannot be called, or is a mapping of several.

        Example:
            >>> class Halved(tl.Trainer):
            ...     def forward(self, inputs, training):
            ...         return 0.5 * super().forward(inputs, training)
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> x = np.ones((8, 4), "float32")
            >>> bool(np.allclose(2 * Halved(model).predict(x), model(x)))
            True
        """
        if isinstance(self.model, Mapping):
            raise TypeError(self._no_single_model())
        return call_model(self.model, inputs, training)

    def compute_loss(self, batch: Any, training: bool) -> Any:
        """Return the scalar loss of a batch, or `(scalar, {"name": scalar})` to log more.

        By default the batch is `(inputs, targets[, sample_weight])`; the loss is the trainer's, plus `added_losses()`,
        and the metrics are updated.

        Args:
            batch: One batch of the data.
            training: Whether the step trains.

        Raises:
            ValueError: The trainer has no loss, and no layer adds one.

        Example:
            >>> class Scaled(tl.Trainer):
            ...     def compute_loss(self, batch, training):
            ...         x, y = batch
            ...         loss = keras.ops.mean((self.forward(x, training) - y) ** 2)
            ...         return 0.5 * loss, {"unscaled": loss}
            >>> trainer = Scaled(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
            >>> logs = trainer.train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
            >>> bool(np.isclose(logs["unscaled"], 2 * logs["loss"]))
            True
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        outputs = converted(self.forward)(x, training)
        added, objective = self.added_losses(), self._parts.objective
        if objective.has_loss:
            added.insert(0, objective.loss(y, outputs, sample_weight))
            objective.update(y, outputs, sample_weight)
        elif not added and self._context("compute_loss").kind != "build":
            # Only now is it known that no layer has added a loss either.
            raise ValueError(self._no_loss())
        return tf.add_n(added) if added else tf.zeros(())

    def train_step(self, batch: Any) -> Mapping[str, Any]:
        """Train on one batch. Override it with `with self.tape(...) as tape:` and `self.update(tape, loss)`.

        Args:
            batch: One batch of the data.

        Returns:
            What to log: scalars, averaged over the epoch by examples, and `keras.metrics.Metric` objects, which log
            their result and are reset each epoch.

        Example:
            >>> class Clipped(tl.Trainer):
            ...     def train_step(self, batch):
            ...         with self.tape() as tape:
            ...             loss = self.compute_loss(batch, training=True)
            ...         gradients = self.gradients(tape, loss)
            ...         self.apply({path: keras.ops.clip(g, -1.0, 1.0) for path, g in gradients.items()})
            ...         return {"loss": loss}
            >>> trainer = Clipped(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
            >>> logs = trainer.train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
        """
        with self.tape() as tape:
            loss, logs = _with_logs(converted(self.compute_loss)(batch, training=True))
        self.update(tape, loss)
        return {"loss": loss, **logs}

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        """Evaluate one batch, and return what to log, as `train_step` does.

        Args:
            batch: One batch of the data.

        Example:
            >>> class Norms(tl.Trainer):
            ...     def eval_step(self, batch):
            ...         return {"norm": keras.ops.norm(self.forward(batch[0], training=False))}
            >>> trainer = Norms(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
            >>> list(trainer.evaluate((np.ones((8, 4)), np.ones((8, 2))), verbose=0))
            ['norm']
        """
        loss, logs = _with_logs(converted(self.compute_loss)(batch, training=False))
        return {"loss": loss, **logs}

    # Within a step

    def tape(self, *groups: str, persistent: bool = False) -> GroupTape:
        """Return a gradient tape that watches the variables of these groups, and nothing else.

        Args:
            *groups: Names of groups; none means all of them.
            persistent: Whether gradients can be taken from it more than once.

        Raises:
            PolicyError: The policy has no group of that name.
            RuntimeError: Called outside a step.

        Example:
            >>> class TwoLosses(tl.Trainer):
            ...     def train_step(self, batch):
            ...         logs = {}
            ...         for group in ("a", "b"):
            ...             with self.tape(group) as tape:
            ...                 logs[group] = keras.ops.mean((self.model[group](batch[0]) - batch[1]) ** 2)
            ...             self.update(tape, logs[group])
            ...         return logs
            >>> networks = {name: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]) for name in "ab"}
            >>> trainer = TwoLosses(networks, tl.Groups({"a": "a", "b": "b"}), optimizer={"a": "adam", "b": "sgd"})
            >>> sorted(trainer.train_on_batch(np.ones((8, 4)), np.ones((8, 2))))
            ['a', 'b']
        """
        return self._context("tape").tape(groups, persistent, self._parts.policy)

    def update(self, tape: GroupTape, loss: tf.Tensor) -> None:
        """Update the variables that `tape` watched by the gradient of `loss`, each by its group's optimizer.

        In this order: the loss is scaled if the model computes in float16; the gradients are taken, checked and
        averaged over micro-batches; if one of them or the loss is not finite, nothing moves; they are clipped, and go
        to the optimizers; the moving averages follow. With micro-batches, all updates of a step are made at its end:
        what is computed between them still sees the values from before.

        Args:
            tape: What `self.tape(...)` returned.
            loss: A scalar computed inside it, the mean over the batch.

        Raises:
            DisconnectedError, RuntimeError, TypeError, ValueError: As `gradients` does.

        Example:
            >>> class Custom(tl.Trainer):
            ...     def train_step(self, batch):
            ...         with self.tape() as tape:
            ...             loss = keras.ops.mean((self.forward(batch[0], training=True) - batch[1]) ** 2)
            ...         self.update(tape, loss)
            ...         return {"loss": loss}
            >>> trainer = Custom(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), optimizer="sgd")
            >>> logs = [trainer.train_on_batch(np.ones((8, 4)), np.ones((8, 2))) for _ in range(2)]
            >>> logs[1]["loss"] < logs[0]["loss"]
            True
        """
        context = self._training("update")
        context.update(context.gradients(tape, loss), loss)

    def gradients(
        self, tape: GroupTape, loss: tf.Tensor, *, unconnected: Literal["error", "zero"] = "error"
    ) -> dict[str, tf.Tensor]:
        """Return the gradients of `loss` for the variables that `tape` watched, by path, to be changed and applied.

        Args:
            tape: What `self.tape(...)` returned.
            loss: A scalar computed inside it, the mean over the batch.
            unconnected: What a watched variable gets on which the loss does not depend: `"error"` raises, `"zero"`
                gives zeros, as for one loss of several that share a part of the model.

        Raises:
            DisconnectedError: A watched variable gets no gradient.
            RuntimeError: Called outside `train_step`, or with a tape that was used before.
            TypeError: `tape` is not from `self.tape`.
            ValueError: `loss` is not a scalar, or `unconnected` neither of the two.

        Example:
            >>> class TwoTasks(tl.Trainer):
            ...     def train_step(self, batch):
            ...         x, (y, z) = batch
            ...         with self.tape(persistent=True) as tape:
            ...             outputs = self.forward(x, training=True)
            ...             losses = [keras.ops.mean((o - target) ** 2) for o, target in zip(outputs, (y, z))]
            ...         tasks = [self.gradients(tape, loss, unconnected="zero") for loss in losses]
            ...         self.apply({path: gradient + tasks[1][path] for path, gradient in tasks[0].items()})
            ...         return {"loss": sum(losses)}
            >>> inputs = keras.Input((4,))
            >>> trunk = keras.layers.Dense(3, activation="relu")(inputs)
            >>> model = keras.Model(inputs, [keras.layers.Dense(1)(trunk), keras.layers.Dense(1)(trunk)])
            >>> logs = TwoTasks(model).train_on_batch(np.ones((8, 4)), (np.ones((8, 1)), np.zeros((8, 1))))
        """
        if unconnected not in ("error", "zero"):
            raise ValueError(f"`unconnected` must be 'error' or 'zero'. Received: {unconnected!r}.")
        pairs = self._training("gradients").gradients(tape, loss, allow_unconnected=unconnected == "zero")
        return {variable.path: gradient for gradient, variable in pairs}

    def apply(self, gradients: Mapping[str, tf.Tensor]) -> None:
        """Update variables by gradients: the second half of `update`.

        Args:
            gradients: Gradients by the paths of variables that train, as `gradients` returned them or changed.

        Raises:
            PolicyError: A path is not that of a variable that trains.
            RuntimeError: Called outside `train_step`.
            TypeError: `gradients` is no mapping.
            ValueError: A gradient has another shape than its variable, or a tied variable has several gradients.

        Example:
            >>> class Halved(tl.Trainer):
            ...     def train_step(self, batch):
            ...         with self.tape() as tape:
            ...             loss = self.compute_loss(batch, training=True)
            ...         self.apply({path: 0.5 * gradient for path, gradient in self.gradients(tape, loss).items()})
            ...         return {"loss": loss}
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> logs = Halved(model, loss="mse").train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
        """
        context = self._training("apply")
        context.update(context.trainable(gradients))

    def follow(self, target: HasVariables | str, source: HasVariables | str, *, decay: Any) -> None:
        """Move one submodel towards another: `target = decay * target + (1 - decay) * source`.

        Target networks, mean teachers and momentum encoders are kept this way. Weights and statistics move, seeds and
        whole numbers do not. With micro-batches it happens once a step, after the updates that come before it; in a
        step that is not finite it is undone. The target may also be a model of its own, kept beside the trainer's.

        Args:
            target: The submodel that moves, or its path. Freeze it, so that nothing else moves it.
            source: The submodel that it moves towards, of the same structure, or its path.
            decay: How much of the target is kept: a number from 0 (a copy) to 1, or a scalar tensor.

        Raises:
            RuntimeError: Called outside a step, or with micro-batches in a branch or a loop.
            TypeError: `target` or `source` is neither a submodel nor a path.
            ValueError: The two are not of one structure, or `decay` is out of range.

        Source: Polyak averaging, as in Lillicrap et al., Continuous control with deep reinforcement learning, 2016.

        Example:
            >>> class MeanTeacher(tl.Trainer):
            ...     def train_step(self, batch):
            ...         logs = super().train_step(batch)
            ...         self.follow("teacher", "student", decay=0.9)
            ...         return logs
            ...     def forward(self, inputs, training):
            ...         return self.model["student"](inputs)
            >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> networks = {"student": student, "teacher": keras.models.clone_model(student)}
            >>> trainer = MeanTeacher(networks, tl.Freeze("teacher"), loss="mse")
            >>> logs = trainer.train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
        """
        context, decay = self._context("follow"), checked_decay(decay)
        if context.kind != "build":  # while the model's variables are being made, there may be nothing to pair
            context.follow(paired(Tree.of(self.model), target, source), decay)

    def added_losses(self) -> list[tf.Tensor]:
        """Return what layers added by `add_loss` in the last call, and the weight penalties, of all that trains.

        Example:
            >>> class Penalized(tl.Trainer):
            ...     def compute_loss(self, batch, training):
            ...         loss = keras.ops.mean((self.forward(batch[0], training) - batch[1]) ** 2)
            ...         penalties.append(len(self.added_losses()))
            ...         return loss + sum(self.added_losses())
            >>> penalties = []
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_regularizer="l2")])
            >>> logs = Penalized(model).train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
            >>> penalties
            [1]
        """
        return self._context("added_losses").added_losses()

    def _context(self, verb: str) -> StepContext:
        """Return the step that is being traced, or run eagerly."""
        if self._parts.context is None:
            raise outside(verb)
        return self._parts.context

    def _training(self, verb: str) -> Training | Building:
        """Return the step that is being traced, or run eagerly, if it is one that trains."""
        context = self._context(verb)
        if not isinstance(context, (Training, Building)):
            raise outside(verb)
        return context

    def _predict_step(self, batch: Any) -> Any:
        return converted(self.forward)(keras.utils.unpack_x_y_sample_weight(batch)[0], training=False)

    def _is_plain(self) -> bool:
        """Tell whether a training step is tapeloop's own from end to end, so that its one update comes last."""
        own = vars(UserStep)
        return all(getattr(getattr(self, name), "__func__", None) is own[name] for name in OWN_STEP)

    def _no_single_model(self) -> str:
        kind = "train" if self._parts.context is None else self._parts.context.kind
        overrides_train = type(self).train_step is not UserStep.train_step
        remedy = {
            "predict": "override `forward`, which `predict` calls",
            "eval": "override `eval_step`" if overrides_train else "override `forward` or `compute_loss`",
        }.get(kind, "override `forward`, `compute_loss` or `train_step`")
        return f"A trainer of several models ({', '.join(map(repr, self.model))}) cannot know which to call: {remedy}."

    def _no_loss(self) -> str:
        said, kind = "There is no loss: `loss` is None and no layer adds one. ", type(self)
        overrides_train = kind.train_step is not UserStep.train_step and kind.eval_step is UserStep.eval_step
        if self._context("compute_loss").kind == "eval" and overrides_train:
            return (
                f"{said}`{kind.__name__}` overrides `train_step` and evaluates by the default `eval_step`, which "
                "needs one: override `eval_step` too, or pass `loss=...`."
            )
        return f"{said}Pass `loss=...` to the trainer, or override `compute_loss`."

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of a subclass, if its name is not taken by the trainer."""
        # Otherwise an option that is assigned would do nothing, and one of these would be lost to the trainer.
        if name in OWN_ATTRIBUTES and name in vars(self):
            raise AttributeError(f"`{name}` is the trainer's own and is not assigned: choose another name.")
        if name in ASSIGNED and not hasattr(type(self), name):
            raise AttributeError(f"`{name}` is not assigned: {ASSIGNED[name]}.")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Say what is the matter if a subclass has not called the constructor, or the attribute is missing."""
        # Otherwise the first thing that a user reads is that an internal attribute is missing.
        if name in ("_parts", "_loop", "state", "model"):
            raise RuntimeError(
                f"`{type(self).__name__}.__init__` has not called `super().__init__(...)` yet: call it first, with the "
                "model and the trainer's options."
            )
        if hasattr(type(self), name):  # a property that raised an `AttributeError` of its own: let it come up
            return super().__getattribute__(name)
        raise AttributeError(missing(self, name))

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute, and note the numbers that a step reads while it is traced: they become constants."""
        value = super().__getattribute__(name)
        # A number is a constant in the compiled step: if it changes later, the user is warned. Inside containers it is
        # not noticed.
        if isinstance(value, (int, float, np.number)) and name[0] != "_" and not tf.executing_eagerly():
            attributes = super().__getattribute__("__dict__")
            context = attributes["_parts"].context if "_parts" in attributes else None
            # One of the class counts too; a property computes what it returns anew each time.
            is_kept = name in attributes or not isinstance(inspect.getattr_static(type(self), name), property)
            if context is not None and is_kept:
                context.numbers[name] = value
        return value


def _with_logs(loss: Any) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
    return loss if isinstance(loss, tuple) else (loss, {})
