"""Noticing what is not finite in a step, and undoing such a step, so that a bad batch changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tensorflow as tf

from tapeloop.checks import whole_number
from tapeloop.errors import NonFiniteError, listed
from tapeloop.selection import Selection
from tapeloop.tally import ANY, Tally
from tapeloop.tree import VariableInfo

MODES = ("raise", "skip", "ignore")
FIRST_SCALE = 2.0**15
GROWS_AFTER = 2000  # finite steps


class Guard:
    """Watches one selection's steps: the sum of each loss and gradient is finite just where all of it is.

    The sums of a step are added up in a tensor. What stands in a branch or a loop of the traced step has no tensor to
    show for it, and adds to a variable, which also holds the sums of a step that was not finite.
    """

    def __init__(self, selection: Selection) -> None:
        self._places = {variable: 1 + place for place, variable in enumerate(selection.trained)}
        self._sums = tf.Variable(tf.zeros(1 + len(self._places)), trainable=False, name="sums")

    @property
    def variables(self) -> list[tf.Variable]:
        """What it keeps."""
        return [self._sums]

    def sums(self, loss: tf.Tensor | None, gradients: Sequence[tuple[tf.Tensor, VariableInfo]]) -> tf.Tensor:
        """Return the sums of what an update is made of: of its loss, then of the gradient of each variable."""
        places = [self._places[variable] for _, variable in gradients]
        found = [tf.reduce_sum(tf.cast(gradient, tf.float32)) for gradient, _ in gradients]
        loss = tf.zeros(()) if loss is None else tf.cast(loss, tf.float32)
        if places == list(self._places.values()):
            return tf.stack([loss, *found])
        return tf.scatter_nd([[place] for place in (0, *places)], tf.stack([loss, *found]), self._sums.shape)

    def begin(self) -> None:
        """Forget what branches and loops of the last step added."""
        self._sums.assign(tf.zeros_like(self._sums))

    def add(self, sums: tf.Tensor) -> None:
        """Take in the sums of an update in a branch or a loop."""
        self._sums.assign_add(sums)

    def added(self) -> tf.Tensor:
        """Return what branches and loops of this step added so far."""
        return self._sums.read_value()

    def keep(self, sums: tf.Tensor) -> tf.Tensor:
        """Hold on to the sums of a step, for the case that it was not finite."""
        return self._sums.assign(sums)

    def error(self, step: int, epoch: int, also: str = "") -> NonFiniteError:
        """Return the error of the step that was not finite."""
        bad = ~tf.math.is_finite(self._sums).numpy()
        paths = tuple(variable.path for variable, place in self._places.items() if bad[place])
        what = [f"the loss is {self._sums.numpy()[0]}"] if bad[0] else []
        if paths:
            count = f"{len(paths)} of {len(self._places)} variables"
            what.append(f"the gradients of {count} are not finite: {listed(paths)}")
        error = NonFiniteError(
            f"At step {step}, epoch {epoch}, {', and '.join(what)}. {also}The model and the optimizers are as before "
            "it. Look at its batch (a label outside of the classes gives NaN on a GPU and under XLA), lower the "
            "learning rate or set `clip_norm`; `nonfinite='skip'` goes on without such batches."
        )
        error.step, error.paths = step, paths
        return error


def is_finite(sums: tf.Tensor) -> tf.Tensor:
    """Tell whether all that was summed is finite."""
    return tf.reduce_all(tf.math.is_finite(sums))


class Judge:
    """Decides what steps that were not finite mean for the run.

    Attributes:
        patience: How many of them in a row are gone on after.
        skipped_steps: How many there were since the last epoch began.
        last: What the last steps came to.
    """

    def __init__(self, mode: str, max_skipped: int) -> None:
        """Check and keep what was asked.

        Args:
            mode: `"raise"`, `"skip"` or `"ignore"`.
            max_skipped: How many steps in a row may be skipped.

        Raises:
            ValueError: `mode` is none of these, or `max_skipped` no whole number of 1 or more.
        """
        if mode not in MODES:
            raise ValueError(f"`nonfinite` must be one of {', '.join(map(repr, MODES))}. Received: {mode!r}.")
        self.skipped_steps = 0
        self.last = Tally()
        self.patience = {"raise": 0, "skip": whole_number("max_skipped", max_skipped, 1), "ignore": ANY}[mode]
        self._mode = mode

    @property
    def looks(self) -> bool:
        """Whether what is not finite is looked for."""
        return self._mode != "ignore"

    def take(self, tally: Tally, guard: Guard | None, step: int, epoch: int) -> None:
        """Take in what steps came to.

        Args:
            tally: What they came to.
            guard: What watched them.
            step: How many steps were trained before the next one.
            epoch: How many epochs were trained before.

        Raises:
            NonFiniteError: The last was not finite, and the run is to stop at that.
        """
        self.last = tally
        self.skipped_steps += tally.bad
        if guard is not None and tally.bad_in_a_row > self.patience:
            self.last = Tally()
            also = f"{self.patience} steps in a row were skipped before it, as many as may be. "
            raise guard.error(step, epoch, also if self._mode == "skip" else "")

    def logs(self) -> dict[str, float]:
        """Return what is to be logged of it."""
        return {"skipped_steps": float(self.skipped_steps)} if self._mode == "skip" else {}


class LossScale:
    """The number by which a float16 loss is multiplied, so that small gradients do not vanish.

    It halves when a gradient overflows and doubles after `GROWS_AFTER` steps without.

    Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2; the numbers are those of Keras'
    `LossScaleOptimizer`.
    """

    def __init__(self) -> None:
        self.value = tf.Variable(FIRST_SCALE, trainable=False, name="loss_scale")
        self._finite_steps = tf.Variable(0, trainable=False, name="finite_steps")

    @property
    def variables(self) -> list[tf.Variable]:
        """What it keeps."""
        return [self.value, self._finite_steps]

    def update(self, finite: tf.Tensor) -> None:
        """Take in how a step ended."""
        grows = finite & (self._finite_steps + 1 >= GROWS_AFTER)
        self._finite_steps.assign(tf.where(finite & ~grows, self._finite_steps + 1, 0))
        halved = tf.maximum(self.value / 2, 1.0)
        self.value.assign(tf.where(finite, tf.where(grows, self.value * 2, self.value), halved))


class Snapshot:
    """The values of variables at one moment. A value that is not asked for again costs nothing in a traced step."""

    def __init__(self, variables: Iterable[tf.Variable]) -> None:
        self._values = {variable.ref(): variable.read_value() for variable in variables}

    def add(self, variable: tf.Variable) -> None:
        """Take in the value of one more variable, unless it is there."""
        if variable.ref() not in self._values:
            self._values[variable.ref()] = variable.read_value()

    def restore(self) -> None:
        """Give the variables the values of then."""
        for variable, value in self._values.items():
            variable.deref().assign(value)
