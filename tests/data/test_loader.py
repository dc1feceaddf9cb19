"""Epochs of batches: where they begin and end, and what they hold."""

import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.sampler import Sampler
from tests.support.models import trainer_of
from tests.support.streams import loader_of

X, Y = np.arange(10.0).reshape(10, 1), np.arange(10)
FIVES = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def singles(count):
    """Batches of one example each."""
    return [(X[number : number + 1], Y[number : number + 1]) for number in range(count)]


def firsts(loader):
    """The first input of each example of one epoch, batch by batch."""
    return [batch[0][:, 0].numpy().tolist() for batch in loader]


def test_arrays_are_cut_in_batches_with_a_ragged_last():
    loader = loader_of((X, Y), batch_size=4)
    assert (loader.batches_per_epoch, loader.smallest_batch) == (3, 2)
    assert firsts(loader) == firsts(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_targets_and_weights_stay_with_their_examples():
    for x, y, weight in loader_of((X, Y, X[:, 0] * 2), Sampler(True), batch_size=3):
        np.testing.assert_array_equal(x[:, 0], tf.cast(y, tf.float32))
        np.testing.assert_array_equal(weight, 2 * x[:, 0])


def test_floating_arrays_come_in_keras_float_type_and_others_as_they_are():
    ((x, y),) = loader_of((X, Y))
    assert (x.dtype, y.dtype) == (tf.float32, tf.int64)


def test_nested_inputs_and_missing_weights():
    (batch,) = loader_of(({"a": X, "b": [X, X]}, Y, None), batch_size=10)
    assert batch[0]["b"][1].shape == (10, 1)
    assert batch[2] is None


def test_a_signature_takes_nothing_away():
    loader = loader_of(singles(2))
    assert next(loader.specs())[0] == tf.TensorSpec([None, 1])
    assert firsts(loader) == firsts(loader) == [[0], [1]]


def test_a_generator_lasts_one_epoch():
    loader = loader_of(iter(singles(3)), name="train")
    assert loader.batches_per_epoch is None
    loader.cursor()
    assert firsts(loader) == [[0], [1], [2]]
    with pytest.raises(tl.DataError, match=r"`train` ended after 3 batches, and more were asked for"):
        loader.cursor()


def test_an_iterator_that_cannot_last_is_refused_at_once():
    loader = loader_of(((X, Y) for _ in range(3)), name="train")
    loader.require_epochs(1)
    with pytest.raises(tl.DataError, match=r"`train` is an iterator, which lasts one epoch, and 3 epochs were asked"):
        loader.require_epochs(3)
    loader_of(iter([(X, Y)] * 3), steps=("steps_per_epoch", 1)).require_epochs(3)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"])
@pytest.mark.parametrize("name", ["batch_size", "steps_per_epoch"])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a whole number, 1 or more. Received: "):
        trainer_of().fit((X, Y), **{name: value})
    assert loader_of((X, Y), batch_size=np.int64(4), steps=("steps", np.int64(4)))


def test_datasets_know_their_length():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
    assert loader_of(data).batches_per_epoch == 2
    assert loader_of(data.filter(lambda x, y: True)).batches_per_epoch is None
    assert firsts(loader_of(data)) == FIVES
