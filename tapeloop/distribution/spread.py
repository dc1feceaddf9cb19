"""A step that was traced for one device, run on all devices of this process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tapeloop._backend.collectives import called_with
from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.data.batch import Share, examples_of, open_spec_of, sized_spec_of, tensors_in
from tapeloop.distribution.adoption import Copies
from tapeloop.distribution.totals import Totals


class SpreadStep:
    """A step that every device runs on its share of a batch, each with its own copies of the variables.

    Attributes:
        assigned: The variables that it may assign to.
    """

    def __init__(
        self, step: Callable[[Any], Any], spec: Any, known: Sequence[tf.Variable], copies: Copies, *, may_skip: bool
    ) -> None:
        """Trace the step for one device, and make the copies for the others.

        Args:
            step: The step.
            spec: The signature of the share of one device.
            known: The variables that it may use, beside those that its trace names.
            copies: The copies of variables on the other devices.
            may_skip: Whether a device without an example has nothing to do.

        Raises:
            ValueError: It uses something that cannot be copied to several devices.
        """
        self._function = tf.function(step, autograph=False).get_concrete_function(spec)
        self._replicas, self._copies, self._may_skip = copies.replicas, copies, may_skip
        graph = TracedGraph(self._function, known)
        self._variables = [graph.variables.get(name) for name in graph.captures]
        assigned = {graph.variables[name].ref() for name in graph.assigned() & graph.variables.keys()}
        # In the order in which they are known, which is the same on all workers; that of captures is not.
        self.assigned = [variable for variable in known if variable.ref() in assigned]
        if len(self._replicas.devices) > 1:
            for name, outer in graph.captures.items():
                if outer.dtype == tf.resource and name not in graph.variables:
                    raise ValueError(
                        f"The step uses `{name}`, which is no variable of the model, the optimizer or the trainer's "
                        "attributes, and cannot be copied to several devices. Keep it as an attribute of the trainer."
                    )
        for variable in self._variables:
            if variable is not None:
                copies.all_of(variable)

    def __call__(self, batch: Any) -> Any:
        """Run the step on the share of a batch that this process has, and return what it returns on the first device.

        All devices return the same: what they go by are the gradients of the whole batch.
        """
        strategy, devices = self._replicas.strategy, len(self._replicas.devices)
        assert strategy is not None
        returned: list[Any] = []

        def on_replica() -> list[tf.Tensor]:
            numbered = tf.distribute.get_replica_context().replica_id_in_sync_group
            number = int(tf.get_static_value(numbered)) % devices
            share = self._replicas.of_replica(number, trains=not self._may_skip).rows(batch)
            returned.append(self._on(number, share))
            return [value for value in tf.nest.flatten(returned[-1]) if value is not None]

        results = strategy.experimental_local_results(strategy.run(on_replica))
        if not tf.nest.flatten(results):
            return returned[0]
        # No device begins the next step while another is at this one.
        with tf.control_dependencies(tf.nest.flatten(results)):
            first = iter([tf.identity(value) for value in results[0]])
        structure = [None if value is None else next(first) for value in tf.nest.flatten(returned[0])]
        return tf.nest.pack_sequence_as(returned[0], structure)

    def _on(self, replica: int, batch: Any) -> Any:
        """Run the step on the share of one device; an evaluation leaves out a device that has no example."""
        examples = examples_of(batch) if self._may_skip else 1
        if isinstance(examples, int):
            return self._run(replica, batch) if examples else None
        return tf.cond(examples > 0, lambda: self._run(replica, batch), lambda: None)

    def _run(self, replica: int, batch: Any) -> Any:
        taken = [None if each is None else self._copies.of(each, replica) for each in self._variables]
        return called_with(self._function, tensors_in(batch, apart=True), taken)


class Spread:
    """The steps of one kind for one selection, spread over the devices that train together."""

    def __init__(self, copies: Copies, *, trains: bool) -> None:
        """Keep what the steps are spread over.

        Args:
            copies: The copies of variables on the other devices of this process.
            trains: Whether the steps train, so that each device needs an example of every batch.
        """
        self._replicas, self._copies, self._trains = copies.replicas, copies, trains
        self._moved: dict[Any, tf.Variable] = {}
        self._totals: Totals | None = None

    @property
    def is_on(self) -> bool:
        """Whether there are several devices."""
        return self._replicas.are_several

    @property
    def of_worker(self) -> Share | None:
        """The share that this process has of a batch; None: all of it."""
        return self._replicas.of_worker(trains=self._trains)

    def spec_of_share(self, spec: Any) -> Any:
        """Return the signature of the share that one device has of batches of a signature.

        Its number of examples is static where all devices have as many.
        """
        examples, count = next(value.shape[0] for value in tensors_in(spec) if value.shape.rank), self._replicas.count
        return open_spec_of(spec) if examples is None or examples % count else sized_spec_of(spec, examples // count)

    def add(
        self,
        step: Callable[[Any], Any],
        spec: Any,
        known: Sequence[tf.Variable],
        logged: Sequence[tf.Variable],
        alike: Iterable[tf.Variable],
    ) -> SpreadStep:
        """Return a step that every device runs on its share of a batch.

        Args:
            step: The step for one device.
            spec: The signature of its share.
            known: The variables that it may use.
            logged: Those that it adds its logs up in.
            alike: Those that it moves in the same way on all devices.
        """
        _check_taken_over(known)
        known = [*known, self._replicas.token]
        spread = SpreadStep(step, spec, known, self._copies, may_skip=not self._trains)
        settled = {variable.ref() for variable in (*logged, *alike, self._replicas.token)}
        own = {variable.ref(): variable for variable in spread.assigned}
        self._moved |= {reference: variable for reference, variable in own.items() if reference not in settled}
        self._totals = Totals(list(_once(logged)), list(self._moved.values()), self._copies)
        return spread

    def begin(self, *moment: Hashable) -> None:
        """Make the variables of all devices ready for a call of the loop.

        Args:
            moment: What tells calls apart between which variables may have been set, on the first device alone.
        """
        if self._totals is not None:
            self._copies.renew(moment)
            self._totals.begin()

    def end(self, seconds: float, is_stopping: bool) -> tuple[float, bool]:
        """Put together what the devices have added up in a call.

        Args:
            seconds: How long it took here.
            is_stopping: Whether this process is about to end.

        Returns:
            How long it took on average, and whether any process is about to end: the same on all.
        """
        if self._totals is None:
            return seconds, is_stopping
        mean, stopping = self._totals.end(tf.constant([seconds, is_stopping], tf.float64)).numpy()
        return float(mean), bool(stopping)

    def renew(self) -> None:
        """Give the other devices of this process the values that the first has, whatever was set since."""
        self._copies.renew(object())

    def begin_in_graph(self) -> None:
        """Have the logs of a single step begin, in the graph that runs it."""
        if self._totals is not None:
            self._totals.begin()

    def end_in_graph(self) -> None:
        """Put together the logs of a single step, in the graph that runs it."""
        if self._totals is not None:
            self._totals.end(tf.zeros(2, tf.float64))


def _check_taken_over(variables: Iterable[tf.Variable]) -> None:
    for variable in variables:
        if isinstance(variable, tf.distribute.DistributedValues):
            raise ValueError(
                f"The step uses `{variable.name}`, which was made in the scope of the strategy and is no part of the "
                "model. Pass a metric as `metrics=`, hold it in a layer, or make it outside of `strategy.scope()`."
            )


def _once(variables: Iterable[tf.Variable]) -> Iterator[tf.Variable]:
    yield from {variable.ref(): variable for variable in variables}.values()
