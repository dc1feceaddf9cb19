"""The devices that train together: those of this process, and those of other workers."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tapeloop._backend.collectives import Group, all_gathered, is_lost
from tapeloop.data.batch import Share
from tapeloop.errors import DataError, WorkerError

# By the names by which users know them: TensorFlow's classes have others.
SUPPORTED: dict[str, Any] = {
    name: getattr(tf.distribute, name)
    for name in ("OneDeviceStrategy", "MirroredStrategy", "MultiWorkerMirroredStrategy")
}
# Collective ops find each other by two numbers, which all workers count up alike: they run the same program. TensorFlow
# itself counts the keys of groups from 1 on, in the same table.
_keys = itertools.count(1)
_FIRST_GROUP = 7_000
_groups: dict[tuple[str, ...], int] = {}


class Replicas:
    """The devices that train together, each on its share of every batch.

    Attributes:
        strategy: The user's strategy; None: one device, without any of this.
        devices: The devices of this process.
        workers: The number of processes.
        worker: Which of them this is; the first is the chief.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None = None) -> None:
        """Look at a strategy.

        Raises:
            TypeError: It is none that a trainer can train under.
        """
        _check_supported(strategy)
        self.strategy = strategy
        self.devices: tuple[str, ...] = () if strategy is None else tuple(strategy.extended.worker_devices)
        self.workers = 1 if strategy is None else strategy.num_replicas_in_sync // len(self.devices)
        self.worker = 0 if strategy is None or self.workers == 1 else _worker(strategy.cluster_resolver)
        hint = "nccl" if all("GPU" in device for device in self.devices) and not _are_virtual() else "ring"
        self._all = Group(_group_key(f"{self.workers}", *self.devices), self.count, hint)
        self._first = Group(_group_key(f"{self.workers}", "first", *self.devices[:1]), self.workers, "ring")

    @property
    def count(self) -> int:
        """How many devices train together."""
        return self.workers * max(1, len(self.devices))

    @property
    def are_several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.worker == 0

    def of_worker(self, *, trains: bool) -> Share | None:
        """Return the share that this process has of a batch; None: all of it.

        Args:
            trains: Whether each device needs an example of every batch.
        """
        return Share(self.worker, self.workers, self.count * trains) if self.workers > 1 else None

    def of_replica(self, number: int, *, trains: bool) -> Share:
        """Return the share that one device of this process has of the process's share."""
        return Share(number, len(self.devices), len(self.devices) * trains)

    @functools.cached_property
    def token(self) -> tf.Variable:
        """What puts the collective ops of the first device in an order; see `all_reduced`."""
        with tf.init_scope():
            return tf.Variable(0.0, trainable=False, name="token")

    def group(self) -> tuple[Group, int]:
        """Return the group of all devices, and the number of a new collective op of it."""
        return self._all, next(_keys)

    def gathered(self, values: Any) -> Any:
        """Return what all workers give, of shape `[workers, ...]`: each waits for the others.

        Args:
            values: A list of whole numbers, as many on each worker.
        """
        given = tf.constant([values], tf.int64)
        with self.noticing_loss(), tf.device(self.devices[0]):
            return all_gathered(given, self._first, next(_keys)).numpy()

    def from_chief(self, number: int) -> int:
        """Return the number that the chief gives."""
        return number if self.workers == 1 else int(self.gathered([number])[0, 0])

    def any_of_workers(self, value: bool) -> bool:
        """Tell whether a value is true on any worker."""
        return value if self.workers == 1 else bool(self.gathered([value]).any())

    def lost(self, failure: BaseException) -> WorkerError | None:
        """Return the error that says that another worker is gone, if that is what a failure comes from."""
        if self.workers == 1 or not is_lost(failure):
            return None
        return WorkerError(
            f"Worker {self.worker} of {self.workers} had to stop: another worker is gone, or cannot be reached. Look "
            "at its log, and start all workers again: with `fit(checkpoint=...)` the run resumes from the last "
            "checkpoint, with as many workers or another number."
        )

    @contextlib.contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Say inside this context that another worker is gone, where TensorFlow says that an op was aborted."""
        try:
            yield
        except tf.errors.OpError as error:
            raise self.lost(error) or error from None

    def require_examples(self, name: str, examples: int | None) -> None:
        """Check that each device gets an example of a batch of so many, if that is known.

        Raises:
            DataError: It does not.
        """
        if examples is not None and examples < self.count:
            raise DataError(
                f"`{name}` has a batch of {examples} for {self.count} devices, each of which computes a share of it. "
                "Choose another `batch_size`, or leave out the examples that are left over."
            )

    def smallest_share(self, examples: int | None) -> int | None:
        """Return how many examples of a batch of so many the device with the fewest gets, if that is known."""
        return examples if examples is None or self.count == 1 else examples // self.workers // len(self.devices)

    def on_first(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which ops run on the first device of this process."""
        return tf.device(self.devices[0]) if self.devices else contextlib.nullcontext()

    def check_outside(self) -> None:
        """Check that no scope of a strategy is open: what a trainer makes is none of the strategy's.

        Raises:
            RuntimeError: One is.
        """
        if tf.distribute.has_strategy() and not isinstance(
            tf.distribute.get_strategy(), tf.distribute.OneDeviceStrategy
        ):
            raise RuntimeError(
                "The trainer is used within `strategy.scope()`. Only the model, its optimizer and its metrics are made "
                "there: make the trainer, and call it, after the `with` block."
            )


def _check_supported(strategy: object) -> None:
    if strategy is not None and not isinstance(strategy, tuple(SUPPORTED.values())):
        names = ", ".join(f"`{name}`" for name in SUPPORTED)
        raise TypeError(f"`strategy` must be one of {names}. Received: {strategy!r} of type {type(strategy)}.")


def kind_of(strategy: tf.distribute.Strategy) -> str:
    """Return the name by which users know a strategy."""
    return next((name for name, kind in SUPPORTED.items() if isinstance(strategy, kind)), type(strategy).__name__)


def _worker(resolver: Any) -> int:
    """Return the number of this process among the workers, the chief first."""
    has_chief = "chief" in resolver.cluster_spec().jobs
    return int(resolver.task_id or 0) + (has_chief and resolver.task_type != "chief")


def _are_virtual() -> bool:
    """Tell whether several logical GPUs share one, for which NCCL has no ring."""
    return len(tf.config.list_physical_devices("GPU")) < len(tf.config.list_logical_devices("GPU"))


def _group_key(*names: str) -> int:
    return _FIRST_GROUP + _groups.setdefault(names, len(_groups))
