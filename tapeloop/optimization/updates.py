"""How gradients become new values: clipped, applied by the optimizers, averaged; and how large both are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import tensorflow as tf

from tapeloop.distribution.reduction import Reduction
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo
from tapeloop.optimization.clipping import Clipping
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.loss_scale import LossScale
from tapeloop.optimization.optimizers import Gradients, Optimizers
from tapeloop.optimization.tape import GroupTape, gradients_of

NAMES = "gradient_norm", "update_ratio"


class UpdateStatistics:
    """For each group, the norm of the gradient before it is clipped, and of the update over that of the weights.

    A ratio of about 1e-3 is healthy; far above it training is unstable, far below it stands still.

    Source: Karpathy, CS231n, https://cs231n.github.io/neural-networks-3/#ratio
    """

    def __init__(self, *, is_on: bool = False) -> None:
        """Choose whether anything is measured: it costs a copy of what trains, and a pass over it."""
        self._is_on = is_on
        self._sums: dict[str, tf.Variable] = {}  # the sum of each of `NAMES`, and the number of updates

    def prepare(self, selection: Selection) -> None:
        """Make the variables for the groups of a selection."""
        for group in selection.groups if self._is_on else ():
            if group not in self._sums:
                self._sums[group] = tf.Variable(tf.zeros(3, tf.float64), trainable=False, name="update_statistics")

    def before(self, gradients: Gradients) -> dict[VariableInfo, tf.Tensor]:
        """Return the values that an update is about to change, if anybody measures."""
        if not self._is_on:
            return {}
        return {v: tf.identity(v.tf_variable) for _, v in gradients if not v.is_overwritten}

    def take(self, selection: Selection, gradients: Gradients, before: Mapping[VariableInfo, tf.Tensor]) -> None:
        """Measure an update that was made.

        Args:
            selection: What trains.
            gradients: What it was made of.
            before: What `before` returned.
        """
        by_group: dict[str, list[tuple[tf.Tensor, VariableInfo]]] = {}
        for gradient, variable in gradients:
            if variable in before:
                by_group.setdefault(selection.group_of[variable], []).append((gradient, variable))
        for group, pairs in by_group.items():
            moved = [variable.tf_variable - before[variable] for _, variable in pairs]
            weights = _norm([before[variable] for _, variable in pairs])
            # Of weights that are all zero there is no ratio: it counts as none.
            ratio = tf.math.divide_no_nan(_norm(moved), weights)
            measured = tf.stack([_norm([gradient for gradient, _ in pairs]), ratio, tf.ones((), tf.float64)])
            self._sums[group].assign_add(measured)

    def results(self) -> dict[str, float]:
        """Return the means since the last reset, as `group/name`; groups without an update are left out."""
        fetched = {group: sums.numpy() for group, sums in self._sums.items()}
        return {
            f"{group}/{name}": float(total / sums[-1])
            for group, sums in fetched.items()
            if sums[-1]
            for name, total in zip(NAMES, sums)
        }

    def pop_results(self, selection: Selection) -> dict[str, tf.Tensor]:
        """Return the means of the groups of a selection, and reset them: inside a step."""
        found: dict[str, tf.Tensor] = {}
        for group in selection.groups if self._is_on else ():
            sums = self._sums[group].read_value()
            self._sums[group].assign(tf.zeros_like(sums))
            found |= {f"{group}/{name}": sums[place] / sums[-1] for place, name in enumerate(NAMES)}
        return found

    def reset(self) -> None:
        """Start the means anew."""
        for sums in self._sums.values():
            sums.assign(tf.zeros_like(sums))

    def held(self, groups: Iterable[str]) -> list[tf.Variable]:
        """Return the variables of some groups."""
        return [self._sums[group] for group in groups if group in self._sums]

    def named_variables(self) -> dict[str, list[tf.Variable]]:
        """Return the variables by the names of the groups."""
        return {f"updates/{group}": [sums] for group, sums in self._sums.items()}


@dataclass(frozen=True)
class Updates:
    """Everything between the gradients of a step and the new values of its variables.

    Attributes:
        optimizers: The optimizers of all groups.
        clipping: The norms to which gradients are clipped.
        averages: The exponential moving averages of what trains.
        loss_scale: The number by which losses are multiplied, if a layer computes in float16.
        statistics: How large gradients and updates are, if the user asked.
        reduction: Averages gradients over devices; None if there is only one.
    """

    optimizers: Optimizers
    clipping: Clipping
    averages: MovingAverages
    loss_scale: LossScale
    statistics: UpdateStatistics = field(default_factory=UpdateStatistics)
    reduction: Reduction | None = None

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

    def averaged(
        self, gradients: Gradients, loss: tf.Tensor | None, examples: tf.Tensor
    ) -> tuple[Gradients, tf.Tensor | None]:
        """Return the gradients and the loss of the whole batch, of which this device has computed so many examples."""
        return (gradients, loss) if self.reduction is None else self.reduction.averaged(gradients, loss, examples)

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


def _norm(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    # `global_norm` knows the sparse gradients of embeddings. In float32, for float16 would overflow.
    return tf.cast(tf.linalg.global_norm([_float32(tensor) for tensor in tensors]), tf.float64)


def _float32(tensor: tf.Tensor) -> tf.Tensor:
    if isinstance(tensor, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(tensor.values, tf.float32), tensor.indices, tensor.dense_shape)
    return tf.cast(tensor, tf.float32)
