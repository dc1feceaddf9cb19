"""The batches of a `keras.utils.PyDataset`, made by its workers."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import keras

from tapeloop.data.sampler import Sampler


class PyDatasetBatches:
    """The batches of a `keras.utils.PyDataset`, made by its workers if it has some."""

    def __init__(self, dataset: keras.utils.PyDataset, sampler: Sampler) -> None:
        """Keep the data set, and the sampler that orders its batches."""
        self._dataset = dataset
        self._sampler = sampler
        self._read = 0

    def skip(self, passes: int, batches: int) -> None:
        """Have the next pass begin after so many passes more, and after so many of its batches."""
        self._sampler.skip(passes)
        # Keras promises these calls around each epoch, in which a data set may draw its examples.
        for _ in range(passes):
            self._dataset.on_epoch_begin()
            self._dataset.on_epoch_end()
        self._read = batches

    def __len__(self) -> int:
        return int(self._dataset.num_batches or 0)

    def __iter__(self) -> Iterator[Any]:
        dataset = self._dataset
        dataset.on_epoch_begin()
        count = dataset.num_batches
        read, self._read = self._read, 0
        numbers = itertools.count(read) if count is None else iter(self._sampler.next_order(count)[read:])
        if dataset.workers > 1 or (dataset.workers and dataset.use_multiprocessing):
            yield from _made_by_workers(dataset, numbers)
        else:
            for number in numbers:  # `map` would take a `StopIteration` of the user's code for the end of the data
                yield dataset[number]
        dataset.on_epoch_end()


def _made_by_workers(dataset: keras.utils.PyDataset, numbers: Iterator[int]) -> Iterator[Any]:
    """Yield batches in order, while workers make the batches after them."""
    pool: concurrent.futures.Executor
    if dataset.use_multiprocessing:
        pool = concurrent.futures.ProcessPoolExecutor(dataset.workers, initializer=_receive, initargs=(dataset,))
        make = _make_batch
    else:
        pool, make = concurrent.futures.ThreadPoolExecutor(dataset.workers), dataset.__getitem__
    # Batches are handed out in order, though a worker may finish a later one first.
    futures: deque[concurrent.futures.Future[Any]] = deque()
    try:
        # `Executor.map` would submit all numbers at once: endless data has no last one, and batches would pile up.
        for number in itertools.islice(numbers, max(dataset.max_queue_size, dataset.workers)):
            futures.append(pool.submit(make, number))
        while futures:
            yield futures.popleft().result()
            futures.extend(pool.submit(make, number) for number in itertools.islice(numbers, 1))
    finally:
        pool.shutdown(cancel_futures=True)


_received: list[keras.utils.PyDataset] = []


def _receive(dataset: keras.utils.PyDataset) -> None:
    """Keep the data set in a worker process, so that it is sent once and not with each batch."""
    _received[:] = [dataset]


def _make_batch(number: int) -> Any:
    return _received[0][number]
