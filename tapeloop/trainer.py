"""The trainer: what a user makes, subclasses and runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop import report
from tapeloop.arrays import Orders
from tapeloop.average import Averages
from tapeloop.body import OVERRIDABLE, Body
from tapeloop.checks import whole_number
from tapeloop.clipping import Clipping
from tapeloop.data import as_batches
from tapeloop.guard import Judge
from tapeloop.history import History
from tapeloop.loop import Loop
from tapeloop.microbatch import Microbatches
from tapeloop.objective import Objective
from tapeloop.optim import LearningRates, Optimizers
from tapeloop.policy import Progress, TrainAll, VariablePolicy
from tapeloop.progress import Display
from tapeloop.remat import Remat
from tapeloop.selection import Selection
from tapeloop.selections import Due, Selections
from tapeloop.step import Compilation, Step
from tapeloop.steps import Steps
from tapeloop.tree import Model, Tree
from tapeloop.updates import Updates
from tapeloop.where import WhereLike


class Trainer(Body):
    """Trains what a policy selects of a model, and leaves the rest bit-identical.

    In research code, subclass it and override the one of `forward`, `compute_loss`, `train_step` and `eval_step` that
    gives the control needed.

    Attributes:
        model: The model as it was passed.
        policy: What trains. Assign another between two fits: state is carried over, and nothing else need be done.
    """

    def __init__(
        self,
        model: Model,
        policy: VariablePolicy | None = None,
        *,
        loss: Any = None,
        optimizer: Any = "adam",
        metrics: Any = None,
        weighted_metrics: Any = None,
        loss_weights: Any = None,
        clip_norm: float | Mapping[str, float] | None = None,
        microbatches: int | str = 1,
        nonfinite: str = "raise",
        max_skipped: int = 10,
        ema: float | None = None,
        remat: WhereLike | type | Sequence[WhereLike | type] | None = None,
        jit_compile: bool | str = "auto",
        run_eagerly: bool = False,
        steps_per_call: int | str = "auto",
        seed: int | None = None,
    ) -> None:
        """Make a trainer. Nothing is traced or allocated before the first fit.

        Args:
            model: A Keras model or layer, a `tf.Module`, or a mapping from names to such.
            policy: What trains; by default all that can.
            loss: A loss as `keras.Model.compile` takes it. Not needed where `compute_loss` or `train_step` is
                overridden, or where layers add losses.
            optimizer: A Keras optimizer or its name, cloned for each group, or a mapping with one for each group.
            metrics: Metrics as `keras.Model.compile` takes them.
            weighted_metrics: Metrics to which sample weights apply, likewise.
            loss_weights: Weights of the losses of several outputs, likewise.
            clip_norm: The norm to which the gradients of an update are clipped together, or one for each of some
                groups.
            microbatches: In how many pieces a batch is cut, computed one after the other and averaged by examples, for
                one update: the large batch's result, but for layers and losses that look across a batch, in a fraction
                of its memory. `"auto"` begins with 1 and doubles it when a step runs out of memory, which is repeated.
            nonfinite: What an Inf or NaN in a loss or a gradient does, the step having changed nothing: `"raise"`
                stops, `"skip"` goes on and counts `skipped_steps` in the logs; `"ignore"` does not look.
            max_skipped: How many steps in a row may be skipped before that raises.
            ema: The decay of an exponential moving average of what trains, such as 0.999; see `ema_weights`.
            remat: Submodels whose activations are computed again for the gradient instead of kept: a path glob that
                names them, a class, a layer, or a list of these.
            jit_compile: Whether XLA compiles the steps; `"auto"`: on a GPU, where it can.
            run_eagerly: Whether steps are run op by op in Python, for breakpoints and prints.
            steps_per_call: How many steps the compiled loop runs before the host looks; `"auto"`: for about 0.2 s.
            seed: The seed by which arrays are shuffled.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An option has a value that it cannot have.
        """
        Tree.of(model)
        self.model = model
        self.policy = TrainAll() if policy is None else policy
        self._seed = None if seed is None else whole_number("seed", seed, 0)
        names = getattr(model, "output_names", None)
        self._objective = Objective(loss, loss_weights, metrics, weighted_metrics, names)
        pieces = Microbatches(microbatches)
        if pieces.adapts or pieces.count > 1:
            self._objective.check_averages()
        judge = Judge(nonfinite, max_skipped)
        self._updates = Updates(Optimizers(optimizer), Clipping(clip_norm), pieces, Averages(ema), judge)
        bodies = {"train": self.train_step, "eval": self.eval_step, "predict": self._predict_step}
        # Python's `if` and `for` over tensors are the user's to write; converting our own code costs a second.
        autograph = any(getattr(type(self), name) is not getattr(Body, name) for name in OVERRIDABLE)
        how = Compilation(autograph, jit_compile, run_eagerly, steps_per_call)
        self._steps = Steps(bodies, self._objective, self._updates, how, Remat(remat), self._kept, self._is_plain)
        self._loop = Loop(self._steps, self._objective, judge)
        self._selections = Selections(model, self._steps, self._updates)

    def fit(
        self,
        data: Any,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        shuffle: bool = True,
        steps_per_epoch: int | None = None,
        class_weight: Mapping[int, float] | None = None,
        validation_data: Any = None,
        validation_steps: int | None = None,
        progress: str = "auto",
    ) -> History:
        """Train for some more epochs.

        Args:
            data: A `tf.data.Dataset` of batches, arrays `(inputs, targets[, sample_weight])`, a
                `keras.utils.PyDataset`, or any other iterable of batches. Arrays are NumPy's, tensors (ragged and
                sparse ones too), data frames, or files such as `np.memmap`.
            epochs: How many epochs more.
            batch_size: Examples per batch, for arrays.
            shuffle: Whether arrays, and the batches of a `PyDataset`, are shuffled anew each epoch.
            steps_per_epoch: Batches per epoch, for data without end.
            class_weight: Weights of examples by the class of their target; other classes have the weight 1.
            validation_data: Data to evaluate after each epoch.
            validation_steps: Batches per evaluation, for data without end.
            progress: `"auto"`, `"bar"`, `"lines"` or `"none"`.

        Returns:
            The logs of each epoch, those of the validation as `val_...`.

        Raises:
            PolicyError: The policy cannot be resolved for the model.
            DataError: The data is empty or does not fit the model.
            DisconnectedError: A variable that should train gets no gradient.
            NonFiniteError: A loss or a gradient is Inf or NaN.
            RuntimeError: Called inside `ema_weights()`, or within an epoch of this trainer.
        """
        self._loop.check_idle()
        whole_number("epochs", epochs, 0)
        self._updates.averages.check_may_train()
        batches = as_batches(
            data,
            batch_size=batch_size,
            orders=Orders(shuffle, self._seed, self.epoch),
            steps=("steps_per_epoch", steps_per_epoch),
            class_weight=class_weight,
        )
        validation = None
        if validation_data is not None:
            validation = as_batches(
                validation_data,
                batch_size=batch_size,
                steps=("validation_steps", validation_steps),
                name="validation_data",
            )
            validation.lasts(epochs)
            validation.check()
        batches.lasts(epochs)
        self._updates.microbatches.check(batches.fewest)
        self._steps.build(self.model, batches)
        self._selections.check(self.policy)
        return self._loop.fit(self._due, self._evaluation, batches, validation, epochs, Display(progress))

    def evaluate(
        self, data: Any, *, batch_size: int = 32, steps: int | None = None, progress: str = "auto"
    ) -> dict[str, Any]:
        """Return the loss and metrics on data, which may be all that `fit` takes.

        Args:
            data: The data.
            batch_size: Examples per batch, for arrays.
            steps: How many batches, for data without end.
            progress: As for `fit`.

        Raises:
            DataError: The data is empty or does not fit the model.
            RuntimeError: Called within an epoch of this trainer, such as by a policy.
        """
        self._loop.check_idle()
        batches = as_batches(data, batch_size=batch_size, steps=("steps", steps))
        batches.lasts(1)
        self._steps.build(self.model, batches)
        return self._loop.run(self._evaluation(), batches, Display(progress), "evaluation")

    def predict(self, data: Any, *, batch_size: int = 32, steps: int | None = None) -> Any:
        """Return the model's outputs on data as NumPy arrays, examples first.

        Args:
            data: All that `fit` takes; of batches `(inputs, targets, ...)` the inputs count. Several inputs in arrays
                are a dict, or `([first, second],)`.
            batch_size: Examples per batch, for arrays.
            steps: How many batches, for data without end.

        Raises:
            DataError: The data is empty or does not fit the model.
        """
        batches = as_batches(data, batch_size=batch_size, steps=("steps", steps))
        batches.lasts(1)
        self._steps.build(self.model, batches)
        step = self._steps.other("predict", self._select(trains=False))
        outputs = [tf.nest.map_structure(lambda output: np.atleast_1d(output), step(b)) for b in batches.drawn()]
        return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *outputs)

    @property
    def policy(self) -> VariablePolicy:
        """What trains."""
        return self._policy

    @policy.setter
    def policy(self, policy: VariablePolicy) -> None:
        if not isinstance(policy, VariablePolicy):
            raise TypeError(
                "`policy` must be a `VariablePolicy`, such as `Freeze('backbone')`. "
                f"Received: {policy!r} of type {type(policy).__name__}."
            )
        self._policy = policy

    @property
    def selection(self) -> Selection:
        """What trains, by the policy and the model as they are now."""
        return self._select()

    @property
    def learning_rates(self) -> LearningRates:
        """The learning rate of each group that trains now: `trainer.learning_rates["head"] = 1e-4` sets one."""
        return LearningRates(self._updates.optimizers, self.selection)

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give what has trained its averaged values inside this context, to evaluate or save with; after, its own.

        Raises:
            RuntimeError: The trainer has no `ema`, or has not trained yet.
        """
        with self._updates.averages.swap(self.step):
            yield

    @property
    def loss_scale(self) -> float | None:
        """By what losses are multiplied now, where a layer computes in float16; None where none does."""
        scale = self._updates.loss_scale
        return None if scale is None else float(scale.value)

    @property
    def microbatches(self) -> int:
        """In how many pieces a batch is cut now."""
        return self._updates.microbatches.count

    @property
    def step(self) -> int:
        """How many steps were trained, over all fits."""
        return self._loop.steps_done

    @property
    def epoch(self) -> int:
        """How many epochs were trained, over all fits."""
        return self._loop.epochs_done

    @property
    def trace_count(self) -> int:
        """How often a training step was traced: once for each selection and signature of a batch."""
        return self._steps.trace_count()

    def explain(self, depth: int = 3) -> str:
        """Return a table of what trains, what is frozen, by which rule, in which mode and at what cost.

        Args:
            depth: How many levels of submodels are shown; below the first, only where they differ inside.
        """
        selection = self.selection
        self._updates.optimizers.prepare(selection, changing=True)
        return report.explain(selection, self._updates.optimizers.state_bytes, depth)

    def _select(self, *, trains: bool = True) -> Selection:
        return self._selections.now(self.policy, Progress(self.step, self.epoch, self._loop.last_logs), trains=trains)

    def _evaluation(self) -> Step:
        return self._steps.other("eval", self._select(trains=False))

    def _due(self, logs: Mapping[str, Any], starting: bool) -> Due:
        return self._selections.due(self.policy, Progress(self.step, self.epoch, logs), starting=starting)
