"""The trainer: what a user makes, subclasses and runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._validation import whole_number
from tapeloop.body import OVERRIDABLE, Body
from tapeloop.data.batch import as_tensors, examples_of, open_spec_of
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.data.sampler import Sampler
from tapeloop.feature_cache.cache import FeatureCache
from tapeloop.feature_cache.storage import Memory
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.history import History
from tapeloop.loop.nonfinite import NonFiniteHandler
from tapeloop.loop.pace import Pace
from tapeloop.loop.phases import ActivePhase, PhaseTracker
from tapeloop.loop.progress import ProgressDisplay
from tapeloop.loop.step_cache import StepCache
from tapeloop.model.filters import FilterLike
from tapeloop.model.suitability import check_one_device, check_own_step
from tapeloop.model.tree import Model, Tree
from tapeloop.optimization.clipping import Clipping
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.microbatches import Microbatches
from tapeloop.optimization.optimizers import Optimizers
from tapeloop.optimization.updates import Updates
from tapeloop.policies.base import VariablePolicy
from tapeloop.policies.static import TrainAll
from tapeloop.readings import Readings
from tapeloop.step.accumulation import check_pieces
from tapeloop.step.clock import Clock
from tapeloop.step.compilation import Compilation
from tapeloop.step.objective import Objective
from tapeloop.step.remat import Remat


class Trainer(Readings):
    """Trains what a policy selects of a model, and leaves the rest bit-identical.

    In research code, subclass it and override the one of `forward`, `compute_loss`, `train_step` and `eval_step` that
    gives the control needed.

    Attributes:
        model: The model as it was passed.
        policy: What trains. Assign another between two fits: state is carried over, and nothing else need be done.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer="adam", metrics=["mae"])
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=2, progress="none")
        >>> sorted(history.history), trainer.step
        (['loss', 'mae'], 2)
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
        remat: FilterLike | None = None,
        jit_compile: bool | str = "auto",
        run_eagerly: bool = False,
        steps_per_call: int | str = "auto",
        ignore_model_step: bool = False,
        seed: int | None = None,
    ) -> None:
        """Make a trainer. Nothing is traced or allocated before the first fit.

        Args:
            model: A Keras model or layer, a `tf.Module`, or a mapping from names to such.
            policy: What trains; by default all that can.
            loss: A loss as `keras.Model.compile` takes it. Not needed where `compute_loss` or `train_step` is
                overridden, or where layers add losses.
            optimizer: A Keras optimizer or its name, or a mapping with one for each group. It is used as it is, and
                cloned for variables that train in another group or begin at another time.
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
            ignore_model_step: Whether a `train_step`, `test_step`, `compute_loss` or `compute_metrics` that the model
                itself overrides for Keras' `fit` may be left aside.
            seed: The seed by which arrays are shuffled.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An option has a value that it cannot have, the model has a step of its own, or it was made
                under a distribution strategy.
        """
        overridden = {name for name in OVERRIDABLE if getattr(type(self), name) is not getattr(Body, name)}
        check_one_device(Tree.of(model))
        if not ignore_model_step:
            check_own_step(model, overridden, type(self).__name__)
        self.model = model
        self.policy = TrainAll() if policy is None else policy
        self._seed = None if seed is None else whole_number("seed", seed, 0)
        names = getattr(model, "output_names", None)
        self._objective = Objective(loss, loss_weights, metrics, weighted_metrics, names)
        pieces = Microbatches(microbatches)
        if pieces.adapts or pieces.count > 1:
            self._objective.check_averages()
        judge = NonFiniteHandler(nonfinite, max_skipped)
        parts = Optimizers(optimizer), Clipping(clip_norm), pieces, MovingAverages(ema)
        self._updates = Updates(*parts, looks=judge.looks, ends_at_bad=judge.patience == 0)
        bodies = {"train": self.train_step, "eval": self.eval_step, "predict": self._predict_step}
        # Python's `if` and `for` over tensors are the user's to write; converting our own code costs a second.
        how = Compilation(bool(overridden), jit_compile, run_eagerly, steps_per_call)
        self._clock = Clock()
        Pace(steps_per_call)  # which raises what is wrong with it
        self._steps = StepCache(
            bodies,
            self._objective,
            self._updates,
            self._clock,
            how,
            Remat(remat),
            self._kept,
            self._others,
            self._is_plain,
            self._attributes,
        )
        self._loop = EpochLoop(self._steps, judge)
        self._selections = PhaseTracker(model, self._steps, self._updates)
        self._cached = Memory()

    def __reduce__(self) -> Any:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"A {type(self).__name__} cannot be pickled or copied: it holds compiled steps. Save the model, as by "
            "`trainer.model.save(path)`, or make another trainer of it."
        )

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
        feature_cache: str | os.PathLike[str] | None = None,
        feature_cache_views: int = 1,
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
            feature_cache: Where what is frozen and comes first in the model is kept, so that it is computed once for
                each example and not once an epoch: `"memory"`, or the path of a folder, which later runs use too.
            feature_cache_views: How many passes of it are kept where the model augments at random first: each epoch
                sees one of them, and no others are ever drawn.
            progress: `"auto"`, `"bar"`, `"lines"` or `"none"`.

        Returns:
            The logs of each epoch, those of the validation as `val_...`.

        Raises:
            PolicyError: The policy cannot be resolved for the model.
            DataError: The data is empty or does not fit the model.
            CacheError: Nothing can be cached, it would be wrong, or it does not fit.
            DisconnectedError: A variable that should train gets no gradient.
            NonFiniteError: A loss or a gradient is Inf or NaN.
            RuntimeError: Called inside `ema_weights()`, or within an epoch of this trainer.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, loss="mse")
            >>> x, y = np.ones((32, 4)), np.ones((32, 2))
            >>> history = trainer.fit((x, y), epochs=2, batch_size=16, validation_data=(x, y), progress="none")
            >>> len(history.history["val_loss"]), trainer.epoch
            (2, 2)
        """
        self._loop.check_idle()
        whole_number("epochs", epochs, 0)
        self._updates.averages.check_may_train()
        steps, seed = ("steps_per_epoch", steps_per_epoch), Sampler(shuffle, self._seed).seed
        given = DataSpec("data", data, batch_size, steps, class_weight, shuffle, seed)
        batches, validation = given.loader(given.sampler(self.epoch)), None
        judged = DataSpec("validation_data", validation_data, batch_size, ("validation_steps", validation_steps))
        if validation_data is not None:
            validation = judged.loader()
            validation.require_epochs(epochs)
            validation.cursor()
        batches.require_epochs(epochs)
        check_pieces(self._updates.microbatches, batches.smallest_batch)
        cache = FeatureCache(self._cached, feature_cache, feature_cache_views)
        cache.check([given, judged], self._updates.microbatches, self._steps.run_eagerly)
        self._steps.build(self.model, batches.specs)
        self._selections.check(self.policy)

        def train(due: ActivePhase) -> DataLoader:
            return cache.batches(due.step, given, batches, self.epoch, due.every_steps)

        judge = None if validation is None else functools.partial(cache.batches, given=judged, plain=validation)
        return self._loop.fit(self._due, self._evaluation, train, judge, epochs, ProgressDisplay(progress))

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

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, loss="mse", metrics=["mae"])
            >>> sorted(trainer.evaluate((np.ones((8, 4)), np.ones((8, 2))), progress="none"))
            ['loss', 'mae']
        """
        self._loop.check_idle()
        batches = DataSpec("data", data, batch_size, ("steps", steps)).loader()
        batches.require_epochs(1)
        self._steps.build(self.model, batches.specs)
        return self._loop.run(self._evaluation(), batches, ProgressDisplay(progress), "evaluation")

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None) -> dict[str, Any]:
        """Train one step on one batch, for data that comes one batch at a time: online or reinforcement learning.

        The step counts, the epoch does not: a policy that changes with epochs changes with those of `fit`. The model's
        `trainable` flags are read at the first batch, and after each `fit`.

        Args:
            x: The inputs, with the batch as the first dimension; without `y`, a whole batch as `train_step` takes it.
            y: The targets.
            sample_weight: The weights of the examples.

        Returns:
            What the step logged, of this batch alone.

        Raises:
            PolicyError, DataError, DisconnectedError, NonFiniteError, RuntimeError: As `fit` does.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
            >>> logs = trainer.train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
            >>> list(logs), trainer.step
            (['loss'], 1)
        """
        self._loop.check_idle()
        self._updates.averages.check_may_train()
        given = x if y is None and sample_weight is None else (x, y) if sample_weight is None else (x, y, sample_weight)
        batch = as_tensors(given, "the batch")
        if self._updates.microbatches.count > 1:
            examples = examples_of(batch)
            check_pieces(self._updates.microbatches, examples if isinstance(examples, int) else None)
        self._steps.build(self.model, lambda: iter([open_spec_of(batch)]))
        return self._loop.train_on_batch(batch, self.policy, self._due)

    def predict(self, data: Any, *, batch_size: int = 32, steps: int | None = None) -> Any:
        """Return the model's outputs on data as NumPy arrays, examples first.

        Args:
            data: All that `fit` takes; of batches `(inputs, targets, ...)` the inputs count. Several inputs in arrays
                are a dict, or `([first, second],)`.
            batch_size: Examples per batch, for arrays.
            steps: How many batches, for data without end.

        Raises:
            DataError: The data is empty or does not fit the model.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> tl.Trainer(model).predict(np.ones((8, 4))).shape
            (8, 2)
        """
        batches = DataSpec("data", data, batch_size, ("steps", steps)).loader()
        batches.require_epochs(1)
        self._steps.build(self.model, batches.specs, "predict")
        step = self._steps.other("predict", self._held())
        outputs = [tf.nest.map_structure(lambda output: np.atleast_1d(output), step(b)) for b in batches]
        return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *outputs)
