"""The trainer: what a user makes, subclasses and runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import tensorflow as tf

from tapeloop._validation import whole_number
from tapeloop.checkpoint.contents import RunContents
from tapeloop.checkpoint.verbs import SavesRuns
from tapeloop.data.arguments import joined
from tapeloop.data.loader import DataSpec
from tapeloop.distribution.adoption import adopt
from tapeloop.distribution.options import check_options
from tapeloop.distribution.reduction import Reduction
from tapeloop.distribution.replicas import Replicas
from tapeloop.feature_cache.report import Frontier, frontier_of
from tapeloop.feature_cache.storage import Memory
from tapeloop.fitting import Fits
from tapeloop.folding.option import Folding
from tapeloop.inspection import ShowsItself
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.history import History
from tapeloop.loop.nonfinite import NonFiniteHandler
from tapeloop.loop.phases import PhaseTracker
from tapeloop.loop.state import TrainerState
from tapeloop.loop.step_cache import StepCache
from tapeloop.loop.steps_per_call import Pace
from tapeloop.model.filters import FilterLike
from tapeloop.model.suitability import check_own_step
from tapeloop.model.tree import AnyModel, Tree
from tapeloop.optimization.clipping import Clipping
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.finite_check import runs_on_gpu
from tapeloop.optimization.loss_scale import LossScale
from tapeloop.optimization.optimizers import LearningRates, Optimizers
from tapeloop.optimization.updates import Updates, UpdateStatistics
from tapeloop.policies.base import VariablePolicy
from tapeloop.policies.static import TrainAll
from tapeloop.step.accumulation import Microbatches
from tapeloop.step.frozen_dtype import FrozenDtype
from tapeloop.step.objective import Objective
from tapeloop.step.plan import Compilation, StepParts
from tapeloop.step.remat import Remat
from tapeloop.step.user_attributes import UserAttributes
from tapeloop.step.user_step import OVERRIDABLE, UserStep
from tapeloop.tuning.tune import TunesItself


class Trainer(Fits, SavesRuns, ShowsItself, TunesItself, UserStep):
    """Trains what a policy selects of a model, and leaves the rest bit-identical.

    In research code, subclass it and override `forward`, `compute_loss`, `train_step` or `eval_step`, from least to
    most control.

    Attributes:
        model: The model as it was passed.
        state: Everything that the run needs to continue, beside the model.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer="adam", metrics=["mae"])
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=2, verbose=0)
        >>> sorted(history.history), trainer.step
        (['loss', 'mae'], 2)
        >>> trainer.policy = tl.TrainAll()
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), verbose=0)
        >>> trainer.epoch, trainer.history.epoch, trainer.trace_count
        (3, [1, 2, 3], 2)
        >>> trainer.microbatches, trainer.loss_scale
        (1, None)
    """

    def __init__(
        self,
        model: AnyModel,
        policy: VariablePolicy | None = None,
        *,
        loss: Any = None,
        optimizer: Any = "adam",
        metrics: Any = None,
        weighted_metrics: Any = None,
        loss_weights: Any = None,
        clip_norm: float | Mapping[str, float] | None = None,
        microbatches: int | Literal["auto"] = 1,
        nonfinite: Literal["raise", "skip", "ignore"] = "raise",
        max_skipped: int = 10,
        ema: float | None = None,
        remat: FilterLike | None = None,
        jit_compile: bool | Literal["auto"] = "auto",
        run_eagerly: bool = False,
        steps_per_call: int | Literal["auto"] = "auto",
        strategy: tf.distribute.Strategy | None = None,
        fold_frozen: bool | Literal["auto"] = "auto",
        frozen_dtype: Literal["bfloat16"] | None = None,
        log_updates: bool = False,
        ignore_model_step: bool = False,
        seed: int | None = None,
    ) -> None:
        """Make a trainer. Nothing is traced before its first step.

        Args:
            model: A Keras model or layer, a `tf.Module`, or a mapping from names to such.
            policy: What trains; by default all that can.
            loss: A loss as `keras.Model.compile` takes it. It is not needed if `compute_loss` or `train_step` is
                overridden, or if layers add losses.
            optimizer: A Keras optimizer or its name, or a mapping with one for each group. The trainer uses the very
                object, and clones it for variables that train in another group or begin at another time.
            metrics: Metrics as `keras.Model.compile` takes them.
            weighted_metrics: Metrics to which sample weights apply, likewise.
            loss_weights: The weights of the losses of several outputs, likewise.
            clip_norm: The norm to which the gradients of an update are clipped together, or one for each of some
                groups.
            microbatches: The number of pieces that a batch is cut in. They are computed one after the other and
                averaged by examples, for one update: the large batch's result, except for layers and losses that look
                across a batch, in a fraction of its memory. `"auto"` tries the first batch of each fit and phase: if
                it runs out of memory, the step is undone and the number doubled.
            nonfinite: What an Inf or NaN in a loss or a gradient does: `"raise"` stops, `"skip"` goes on and logs
                `skipped_steps`, the step having changed nothing; `"ignore"` does not look.
            max_skipped: The number of steps in a row that may be skipped before `"skip"` raises.
            ema: The decay of an exponential moving average of what trains, such as 0.999; see `ema_weights`.
            remat: Submodels whose activations are computed again for the gradient instead of kept: a path glob, a
                class, a layer, or a list of these.
            jit_compile: Whether XLA compiles the steps; `"auto"`: on a GPU, if XLA can.
            run_eagerly: Whether steps run op by op in Python, for breakpoints and prints.
            steps_per_call: The number of steps that the loop in the graph runs before the host looks; `"auto"`: for
                about 0.2 s.
            strategy: The `OneDeviceStrategy`, `MirroredStrategy` or `MultiWorkerMirroredStrategy` in whose scope the
                model was made: each batch is shared out among its devices, and the gradients of what trains are
                averaged. The trainer itself is made outside of the scope.
            fold_frozen: Whether what the frozen part computes of its weights alone is computed once and not in each
                step, and BatchNormalization goes into the convolution before it; `"auto"`: where a step runs 50 times
                or more in a row. Losses then differ by rounding, about 1e-6; weights that are set by hand are noticed.
            frozen_dtype: `"bfloat16"`: the layers of submodels that are frozen as a whole compute in it, from copies of
                their weights, and give float32; what trains computes as ever. It pays on a device that has it.
            log_updates: Whether `group/gradient_norm`, before clipping, and `group/update_ratio`, the norm of the
                update over that of the weights, are logged for each group.
            ignore_model_step: Whether the trainer may ignore a `train_step`, `test_step`, `compute_loss` or
                `compute_metrics` that the model itself overrides for Keras' `fit`.
            seed: The seed by which arrays are shuffled.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An option has a value that it cannot have, the model has a step of its own, or it was not made
                in the scope of the strategy.
        """
        # Told by the class: a method that is replaced later on the object is called all the same, without AutoGraph.
        overridden = {name for name in OVERRIDABLE if getattr(type(self), name) is not vars(UserStep)[name]}
        if not ignore_model_step:
            check_own_step(model, overridden, type(self).__name__)
        Pace(steps_per_call)  # raises if the number is wrong
        self._seed = None if seed is None else whole_number("seed", seed, 0)
        objective = Objective(loss, loss_weights, metrics, weighted_metrics, getattr(model, "output_names", None))
        handler = NonFiniteHandler(nonfinite, max_skipped)
        compilation = Compilation(bool(overridden), jit_compile, run_eagerly, steps_per_call)
        pieces, beside = Microbatches(microbatches), tf.nest.flatten([optimizer, metrics, weighted_metrics])
        replicas = _replicas(strategy, model, beside, objective, pieces, compilation)
        self.state = TrainerState(Optimizers(optimizer), MovingAverages(ema), LossScale(), pieces)
        parts = StepParts(
            bodies={"train": self.train_step, "eval": self.eval_step, "predict": self._predict_step},
            objective=objective,
            updates=_updates(self.state, Clipping(clip_norm), UpdateStatistics(is_on=log_updates), replicas),
            attributes=UserAttributes(vars(self), model, type(self)),
            # Python's `if` and `for` over tensors are the user's to write; converting our own code costs a second.
            compilation=compilation,
            remat=Remat(remat),
            frozen_dtype=FrozenDtype(frozen_dtype),
            is_plain=self._is_plain,
            nonfinite=nonfinite,
            max_consecutive=handler.max_consecutive,
            masks=runs_on_gpu(),
            replicas=replicas,
        )
        # From here on the methods of a step find what they act on.
        super().__init__(model, parts)
        steps = StepCache(parts, self.state.microbatches, Folding(fold_frozen))
        self._loop = EpochLoop(steps, PhaseTracker(model, steps, self.state), self.state, handler)
        self._contents = RunContents(model, self._loop, parts.attributes)
        # Kept from one fit to the next, which finds the features of the first.
        self._features = Memory()
        self.policy = TrainAll() if policy is None else policy

    # Reading it

    @property
    def policy(self) -> VariablePolicy:
        """What trains. Assign another policy between two fits: state is carried over, nothing else need be done."""
        return self._parts.policy

    @policy.setter
    def policy(self, policy: VariablePolicy) -> None:
        if not isinstance(policy, VariablePolicy):
            raise TypeError(
                "`policy` must be a `VariablePolicy`, such as `Freeze('backbone')`. "
                f"Received: {policy!r} of type {type(policy).__name__}."
            )
        self._parts.policy = policy

    @property
    def learning_rates(self) -> LearningRates:
        """The learning rate of each group that trains now, to be read and set without a new trace.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
            >>> trainer = tl.Trainer(model, tl.Groups({"head": "head"}), loss="mse", optimizer="adam")
            >>> trainer.learning_rates["head"] = 1e-4
            >>> trainer.learning_rates
            {'head': 0.0001}
        """
        return LearningRates(self.state.optimizers, self.selection)

    @property
    def loss_scale(self) -> float | None:
        """The current float16 loss scale, or None."""
        return None if self.state.loss_scale.value is None else float(self.state.loss_scale.value)

    @property
    def microbatches(self) -> int:
        """The number of pieces that a batch is cut in now."""
        return self.state.microbatches.count

    @property
    def reduced_bytes(self) -> int:
        """How many bytes each device gives to the others in a training step, by the one built last; 0 on one device.

        They are the gradients of what trains, the loss and the number of examples: nothing of what is frozen.

        Example:
            >>> tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse").reduced_bytes
            0
        """
        reduction = self._parts.updates.reduction
        return 0 if reduction is None else reduction.step_bytes

    @property
    def step(self) -> Any:
        """The number of steps trained, over all fits; inside a step, a scalar tensor of `tf.int64`."""
        return self.state.step if self._parts.context is None else self._parts.context.step()

    @property
    def epoch(self) -> Any:
        """The number of epochs trained, over all fits; inside a step, a scalar tensor of `tf.int64`."""
        return self.state.epoch if self._parts.context is None else self._parts.context.epoch()

    @property
    def history(self) -> History:
        """What all fits recorded, of every epoch that was finished."""
        return self.state.history

    @property
    def trace_count(self) -> int:
        """How often a training step was traced: once for each selection and signature of batches."""
        return self._loop.steps.trace_count()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give what has trained its averaged values inside this context, to evaluate or save with; after, its own.

        Raises:
            RuntimeError: The trainer has no `ema`, or has not trained yet.

        Example:
            >>> x, y = np.ones((8, 4)), np.ones((8, 2))
            >>> trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse", ema=0.9)
            >>> history = trainer.fit((x, y), verbose=0)
            >>> with trainer.ema_weights():
            ...     logs = trainer.evaluate((x, y), verbose=0)
        """
        with self.state.averages.swap(self.state.step):
            yield

    def frontier(self, x: Any, y: Any = None, sample_weight: Any = None, *, batch_size: int | None = None) -> Frontier:
        """Return the part of a training step that `fit(feature_cache=...)` computes once for each example.

        That part is frozen, comes first, and gives the same for an example whenever it comes. What the cache would
        save is measured on a batch of the data; no variable of the model moves.

        Args:
            x: The inputs, or any data that `fit` accepts and that can be gone through again.
            y: The targets, as for `fit`.
            sample_weight: The weights of the examples, likewise.
            batch_size: Examples per batch, for arrays; by default 32.

        Raises:
            DataError: The data is empty or does not fit the model.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
            >>> trainer.frontier(np.ones((8, 4), "float32"), np.ones((8, 2), "float32")).submodels
            ('base',)
        """
        self._loop.check_idle()
        self._parts.interventions.note()  # what trains is looked at anew
        loader = DataSpec("x", joined(x, y, sample_weight), batch_size).loader()
        self._loop.steps.build(self.model, loader.specs)
        return frontier_of(self._loop.phases.due(starting=True).step, loader)

    def __reduce__(self) -> Any:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"A {type(self).__name__} cannot be pickled or copied: it holds compiled steps. Save the model, as by "
            "`trainer.model.save(path)`, or make another trainer of it."
        )


