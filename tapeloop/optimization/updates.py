"""How gradients become new values: clipped, applied by the optimizers, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import tensorflow as tf

from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo
from tapeloop.optimization.clipping import Clipping
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.loss_scale import LossScale
from tapeloop.optimization.optimizers import Gradients, Optimizers
from tapeloop.optimization.tape import GroupTape, gradients_of
from tapeloop.optimization.update_statistics import UpdateStatistics


@dataclass(frozen=True)
class Updates:
    """Everything between the gradients of a step and the new values of its variables.

    Attributes:
        optimizers: The optimizers of all groups.
        clipping: The norms to which gradients are clipped.
        averages: The exponential moving averages of what trains.
        loss_scale: The number by which losses are multiplied, if a layer computes in float16.
        statistics: How large gradients and updates are, if the user asked.
    """

    optimizers: Optimizers
    clipping: Clipping
    averages: MovingAverages
    loss_scale: LossScale
    statistics: UpdateStatistics = field(default_factory=UpdateStatistics)

    def prepare(self, selection: Selection, step: int, *, changing: bool) -> None:
        """Make all that training with a selection needs, before anything is traced.

        Args:
            selection: What trains.
            step: How many steps were trained.
            changing: Whether the policy changes as training goes, so that other groups may come later.

        Raises:
            PolicyError: The optimizers, or the norms to clip to, are not for its groups.
        """
        # First what may be refused; what follows makes state.
        self.clipping.require_groups(selection, changing=changing)
        self.optimizers.prepare(selection, changing=changing)
        self.averages.prepare(selection, step)
        self.loss_scale.prepare(selection)
        self.statistics.prepare(selection)

    def gradients(self, tape: GroupTape, loss: tf.Tensor, *, allow_unconnected: bool = False) -> Gradients:
        """Return the gradient of a loss for each variable that `tape` watches."""
        gradients = gradients_of(tape, loss, self.loss_scale.value, allow_unconnected=allow_unconnected)
        return list(zip(gradients, tape.variables))

    def make(self, selection: Selection, gradients: Gradients) -> tf.Tensor:
        """Give variables their new values."""
        before = self.statistics.before(gradients)
        # The averages follow the new values, and the norm is that of the gradients of the whole update.
        self.optimizers.apply(selection, self.clipping.clip(selection, gradients))
        self.statistics.take(selection, gradients, before)
        self.averages.update([variable for _, variable in gradients])
        return tf.constant(True)  # a branch of `tf.cond` has to return something, as the other does

    def moved(self, selection: Selection, variables: Sequence[VariableInfo]) -> list[tf.Variable]:
        """List what an update of these variables of a selection moves: them, and what is kept beside them."""
        groups = dict.fromkeys(selection.group_of[variable] for variable in variables)
        kept = [*self.optimizers.state(variables), *self.averages.held(variables), *self.statistics.held(groups)]
        return [*(variable.tf_variable for variable in variables), *kept]
