"""Layers that mix the examples of a batch, and code that nobody can look into, are not frozen."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.feature_cache.batch_independence import RESIZED, _is_alike
from tapeloop.feature_cache.frontier import Cut
from tests.support.classifiers import N, Wrapped, classifier, cut_of, images

layers = keras.layers


def by_the_largest(x):
    return tf.while_loop(lambda n, _: n < 1, lambda n, y: (n + 1, y / (1 + tf.reduce_max(tf.abs(x)))), (0, x))[1]


def beside_a_large_column(x):
    """What mixes in small columns, and would hide in the rounding of a large one."""
    return tf.concat([tf.ones_like(x[:, :1]) * 1e6, by_the_largest(x)[:, 1:]], 1)


MIXING = {
    "loop": by_the_largest,
    "beside a large column": beside_a_large_column,
    "running sum": lambda x: tf.cumsum(x, 0),
    "by their number": lambda x: x / tf.cast(tf.shape(x)[0], tf.float32),
    "a little by their number": lambda x: x * (1 + 0.1 / tf.cast(tf.shape(x)[0], tf.float32)),
    "softmax": lambda x: tf.nn.softmax(20 * x, axis=0),
    "last": lambda x: x - x[-1:],
    "attention": lambda x: tf.matmul(tf.nn.softmax(20 * tf.matmul(x, x, transpose_b=True)), x),
    "quantized": lambda x: tf.quantization.quantize_and_dequantize_v2(x, 0.0, 0.0, range_given=False),
    "rolled": lambda x: tf.roll(x, 1, 0),
    "sorted": lambda x: tf.sort(x, 0),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_does_not_come_before_the_cut(name):
    x, y = images()
    if name == "rolled":  # examples that are alike do not show it
        x = tf.repeat(x[:1], N, 0)
    found = cut_of(classifier(behind=[Wrapped(MIXING[name], name="mixing")]), tl.TrainOnly("head"), (x, y))
    assert not isinstance(found, Cut)
    assert "mixing" in str(found[0])
    assert "the other examples of a batch have a part in" in str(found[0])


@pytest.mark.parametrize("stateful", [True, False])
def test_python_code_is_not_frozen(stateful):
    def call(x):
        return tf.ensure_shape(tf.numpy_function(lambda a: 2 * a, [x], tf.float32, stateful=stateful), x.shape)

    found = cut_of(classifier(before=[layers.Lambda(call, name="code")]), tl.TrainOnly("head"), images())
    assert not isinstance(found, Cut)
    assert "PyFunc" in str(found[0])


@pytest.mark.parametrize(
    ("expected", "found", "alike"),
    [
        ([[1e6, 1.0], [1e6, 2.0]], [[1e6, 1.0], [1e6, 2.01]], False),
        ([[1e6, 1.0], [1e6, 2.0]], [[1e6 + 1, 1.0], [1e6, 2.0]], True),
        ([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]], [[1.0, 1.0, 1.0, 1e-7], [1.0, 1.0, 1.0, 0.0]], True),
        ([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]], [[1.0, 1.0, 1.0, 1e-3], [1.0, 1.0, 1.0, 0.0]], False),
        ([[np.nan, 1.0], [np.inf, 1.0]], [[np.nan, 1.0], [np.inf, 1.0]], True),
        ([[np.nan, 1.0], [np.inf, 1.0]], [[np.nan, 1.0], [-np.inf, 1.0]], False),
        ([1.0, 2.0], [1.0, 2.1], False),
    ],
)
def test_how_much_is_alike_is_told_by_columns(expected, found, alike):
    assert _is_alike(np.array(expected, "float32"), np.array(found, "float32")) is alike


def test_in_a_batch_of_another_size_rounding_may_be_larger():
    one, other = np.array([[1.0], [2.0]], "float32"), np.array([[1.0], [2.001]], "float32")
    assert _is_alike(one, other, RESIZED)
    assert not _is_alike(one, other)
