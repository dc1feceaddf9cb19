"""What a trainer does with data, as Keras spells it: fit, evaluate, predict, train on a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any, Literal, NoReturn, overload

import keras
import numpy as np
import tensorflow as tf

from tapeloop._backend.fingerprint import fingerprint
from tapeloop._keras_names import check_no_others
from tapeloop._validation import whole_number
from tapeloop._version import __version__
from tapeloop.callbacks.keras_callbacks import KerasCallbacks
from tapeloop.checkpoint.checkpoints import Checkpoints
from tapeloop.checkpoint.contents import RunContents
from tapeloop.checkpoint.session import CheckpointSession, opened
from tapeloop.data.arguments import check_validation_data, is_array, joined, packed, with_validation_split
from tapeloop.data.batch import as_tensors, check_examples, examples_of, open_spec_of, tensors_in
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.data.sampler import Sampler
from tapeloop.distribution.agreement import require_agreement
from tapeloop.dry_run import DryRun
from tapeloop.dry_run import dry_run as trace_phases
from tapeloop.feature_cache.cache import CachedData, FeatureCache
from tapeloop.feature_cache.storage import Memory
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.fit_data import FitData, Validation
from tapeloop.loop.history import History
from tapeloop.loop.progress import ProgressDisplay
from tapeloop.loop.state import Resumption, TrainerState
from tapeloop.model.tree import Model, Tree
from tapeloop.policies.recorded import described
from tapeloop.step.plan import StepParts


class Fits:
    """The methods of a trainer that take data.

    Attributes:
        model: The model as it was passed.
        state: Everything that the run needs to continue, beside the model.
    """

    model: Model
    state: TrainerState
    _loop: EpochLoop
    _parts: StepParts
    _contents: RunContents
    _features: Memory
    _seed: int | None

    # Type checkers want the arguments twice: once for what returns a `History`, once for all.
    @overload
    def fit(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        validation_data: Any = None,
        validation_split: float | None = None,
        validation_freq: int | Collection[int] = 1,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validate_with: Literal["own", "ema"] = "own",
        steps_per_epoch: int | None = None,
        class_weight: Mapping[int, float] | None = None,
        shuffle: bool = True,
        callbacks: Any = None,
        verbose: int | Literal["auto"] = "auto",
        feature_cache: str | os.PathLike[str] | None = None,
        feature_cache_views: int = 1,
        checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
        dry_run: Literal[False] = False,
        **others: NoReturn,
    ) -> History: ...

    @overload
    def fit(
        self, x: Any, y: Any = None, sample_weight: Any = None, *, dry_run: Literal[True], **options: Any
    ) -> DryRun: ...

    @overload
    def fit(
        self, x: Any, y: Any = None, sample_weight: Any = None, *, dry_run: bool, **options: Any
    ) -> History | DryRun: ...

    def fit(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        validation_data: Any = None,
        validation_split: float | None = None,
        validation_freq: int | Collection[int] = 1,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validate_with: Literal["own", "ema"] = "own",
        steps_per_epoch: int | None = None,
        class_weight: Mapping[int, float] | None = None,
        shuffle: bool = True,
        callbacks: Any = None,
        verbose: int | Literal["auto"] = "auto",
        feature_cache: str | os.PathLike[str] | None = None,
        feature_cache_views: int = 1,
        checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
        dry_run: bool = False,
        **others: NoReturn,
    ) -> Any:
        """Train for some more epochs, as Keras' `fit` does.

        Args:
            x: The inputs: an array, or a list, tuple or dict of several. Arrays are NumPy's, tensors (ragged and sparse
                ones too), data frames, or files such as `np.memmap`, with the examples as first dimension. Without
                `y`: a `tf.data.Dataset` of batches, arrays `(inputs, targets[, sample_weight])`, a
                `keras.utils.PyDataset`, or any other iterable of batches.
            y: The targets: an array, or a structure of several.
            sample_weight: The weights of the examples.
            batch_size: Examples per batch, for arrays; by default 32.
            epochs: The number of epochs more.
            validation_data: Data to evaluate after each epoch: `(x, y)`, or whatever `x` may be without `y`.
            validation_split: How much of the arrays, at their end, is set apart to validate on.
            validation_freq: Validate after every this many epochs, or after these epochs, of which the first is 1.
            validation_steps: Batches per evaluation, for data without end.
            validation_batch_size: Examples per batch of an evaluation; by default `batch_size`.
            validate_with: `"own"`: validate with the variables as they train; `"ema"`: with their averages.
            steps_per_epoch: Batches per epoch, for data without end.
            class_weight: Weights of examples by the class of their target; other classes have the weight 1.
            shuffle: Whether arrays, and the batches of a `PyDataset`, are shuffled anew each epoch.
            callbacks: Keras callbacks, or `tl.ForGroup`s of them. One that looks at batches has the loop return to the
                host after each step.
            verbose: 0: silent; 1: a bar; 2: a line an epoch; `"auto"`: a bar in a terminal or notebook, else lines.
            feature_cache: Where the features of the frozen part that comes first in the model are kept, so that they
                are computed once for each example and not once an epoch: `"memory"`, or the path of a folder, which
                later runs use too.
            feature_cache_views: If the model augments at random first: how many augmented versions of each example
                are stored. Epochs cycle through them: less variety, more speed.
            checkpoint: When the run is saved, or the folder alone, where it is saved after each epoch. A program that
                was stopped and is run again goes on where it was: then `epochs` are those of the fit as a whole.
            dry_run: Whether to trace each phase of the schedule on one batch and to return a `DryRun`, which says what
                each takes in memory and what gets no gradient. Nothing moves then.
            **others: None. What Keras' `fit` takes beside these gets an error that says what to write instead.

        Returns:
            A `History`: the logs of each epoch, those of the validation as `val_...`. Or a `DryRun`, if one was asked
            for.

        Raises:
            PolicyError: The policy cannot be resolved for the model.
            DataError: The data is empty or does not fit the model.
            CacheError: Nothing can be cached, it would be wrong, or it does not fit.
            CheckpointError: The folder cannot be used, or has checkpoints of another model or trainer.
            DisconnectedError: A variable that should train gets no gradient.
            NonFiniteError: A loss or a gradient is Inf or NaN.
            RuntimeError: Called inside `ema_weights()`, or within a fit of this trainer.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> trainer = tl.Trainer(model, loss="mse")
            >>> x, y = np.ones((32, 4)), np.ones((32, 2))
            >>> history = trainer.fit(x, y, epochs=2, batch_size=16, validation_split=0.25, verbose=0)
            >>> len(history.history["val_loss"]), trainer.epoch, trainer.step
            (2, 2, 4)
        """
        check_no_others(self.fit, others)
        self._loop.check_may_fit()
        if shuffle not in (True, False):
            raise ValueError(f"`shuffle` must be True or False. Received: {shuffle!r}.")
        whole_number("epochs", epochs, 0)
        self.state.averages.check_may_train()
        given = joined(x, y, sample_weight)
        data, validation_data = with_validation_split(given, validation_data, validation_split)
        sizes = {"validation_steps": validation_steps, "validation_batch_size": validation_batch_size}
        validation_spec = _validation_spec(validation_data, sizes, batch_size)
        listener = self._keras_callbacks(callbacks)
        validation = Validation(validation_freq, "ema" if listener.swaps_averages else validate_with)
        if validation.values == "ema":
            self.state.averages.check_exists()
        spec = DataSpec("x", data, batch_size, ("steps_per_epoch", steps_per_epoch), class_weight, shuffle)
        cache = FeatureCache(self._features, feature_cache, feature_cache_views)
        display = self._display(verbose)
        if dry_run:
            return self._dry_run(spec, validation_spec, epochs)
        with opened(checkpoint, self._contents, is_chief=self._parts.replicas.is_chief) as session:
            fit_data, span = self._prepare(spec, validation_spec, epochs, cache, session)
            listener.check_groups(self._loop.phases.groups_to_come)
            listener.set_params(epochs=epochs, steps=fit_data.loader.batches_per_epoch, verbose=verbose)
            if session is None:
                return self._loop.fit(fit_data, span, display, [listener], validation)
            saved = session.saved_beside(span)
            if saved is not None:
                listener.resume(self.state.epoch - span.start, *saved)
            # What callbacks do comes before the run is saved.
            with session.saving(fit_data, beside=listener, changes_the_end=listener.changes_the_end):
                return self._loop.fit(fit_data, span, display, [listener, session], validation)

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Any = None,
        verbose: int | Literal["auto"] = "auto",
        **others: NoReturn,
    ) -> dict[str, Any]:
        """Return the loss and metrics on any data that `fit` accepts, by name.

        Args:
            x: The inputs, or any data, as for `fit`.
            y: The targets.
            sample_weight: The weights of the examples.
            batch_size: Examples per batch, for arrays; by default 32.
            steps: The number of batches, for data without end.
            callbacks: As for `fit`.
            verbose: As for `fit`.
            **others: None, as for `fit`.

        Raises:
            DataError: The data is empty or does not fit the model.
            RuntimeError: Called within an epoch of this trainer, such as by a policy.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> trainer = tl.Trainer(model, loss="mse", metrics=["mae"])
            >>> sorted(trainer.evaluate(np.ones((8, 4)), np.ones((8, 2)), verbose=0))
            ['loss', 'mae']
        """
        check_no_others(self.evaluate, others)
        self._loop.check_idle()
        listener, display = self._keras_callbacks(callbacks), self._display(verbose)
        loader = self._loader(joined(x, y, sample_weight), batch_size, steps)
        self._loop.steps.build(self.model, loader.specs)
        require_agreement(self._parts.replicas, lambda: {"the batches": loader.batches_per_epoch})
        listener.set_params(epochs=1, steps=loader.batches_per_epoch, verbose=verbose)
        self._parts.interventions.note()  # whoever calls this may have set weights, such as a callback within a fit
        step, averages = self._loop.evaluation(), self.state.averages
        with averages.swap(self.state.step) if listener.swaps_averages else contextlib.nullcontext():
            return self._loop.evaluate(step, loader, display, "evaluation", [listener])

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **others: NoReturn) -> dict[str, Any]:
        """Train one step on one batch, for data that comes one batch at a time: online or reinforcement learning.

        The step counts, the epoch does not: a policy that changes with epochs changes with those of `fit`. The model's
        `trainable` flags are read at the first batch, and after each `fit`.

        Args:
            x: The inputs, with the batch as first dimension; without `y`, a whole batch as `train_step` takes it.
            y: The targets.
            sample_weight: The weights of the examples.
            **others: None, as for `fit`.

        Returns:
            What the step logged, of this batch alone.

        Raises:
            PolicyError, DataError, DisconnectedError, NonFiniteError, RuntimeError: As `fit` does.

        Example:
            >>> trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
            >>> logs = trainer.train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
            >>> list(logs), trainer.step
            (['loss'], 1)
        """
        check_no_others(self.train_on_batch, others)
        self._loop.check_idle()
        self.state.averages.check_may_train()
        # As `fit` does of arrays: in Keras' float type, so that both share a trace.
        batch = as_tensors(packed(x, y, sample_weight), "the batch")
        if y is not None or sample_weight is not None:  # any batch of a step of the user's may be otherwise
            check_examples([tensor for tensor in tensors_in(batch) if tensor.shape.rank], "the batch")
        if self.state.microbatches.count > 1:
            self.state.microbatches.require_examples(tf.get_static_value(examples_of(batch)))
        self._parts.replicas.require_examples("the batch", tf.get_static_value(examples_of(batch)))
        self._loop.steps.build(self.model, lambda: iter([open_spec_of(batch)]))
        return self._loop.train_on_batch(batch)

    def predict(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Any = None,
        verbose: int | Literal["auto"] = 0,
        **others: NoReturn,
    ) -> Any:
        """Return the model's outputs on data as NumPy arrays, examples first.

        Args:
            x: The inputs: an array, or a list or dict of several; or any data that `fit` accepts, of whose batches
                `(inputs, targets, ...)` the inputs count.
            batch_size: Examples per batch, for arrays; by default 32.
            steps: The number of batches, for data without end.
            callbacks: As for `fit`.
            verbose: As for `fit`; by default silent.
            **others: None, as for `fit`.

        Raises:
            DataError: The data is empty or does not fit the model.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> tl.Trainer(model).predict(np.ones((8, 4))).shape
            (8, 2)
        """
        check_no_others(self.predict, others)
        listener, display = self._keras_callbacks(callbacks), self._display(verbose)
        # A list of arrays is several inputs, as Keras has it: of targets there is no need.
        data = (x,) if isinstance(x, list) and all(map(is_array, x)) else joined(x)
        loader = self._loader(data, batch_size, steps)
        self._loop.steps.build(self.model, loader.specs, "predict")
        listener.set_params(epochs=1, steps=loader.batches_per_epoch, verbose=verbose)
        averages = self.state.averages
        with averages.swap(self.state.step) if listener.swaps_averages else contextlib.nullcontext():
            # A scalar for a batch, such as a mean, becomes a row, so that batches can be joined.
            batches = listener.predicting(self._loop.predict(loader, display))
            outputs = [tf.nest.map_structure(np.atleast_1d, batch) for batch in batches]
        return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *outputs)

    @property
    def stop_training(self) -> bool:
        """Whether the fit that runs shall end after its current steps and the epoch's validation; set it to end it.

        Example:
            >>> class Enough(tl.VariablePolicy):
            ...     def group(self, variable):
            ...         return "all"
            ...     def at(self, progress):
            ...         trainer.stop_training = progress.epoch == 1  # that epoch is the last
            ...         return self
            >>> trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
            >>> trainer.policy = Enough()
            >>> history = trainer.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=5, verbose=0)
            >>> trainer.epoch
            2
        """
        return self._loop.stop_training

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        self._loop.stop_training = bool(value)

    def _display(self, verbose: int | str) -> ProgressDisplay:
        """Return where progress is shown: by the chief alone, if there are several workers."""
        display = ProgressDisplay(verbose)
        return display if self._parts.replicas.is_chief else ProgressDisplay(0)

    def _keras_callbacks(self, callbacks: Any) -> KerasCallbacks:
        return KerasCallbacks(callbacks, self.model, self._loop, self._parts.objective)

    def _loader(self, data: Any, batch_size: int | None, steps: int | None) -> DataLoader:
        """Return a loader of one epoch of data, in the order in which it lies."""
        loader = DataSpec("x", data, batch_size, ("steps", steps), is_once=True).loader()
        loader.require_epochs(1)
        return loader

    def _dry_run(self, spec: DataSpec, validation_spec: DataSpec | None, epochs: int) -> DryRun:
        """Return what a fit would take, without any of it."""
        span = range(self.state.epoch, self.state.epoch + epochs)
        fit_data = FitData(spec, validation_spec, span)
        self._loop.steps.build(self.model, fit_data.loader.specs)
        self._loop.phases.resolve_to_come()
        return trace_phases(self.model, self._loop, fit_data)

    def _prepare(
        self,
        spec: DataSpec,
        validation_spec: DataSpec | None,
        epochs: int,
        cache: FeatureCache,
        session: CheckpointSession | None,
    ) -> tuple[FitData, range]:
        """Return the data and the epochs of a fit, having built the model and brought the run to its checkpoint.

        Args:
            spec: The data to train on, not yet shuffled.
            validation_spec: The data to validate on, or None.
            epochs: The number of epochs.
            cache: The cache of features.
            session: The folder of checkpoints, if there is one.
        """
        span, resumption = self.state.plan_fit(epochs, None if session is None else session.resumption)
        replicas = self._parts.replicas
        # First what decides how often workers wait for each other from here on.
        found = None if resumption is None else (resumption.epoch, resumption.progress)
        require_agreement(replicas, lambda: {**self._described(), "epochs": span, "the checkpoint": found})
        seed = Sampler(spec.shuffle, self._seed).seed if resumption is None else resumption.shuffle_seed
        seed = seed if seed is None else replicas.from_chief(seed)
        spec = dataclasses.replace(spec, seed=seed)
        fit_data = self._fit_data(spec, validation_spec, span, resumption, cache)
        replicas.require_examples("x", fit_data.loader.smallest_batch)
        self.state.microbatches.require_examples(replicas.smallest_share(fit_data.loader.smallest_batch))
        # Whatever is wrong with the options is said before the model is built, which costs a trace.
        is_eager, is_saved = self._parts.compilation.run_eagerly, session is not None
        specs = [spec] if validation_spec is None else [spec, validation_spec]
        cache.require_compatible(specs, self.state.microbatches, run_eagerly=is_eager, is_saved=is_saved)
        self._loop.steps.build(self.model, fit_data.loader.specs)
        if session is not None:
            session.resume(span)
        # A policy is asked about variables, which a model that was not called before has only now.
        self._loop.phases.resolve_to_come()
        require_agreement(replicas, lambda: {"the data": fit_data.described(), "the weights": self._fingerprint()})
        self.state.begin_fit(span, fit_data.resumption, seed)
        if self.state.is_of_later_fit:
            fit_data.pass_over(epochs)
        return fit_data, span

    def _described(self) -> dict[str, object]:
        """Return what workers that train together must have in common, by what it is called."""
        tree, state = Tree.of(self.model), self.state
        return {
            "the versions": {"tapeloop": __version__, "tensorflow": tf.__version__, "keras": keras.__version__},
            "the class": f"{type(self).__module__}.{type(self).__name__}",
            "the model": [(v.path, v.shape, v.dtype, v.trainable) for v in tree.variables],
            "the policy": described(self._parts.policy),
            "the optimizers": state.optimizers.settings(None),
            "the options": [self._parts.compilation, self._parts.nonfinite, state.microbatches.count],
            "the step": (state.step, state.epoch),
        }

    def _fingerprint(self) -> str:
        return fingerprint([variable.tf_variable for variable in Tree.of(self.model).variables]).hex()

    def _fit_data(
        self,
        spec: DataSpec,
        validation_spec: DataSpec | None,
        span: range,
        resumption: Resumption | None,
        cache: FeatureCache,
    ) -> FitData:
        first = span.start if resumption is None else resumption.first_epoch
        given = spec, validation_spec, range(first, span.stop), resumption
        return CachedData(cache, *given) if cache.is_on else FitData(*given)


def _validation_spec(data: Any, sizes: Mapping[str, int | None], batch_size: int | None) -> DataSpec | None:
    """Return the data to validate on, if there is any; its batches are as large as those of training unless said."""
    check_validation_data(data, sizes)
    if data is None:
        return None
    own_size = sizes["validation_batch_size"]
    steps = "validation_steps", sizes["validation_steps"]
    return DataSpec("validation_data", data, batch_size if own_size is None else own_size, steps, is_once=True)
