"""The body of a step: what is computed on one batch, and the verbs that research code writes it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tapeloop.calling import call_model
from tapeloop.errors import PolicyError
from tapeloop.loop import Loop
from tapeloop.objective import Objective, added_losses
from tapeloop.optim import Optimizers
from tapeloop.policy import VariablePolicy
from tapeloop.selection import Selection
from tapeloop.step import GroupTape, connected_gradients
from tapeloop.tree import Model

OVERRIDABLE = ("forward", "compute_loss", "train_step", "eval_step")


class Body:
    """What a trainer does on one batch: the default, and what overrides are written with."""

    model: Model
    _policy: VariablePolicy
    _loop: Loop
    _objective: Objective
    _optimizers: Optimizers

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
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        outputs = self.forward(x, training)
        added = self.added_losses()
        if self._objective.has_loss:
            added.insert(0, self._objective.loss(y, outputs, sample_weight))
            self._objective.update(y, outputs, sample_weight)
        elif not added and not self._loop.building:
            raise ValueError(
                "There is no loss: `loss` is None and no layer adds one. Pass `loss=...` to the trainer, or override "
                "`compute_loss`."
            )
        return tf.add_n(added) if added else tf.zeros(())

    def train_step(self, batch: Any) -> Mapping[str, tf.Tensor]:
        """Train on one batch. Override it with `with self.tape(...) as tape:` and `self.update(tape, loss)`.

        Args:
            batch: One batch of the data.

        Returns:
            Scalars to log, averaged over the epoch.
        """
        with self.tape() as tape:
            loss, logs = _with_logs(self.compute_loss(batch, training=True))
        self.update(tape, loss)
        return {"loss": loss, **logs}

    def eval_step(self, batch: Any) -> Mapping[str, tf.Tensor]:
        """Evaluate one batch.

        Args:
            batch: One batch of the data.

        Returns:
            Scalars to log, averaged over the data.
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
        if self._loop.building:
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

    def update(self, tape: GroupTape, loss: tf.Tensor) -> None:
        """Update the variables that `tape` watched by the gradient of `loss`, each by its group's optimizer.

        Args:
            tape: What `self.tape(...)` returned.
            loss: A scalar computed inside it.

        Raises:
            DisconnectedError: A watched variable gets no gradient.
        """
        if not self._loop.building:
            self._optimizers.apply(self._in_step("update"), connected_gradients(tape, loss))

    def added_losses(self) -> list[tf.Tensor]:
        """Return what layers added by `add_loss` in the last call, and the weight penalties, of all that trains."""
        return [] if self._loop.building else added_losses(self._in_step("added_losses"))

    def _in_step(self, verb: str) -> Selection:
        """Return the selection of the step that is being traced; only one that trains may `update`."""
        kind, selection = self._loop.tracing or (None, None)
        if selection is None or (verb == "update" and kind != "train"):
            raise RuntimeError(
                f"`{verb}` was called outside a step that trains. It belongs in `train_step`, which `fit` compiles and "
                "runs."
            )
        return selection


def _with_logs(loss: Any) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
    return loss if isinstance(loss, tuple) else (loss, {})
