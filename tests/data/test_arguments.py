"""Inputs, targets and weights as Keras' `fit` takes them, joined to one, and a part split off."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.arguments import joined, split_off
from tapeloop.data.loader import DataSpec

X, Y, W = np.arange(20.0).reshape(10, 2), np.arange(10), np.ones(10)


def test_targets_and_weights_are_joined_to_the_inputs():
    assert joined(X) is X
    assert joined(X, Y) == (X, Y)
    assert joined(X, Y, W) == (X, Y, W)
    assert joined(X, None, W) == (X, None, W)
    assert joined([X, X], Y) == ([X, X], Y)  # several inputs
    batches = [(X, Y), (X, Y)]
    assert joined(batches) is batches


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((tf.data.Dataset.range(3), Y), "`y` was given, and `x` is no array but a"),
        ((iter([X]), Y), "`y` was given, and `x` is no array but a list_iterator, whose batches hold the targets"),
        ((iter([X]), None, W), "`sample_weight` was given, and"),
        ((X, Y, 32), r"`sample_weight` is 32, and must be an array.* write `batch_size=32`: it is passed by name"),
        (([X, X],), r"`x` is a list of 2 arrays and there is no `y`.*`\(\[first, second\],\)`.*`\[\(first,\), "),
    ],
)
def test_what_is_unclear_is_refused(given, text):
    with pytest.raises(tl.DataError, match=text):
        joined(*given)


@pytest.mark.parametrize(
    "array",
    [
        lambda: X,
        lambda: tf.constant(X),
        lambda: tf.RaggedTensor.from_row_lengths(np.arange(10.0), np.ones(10, int)),
        lambda: tf.sparse.from_dense(X),
    ],
    ids=["numpy", "tensor", "ragged", "sparse"],
)
def test_the_last_examples_are_split_off(array):
    (x, y), (held_out, targets) = split_off((array(), Y), 0.3)

    def dense(rows):
        rows = tf.sparse.to_dense(rows) if isinstance(rows, tf.SparseTensor) else rows
        return np.asarray(rows.to_tensor() if isinstance(rows, tf.RaggedTensor) else rows)

    assert (len(y), list(targets)) == (7, [7, 8, 9])
    np.testing.assert_array_equal(dense(x), dense(array())[:7])
    np.testing.assert_array_equal(dense(held_out), dense(array())[7:])


def test_arrays_in_a_file_are_split_without_being_read(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = X
    with h5py.File(tmp_path / "data.h5") as file:
        (x, y), (held_out, _) = split_off((file["x"], Y), 0.25)
        assert (x.shape, held_out.shape, y.shape) == ((7, 2), (3, 2), (7,))
        batches = list(DataSpec("x", held_out, 2).loader())
        np.testing.assert_array_equal(np.concatenate(batches), X[7:])
        np.testing.assert_array_equal(np.asarray(x), X[:7])


def test_nested_inputs_and_missing_members_are_split():
    (inputs, none, weights), held_out = split_off(({"a": X, "b": Y}, None, W), 0.1)
    assert (len(inputs["a"]), len(inputs["b"]), none, len(weights), len(held_out[0]["a"])) == (9, 9, None, 9, 1)


@pytest.mark.parametrize(
    ("data", "fraction", "error", "text"),
    [
        ((X, Y), 1.5, ValueError, "`validation_split` must be a number above 0 and below 1. Received: 1.5"),
        ((X, Y), True, ValueError, "Received: True"),
        ([(X, Y)], 0.5, tl.DataError, "takes the last examples of arrays, and `x` is a list of batches"),
        (tf.data.Dataset.range(3), 0.5, tl.DataError, "Pass `validation_data` instead"),
        ((X, Y), 0.999, tl.DataError, "of 10 examples leaves none to train on"),
        ((X[:0], Y[:0]), 0.5, tl.DataError, "of 0 examples leaves none"),
    ],
)
def test_a_split_that_cannot_be_is_refused(data, fraction, error, text):
    with pytest.raises(error, match=text):
        split_off(data, fraction)


def test_the_split_is_that_of_keras():
    split = keras.src.trainers.data_adapters.array_slicing.train_validation_split
    for fraction in (0.1, 0.25, 0.33, 0.5):
        (x, *_), (held_out, *_) = split((X, Y, None), fraction)
        (mine, _), (mine_out, _) = split_off((X, Y), fraction)
        np.testing.assert_array_equal(mine, x)
        np.testing.assert_array_equal(mine_out, held_out)
