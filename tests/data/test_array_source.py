"""Arrays of every kind, cut in batches in the order that the seed gives."""

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.array_source import ON_DEVICE_BYTES
from tapeloop.data.sampler import Sampler
from tests.support import models
from tests.support.models import trainer_of
from tests.support.streams import loader_of

layers = keras.layers
X = np.arange(20.0, dtype="float32").reshape(10, 2)
Y = np.arange(10)


def as_list(tensor):
    tensor = tf.sparse.to_dense(tensor) if isinstance(tensor, tf.SparseTensor) else tensor
    return tensor.to_list() if isinstance(tensor, tf.RaggedTensor) else tensor.numpy().tolist()


def rows(data, sampler=None):
    """The examples of one epoch, batch by batch, as lists."""
    return [(as_list(x), as_list(y)) for x, y in loader_of(data, sampler, batch_size=4)]


class Frame:
    """What a data frame has of an array."""

    shape = X.shape

    def __array__(self, dtype=None, copy=None):
        return X.astype(dtype or "float64")


class InAFile:
    """What a dataset of HDF5 has of an array: it reads ascending rows."""

    shape, dtype, chunks = X.shape, X.dtype, (2, 2)

    def __array__(self, dtype=None, copy=None):
        raise MemoryError("all of it")

    def __getitem__(self, chosen):
        assert list(chosen) == sorted(set(chosen))
        return X[chosen]


def memmap(folder):
    np.save(folder / "x.npy", X)
    return np.load(folder / "x.npy", mmap_mode="r")


KINDS = {
    "array": lambda folder: X,
    "tensor": lambda folder: tf.constant(X),
    "frame": lambda folder: Frame(),
    "memmap": memmap,
    "in a file": lambda folder: InAFile(),
    "scipy": lambda folder: scipy.sparse.csr_array(X),
    "sparse": lambda folder: tf.sparse.from_dense(X),
    "ragged": lambda folder: tf.RaggedTensor.from_tensor(X),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_every_kind_are_those_of_the_array(kind, tmp_path):
    data = KINDS[kind](tmp_path), Y
    assert rows(data) == rows((X, Y))
    shuffled = [row for x, y in rows(data, Sampler(True, 3)) for row in zip(x, y)]
    assert sorted(shuffled, key=lambda row: row[1]) == list(zip(X.tolist(), Y.tolist()))
    assert [label for _, label in shuffled] != Y.tolist()


@pytest.mark.parametrize("kind", ["array", "frame", "memmap", "in a file", "scipy", "sparse"])
def test_training_on_every_kind_is_training_on_the_array(kind, tmp_path):
    def weights(x):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
        trainer = trainer_of(model, optimizer="sgd")
        trainer.fit((x, Y % 3), batch_size=4, epochs=2, shuffle=False, verbose=0)
        assert (trainer.step, trainer.trace_count) == (6, 1)
        return model.get_weights()

    for mine, its in zip(weights(KINDS[kind](tmp_path)), weights(X)):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)


def test_the_order_is_one_of_the_seed_and_the_epoch():
    def orders(seed, epoch=0, count=2):
        sampler = Sampler(True, seed, epoch)
        return [sampler.next_order(9).tolist() for _ in range(count)]

    assert sorted(orders(1)[0]) == list(range(9))
    assert orders(1) == orders(1)
    assert orders(1)[0] != orders(1)[1]
    assert orders(1)[0] != orders(2)[0]
    assert orders(1, 1, 1) == orders(1)[1:]  # a second fit goes on where the first one ended
    np.random.seed(5)
    one = orders(None)
    assert one != orders(None)
    np.random.seed(5)
    assert one == orders(None)


def test_two_fits_see_the_orders_of_one():
    def seen(*epochs):
        keras.utils.set_random_seed(0)
        trainer = trainer_of(optimizer="sgd", seed=3)
        for count in epochs:
            trainer.fit(models.images(20), epochs=count, batch_size=4, verbose=0)
        return models.values(trainer.model)

    assert seen(1, 1) == seen(2)


@pytest.mark.parametrize("make", [tf.constant, tf.sparse.from_dense])
def test_each_epoch_has_another_order_and_two_loaders_those_of_one(make):
    def orders(epoch, count):
        loader = loader_of((make(X), Y), Sampler(True, 3, epoch))
        return [as_list(y) for _ in range(count) for _, y in loader]

    assert orders(0, 2) == orders(0, 1) + orders(1, 1)
    assert orders(0, 1) != orders(1, 1)


def test_arrays_that_a_device_would_not_hold_stay_with_the_host(monkeypatch):
    monkeypatch.setattr("tapeloop.data.array_source.ON_DEVICE_BYTES", X.nbytes)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    assert loader_of((X, Y)).cursor().reader.device == "CPU:0"
    assert loader_of(X).cursor().reader.device is None
    assert ON_DEVICE_BYTES == 2**30


def test_a_ragged_input_trains():
    rows = tf.ragged.constant([[1], [2, 3], [4, 5, 6], [7], [8, 9]])
    model = keras.Sequential([layers.Embedding(10, 4), layers.GlobalAveragePooling1D(), layers.Dense(3)])

    class Padding(tl.Trainer):
        def forward(self, inputs, training):
            return self.model(inputs.to_tensor(), training=training)

    trainer = Padding(model, loss=models.cross_entropy())
    trainer.fit((rows, Y[:5] % 3), batch_size=2, epochs=2, verbose=0)
    assert (trainer.step, trainer.trace_count) == (6, 1)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ((np.array([1, "a"], object), Y[:2]), r"In `x`, ndarray of the dtype `object` and the shape \(2,\) cannot"),
        (scipy.sparse.csr_array(np.zeros((0, 2))), r"`x` is empty"),
        ((InAFile(), Y[:9]), r"must have the same number of examples.*\(10, 2\) float32, \(9,\) int64"),
        ((X.tolist(), Y.tolist()), r"Lists are taken for several arrays: make one of them with `np.asarray`"),
        ((InAFile(), tf.sparse.from_dense(X)), r"has arrays in files and sparse ones"),
    ],
)
def test_arrays_that_will_not_do(data, text):
    with pytest.raises(tl.DataError, match=text):
        trainer_of().fit(data, verbose=0)


def test_arrays_of_any_length_share_two_traces():
    trainer = trainer_of()
    for examples in (8, 16, 18, 20, 12, 4):
        trainer.fit(models.images(examples), batch_size=4, verbose=0)
    assert trainer.trace_count == 2


@pytest.mark.parametrize("kind", ["frame", "tensor", "ragged"])
def test_arrays_in_files_go_with_others(kind, tmp_path):
    data = {"a": memmap(tmp_path), "b": KINDS[kind](tmp_path)}, Y
    for x, y in loader_of(data, Sampler(True, 3), batch_size=4):
        np.testing.assert_array_equal(x["a"], X[y.numpy()])
        np.testing.assert_array_equal(as_list(x["b"]), X[y.numpy()])