def _replicas(
    strategy: tf.distribute.Strategy | None,
    model: AnyModel,
    beside: Iterable[object],
    objective: Objective,
    microbatches: Microbatches,
    compilation: Compilation,
) -> Replicas:
    """Return who trains, having taken over what was made in the strategy's scope.

    Args:
        strategy: The strategy.
        model: The model.
        beside: What was made beside it: optimizers and metrics.
        objective: The loss.
        microbatches: The number of pieces that batches are cut in.
        compilation: How steps are compiled.

    Raises:
        TypeError, ValueError: The options do not go together, or what was made elsewhere; nothing was taken over.
    """
    replicas, tree = Replicas(strategy), Tree.of(model)
    # Found now and not in the first step: it is a matter of the options alone.
    if microbatches.adapts or microbatches.count > 1:
        objective.check_averages("Micro-batches", "set `microbatches=1`")
    if replicas.are_several:
        check_options(tree, compilation.jit_compile, adapts=microbatches.adapts, run_eagerly=compilation.run_eagerly)
        objective.check_averages("Devices", "train on one device")
    adopt(tree, beside, replicas)
    return replicas


def _updates(state: TrainerState, clipping: Clipping, statistics: UpdateStatistics, replicas: Replicas) -> Updates:
    """Return what becomes of gradients: on several devices they are averaged first."""
    reduction = Reduction(replicas) if replicas.are_several else None
    return Updates(state.optimizers, clipping, state.averages, state.loss_scale, statistics, reduction)
