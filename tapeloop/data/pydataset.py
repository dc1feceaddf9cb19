"""The batches of a `keras.utils.PyDataset`, made by its workers."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras


class PyDatasetBatches:
    """The batches of a `keras.utils.PyDataset`, made by its workers where it has some."""

    def __init__(self, data: keras.utils.PyDataset, order: Callable[[int], Iterable[int]]) -> None:
        """Keep the data set.

        Args:
            data: The data set.
            order: Gives the order of so many batches in an epoch.
        """
        self._data = data
        self._order = order

    def __len__(self) -> int:
        return int(self._data.num_batches or 0)

    def __iter__(self) -> Iterator[Any]:
        data = self._data
        data.on_epoch_begin()
        numbers = itertools.count() if data.num_batches is None else iter(self._order(data.num_batches))
        if data.workers > 1 or (data.workers and data.use_multiprocessing):
            yield from _by_workers(data, numbers)
        else:
            for number in numbers:
                yield data[number]
        data.on_epoch_end()


def _by_workers(data: keras.utils.PyDataset, numbers: Iterator[int]) -> Iterator[Any]:
    """Give batches in order, while workers make those after them."""
    pool: concurrent.futures.Executor
    if data.use_multiprocessing:
        pool = concurrent.futures.ProcessPoolExecutor(data.workers, initializer=_take, initargs=(data,))
    else:
        pool = concurrent.futures.ThreadPoolExecutor(data.workers)
    make = _make if data.use_multiprocessing else data.__getitem__
    waiting: deque[concurrent.futures.Future[Any]] = deque()
    try:
        for number in itertools.islice(numbers, max(data.max_queue_size, data.workers)):
            waiting.append(pool.submit(make, number))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(make, number) for number in itertools.islice(numbers, 1))
    finally:
        pool.shutdown(cancel_futures=True)


_taken: list[keras.utils.PyDataset] = []


def _take(data: keras.utils.PyDataset) -> None:
    """In a process of its own, keep the data set, so that it is handed over once and not with each batch."""
    _taken[:] = [data]


def _make(number: int) -> Any:
    return _taken[0][number]
