"""Going through data for its features: computing them, and finding out whether it is the same each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.data.batch import as_tensors, examples_of, open_spec_of
from tapeloop.data.class_weight import with_class_weights
from tapeloop.data.cursor import ArrayReader
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.errors import CacheError
from tapeloop.feature_cache import fingerprint
from tapeloop.feature_cache.batch_independence import flat
from tapeloop.feature_cache.frontier import Cut
from tapeloop.feature_cache.storage import CachedFeatures

ROWS_LOOKED_AT = 8  # examples of a batch that is looked at again
AT_ONCE = 64  # batches of arrays whose features one call computes


def computed(cut: Cut, batches: DataLoader) -> Iterator[tuple[Any, int, list[np.ndarray]]]:
    """Give the features of data batch by batch, with the batch and its size; where they can be gathered, of several."""
    source = batches.cursor().reader
    if not isinstance(source, ArrayReader):
        for batch in batches:
            yield batch, int(examples_of(batch)), [value.numpy() for value in cut.compute(*flat(batch))]
        return
    number, count = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.int32)
    several = cut.compute_several.get_concrete_function(source.signature(), number, count)
    for feed in batches.epoch():
        while feed.remaining:
            most = min(feed.remaining, AT_ONCE)
            rows, examples = several(feed.reader, tf.constant(feed.position, tf.int64), tf.constant(most))
            yield None, int(examples), [value.numpy() for value in rows]
            feed.advance(most)


def check_same(given: DataSpec, seen: Sequence[str], again: Sequence[str], sizes: Sequence[int]) -> None:
    """Check that data had the same examples both times, and can be shuffled anew if it was shuffled.

    Raises:
        CacheError: It had not, or cannot.
    """
    if sorted(again) != sorted(seen):
        new = len(set(again) - set(seen))
        raise CacheError(
            f"`{given.name}` gives other examples when it is gone through again: {new} of {len(again)} are new. It is "
            "random or changes, and features of it would be those of one pass alone. Leave `feature_cache` out, or let "
            "the randomness stand in the model and set `feature_cache_views`."
        )
    if again != seen and (len(again) != sum(sizes) or not are_even(sizes)):
        raise CacheError(
            f"`{given.name}` comes in another order each time, and its batches are not of one size or their examples "
            "do not stand apart, so that they cannot be shuffled anew. Let it come in one order, or leave "
            "`feature_cache` out."
        )


def check_sample(given: DataSpec, kept: CachedFeatures) -> None:
    """Check, before an epoch on features, that some examples of data still are what the features were computed of.

    Only data that gives any batch by its number can be sampled: lists and `PyDataset`s. A few examples of a hundredth
    of the batches, one at least, are looked at.

    Raises:
        CacheError: They are not.
    """
    data = given.data
    is_dataset = isinstance(data, keras.utils.PyDataset)
    if given.is_arrays or not (is_dataset or isinstance(data, Sequence)) or len(kept.examples) != sum(kept.sizes):
        return
    if is_dataset:
        data.on_epoch_begin()
    count, generator = len(kept.sizes), np.random.default_rng()
    starts, known = np.cumsum([0, *kept.sizes]), Counter(kept.examples)
    for number in generator.choice(count, max(1, count // 100), replace=False).tolist():
        size = kept.sizes[number]
        rows = np.sort(generator.choice(size, min(size, ROWS_LOOKED_AT), replace=False))
        found = _digests_of(given, data[number], rows, size)
        if found is None:
            continue
        there = [kept.examples[starts[number] + row] for row in rows]
        if found != there and not (kept.shuffled and Counter(found) <= known):
            raise CacheError(
                f"`{given.name}` has changed since its features were computed: batch {number} has other examples. "
                "Leave `feature_cache` out, or let the data stay as it is, randomness standing in the model with "
                "`feature_cache_views`."
            )
    if is_dataset:
        data.on_epoch_end()


def _digests_of(given: DataSpec, batch: Any, rows: np.ndarray, size: int) -> list[str] | None:
    """Return the digests of some examples of a batch; None where it cannot be taken apart by examples."""
    tensors = as_tensors(batch, f"`{given.name}`")
    flat_batch = [value for value in tf.nest.flatten(tensors) if value is not None]
    if not all(isinstance(value, tf.Tensor) and value.shape.rank for value in flat_batch):
        return None
    if any(value.shape[0] != size for value in flat_batch):
        return []
    some = tf.nest.map_structure(lambda value: None if value is None else tf.gather(value, rows), tensors)
    return fingerprint.of_examples(with_class_weights(some, given.class_weights))


def seen_in(batches: DataLoader) -> tuple[list[str], list[int]]:
    """Go through data once, and return the digests of its examples and the sizes of its batches."""
    examples, sizes = list[str](), list[int]()
    for batch in batches:
        examples += fingerprint.of_examples(batch)
        sizes.append(int(examples_of(batch)))
    batches.rewind()
    return examples, sizes


def open_spec(batches: DataLoader) -> Any:
    """Return the signature of batches with any number of examples: what has no open dimension mixes examples."""
    return open_spec_of(batches.cursor().spec())


def are_even(sizes: Sequence[int]) -> bool:
    """Tell whether batches have one size, but for a smaller last one."""
    return len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
