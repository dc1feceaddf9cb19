"""Going through data for its features: computing them, and finding out whether the data is the same each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.data.array_source import ArrayReader
from tapeloop.data.batch import as_tensors, examples_of, tensors_in
from tapeloop.data.class_weight import with_class_weights
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.errors import CacheError
from tapeloop.feature_cache import digests
from tapeloop.feature_cache.frontier import Cut
from tapeloop.feature_cache.storage import CachedFeatures

AT_ONCE = 64  # batches of arrays whose features one call computes


def computed(cut: Cut, batches: DataLoader) -> Iterator[tuple[Any, int, list[np.ndarray]]]:
    """Give features of one batch of data or of several: the batch or None, its number of examples, the features."""
    # Only arrays can be gathered by number in a graph. The loop that does it must not also wait for an iterator.
    source = batches.cursor().reader
    if not isinstance(source, ArrayReader):
        for batch in batches:
            features = cut.compute(*tensors_in(batch, apart=True))
            yield batch, int(examples_of(batch)), [value.numpy() for value in features]
        return
    number, count = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.int32)
    several = cut.compute_several.get_concrete_function(source.signature(), number, count)
    for cursor in batches.epoch():
        while cursor.remaining:
            most = min(cursor.remaining, AT_ONCE)
            rows, examples = several(cursor.reader, tf.constant(cursor.position, tf.int64), tf.constant(most))
            yield None, int(examples), [value.numpy() for value in rows]
            cursor.advance(most)


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
    """Check, before an epoch on features, that a hundredth of the batches still are what these were computed of.

    Only data that gives any batch by its number can be sampled: lists and `PyDataset`s.

    Raises:
        CacheError: They are not.
    """
    data = given.data
    is_dataset = isinstance(data, keras.utils.PyDataset)
    if not (is_dataset or isinstance(data, Sequence)) or len(kept.examples) != sum(kept.sizes):
        return  # of arrays and of what does not stand apart there are no digests by example
    # Keras promises a `PyDataset` these calls around each epoch, in which it may draw its examples.
    if is_dataset:
        data.on_epoch_begin()
    count, starts, weights = len(kept.sizes), np.cumsum([0, *kept.sizes]), given.class_weights
    for number in np.random.default_rng().choice(count, max(1, count // 100), replace=False).tolist():
        batch = as_tensors(data[number], f"`{given.name}`")
        found = digests.of_examples(with_class_weights(batch, weights))
        there = list(kept.examples[starts[number] : starts[number + 1]])
        # Data that shuffles itself may give any of its examples, but each only as often as it has it.
        if found != there and not (kept.shuffled and Counter(found) <= Counter(kept.examples)):
            raise CacheError(
                f"`{given.name}` has changed since its features were computed: batch {number} has other examples. "
                "Leave `feature_cache` out, or let the data stay as it is, randomness standing in the model with "
                "`feature_cache_views`."
            )
    if is_dataset:
        data.on_epoch_end()


def seen_in(batches: DataLoader) -> tuple[list[str], list[int]]:
    """Go through data once, and return the digests of its examples and the sizes of its batches."""
    examples, sizes = list[str](), list[int]()
    for batch in batches:
        examples += digests.of_examples(batch)
        sizes.append(int(examples_of(batch)))
    batches.rewind()
    return examples, sizes


def are_even(sizes: Sequence[int]) -> bool:
    """Tell whether batches have one size, except for a smaller last one."""
    return len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
