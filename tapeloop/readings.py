"""What can be read of a trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tapeloop.body import Body
from tapeloop.data.batch import examples_of
from tapeloop.data.loader import DataSpec
from tapeloop.feature_cache import report
from tapeloop.feature_cache.fill import open_spec
from tapeloop.feature_cache.report import Frontier
from tapeloop.feature_cache.splitting import split
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.history import History
from tapeloop.loop.phases import ActivePhase, PhaseTracker
from tapeloop.model import summary
from tapeloop.model.selection import Selection
from tapeloop.optimization.optimizers import LearningRates
from tapeloop.policies.base import Progress, VariablePolicy
from tapeloop.step.clock import Clock


class Readings(Body):
    """How far a trainer has come, what trains, and how it explains itself."""

    _loop: EpochLoop
    _selections: PhaseTracker
    _clock: Clock

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
        progress = Progress(self._loop.steps_done, self._loop.epochs_done, self._loop.last_logs)
        if self._loop.runs:
            return self._selections.held(self.policy, progress, trains=True)
        return self._selections.now(self.policy, progress)

    @property
    def learning_rates(self) -> LearningRates:
        """The learning rate of each group that trains now: `trainer.learning_rates["head"] = 1e-4` sets one."""
        return LearningRates(self._updates.optimizers, self.selection)

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give what has trained its averaged values inside this context, to evaluate or save with; after, its own.

        Raises:
            RuntimeError: The trainer has no `ema`, or has not trained yet.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, loss="mse", ema=0.9)
            >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), progress="none")
            >>> with trainer.ema_weights():
            ...     logs = trainer.evaluate((np.ones((8, 4)), np.ones((8, 2))), progress="none")
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
    def step(self) -> Any:
        """How many steps were trained, over all fits: a number, and inside a step a tensor of `tf.int64`."""
        if self._steps.building or self._steps.tracing:
            trains = self._steps.tracing is not None and self._steps.tracing[0] == "train"
            return self._clock.step(trains=trains)
        return self._loop.steps_done

    @property
    def epoch(self) -> Any:
        """How many epochs were trained, over all fits: a number, and inside a step a tensor of `tf.int64`."""
        if self._steps.building or self._steps.tracing:
            return self._clock.epoch()
        return self._loop.epochs_done

    @property
    def history(self) -> History:
        """What all fits recorded, of every epoch that was finished."""
        return self._loop.history

    @property
    def trace_count(self) -> int:
        """How often a training step was traced: once for each selection and signature of a batch."""
        return self._steps.trace_count()

    def explain(self, depth: int = 3) -> str:
        """Return a table of what trains, what is frozen, by which rule, in which mode and at what cost.

        Args:
            depth: How many levels of submodels are shown; below the first, only where they differ inside.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> print(tl.Trainer(model, tl.Freeze("base")).explain().splitlines()[2])
            base              15  -        frozen  Freeze: glob('base')  inference              0 B
        """
        selection = self.selection
        self._updates.optimizers.prepare(selection, changing=True)
        return summary.explain(selection, self._updates.optimizers.state_bytes, depth)

    def frontier(self, data: Any, *, batch_size: int = 32) -> Frontier:
        """Return which part of a training step is frozen and the same for an example whenever it comes.

        That is what `fit(feature_cache=...)` computes once. What it would save is measured on a batch of the data;
        nothing moves.

        Args:
            data: The data, which may be all that `fit` takes and can be gone through again.
            batch_size: Examples per batch, for arrays.

        Raises:
            DataError: The data is empty or does not fit the model.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
            >>> trainer.frontier((np.ones((8, 4), "float32"), np.ones((8, 2), "float32"))).submodels
            ('base',)
        """
        self._loop.check_idle()
        given = DataSpec("data", data, batch_size, ("steps_per_epoch", None))
        batches = given.loader()
        self._steps.build(self.model, batches.specs)
        spec, batch = open_spec(batches), next(iter(batches))
        size = int(examples_of(batch))
        last = size if batches.smallest_batch is None else batches.smallest_batch
        examples = None if batches.batches_per_epoch is None else (batches.batches_per_epoch - 1) * size + last
        step = self._due(self._loop.last_logs, True).step
        found = split(step, spec, batch, random=False)
        return report.frontier(found, batch, examples)

    def _held(self) -> Selection:
        progress = Progress(self._loop.steps_done, self._loop.epochs_done, self._loop.last_logs)
        return self._selections.held(self.policy, progress)

    def _evaluation(self) -> CompiledStep:
        return self._steps.other("eval", self._held())

    def _due(self, logs: Mapping[str, Any], starting: bool) -> ActivePhase:
        progress = Progress(self._loop.steps_done, self._loop.epochs_done, logs)
        return self._selections.due(self.policy, progress, starting=starting)
