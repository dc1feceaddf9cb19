"""What of a graph is folded, and that the rest of it computes the same with the folded values."""

import numpy as np
import pytest
import tensorflow as tf

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.folding.frozen_values import FrozenValues
from tapeloop.folding.graph_folding import GraphFolding

RNG = np.random.default_rng(0)


def variable(*shape, dtype=tf.float32):
    return tf.Variable(tf.cast(RNG.uniform(0.5, 1.5, shape), dtype), trainable=False)


def folding_of(compute, x, *moving, keeps_filters=False):
    """The folding of a function of one tensor; what it captures is frozen, but for some variables."""
    function = tf.function(compute, autograph=False).get_concrete_function(tf.TensorSpec(x.shape, x.dtype))
    whole = TracedGraph(function, [])
    moves = {v.ref() for v in moving}
    still = {n for n, v in whole.variables.items() if v.ref() not in moves}
    return GraphFolding(whole, FrozenValues(whole, still), keeps_filters=keeps_filters)


def outputs(folding, x):
    """What the rest gives with the folded values, as a compiled function computes it."""
    rest = folding.rest()
    return tf.function(lambda *values: rest(values), autograph=False)(x, *folding.values())


X = tf.constant(RNG.normal(size=(2, 5, 5, 3)), tf.float32)
KERNEL, S, B = variable(3, 3, 3, 4), variable(4), variable(4)
DEPTHWISE, S6, TRANSPOSED, KERNEL3D, MATRIX = (
    variable(2, 2, 3, 2),
    variable(6),
    variable(3, 3, 4, 3),
    variable(1, 3, 3, 3, 4),
    variable(3, 4),
)


def conv(x):
    return tf.nn.conv2d(x, KERNEL, 1, "SAME")


def normalized(x):
    return tf.nn.batch_normalization(x, B, S, S, B, 1e-3)


@pytest.mark.parametrize(
    ("compute", "terms"),
    [
        (lambda x: conv(x) * S + B, [2]),
        (lambda x: S * conv(x) - B, [2]),
        (lambda x: B - conv(x) * tf.math.rsqrt(S), [2]),
        (lambda x: B - (conv(x) + S), [2]),
        (lambda x: tf.nn.bias_add(conv(x), B) * 3.0, [2]),
        (lambda x: normalized(conv(x)), [2]),
        (lambda x: (conv(x) + B) + tf.reshape(S, [1, 1, 1, 4]), [2]),
        (lambda x: tf.nn.relu((conv(x) - B) * S) * B, [2]),
        (lambda x: normalized(tf.nn.conv2d(tf.nn.relu(normalized(conv(x)))[..., :3], KERNEL, 2, "VALID")), [2, 2]),
        (lambda x: tf.nn.depthwise_conv2d(x, DEPTHWISE, [1, 1, 1, 1], "SAME") * S6, [1]),
        (lambda x: normalized(tf.nn.conv2d_transpose(x, TRANSPOSED, (2, 5, 5, 4), 1)), [2]),
        (lambda x: tf.nn.conv3d(x[:, None], KERNEL3D, [1] * 5, "SAME") * S - B, [2]),
        (lambda x: tf.matmul(tf.reshape(x, [50, 3]), MATRIX) * S + B, [2]),
        (lambda x: conv(x) * (S + B), [1]),
        (lambda x: tf.nn.conv2d(x, KERNEL * 0.5 + 1.0, 1, "SAME") * S, [1]),
    ],
)
def test_a_chain_goes_into_its_kernel_and_a_bias(compute, terms):
    folding = folding_of(compute, X)
    assert [len(chain.terms) for chain in folding.chains] == terms
    np.testing.assert_allclose(outputs(folding, X)[0], compute(X), rtol=1e-5, atol=1e-5)


def test_a_shape_that_is_looked_at_between_does_not_stand_in_the_way():
    def compute(x):
        y = conv(x) * S
        z = y + B
        return z * tf.cast(tf.reduce_prod(tf.raw_ops.Shape(input=y)), tf.float32)

    folding = folding_of(compute, X)
    assert [len(chain.terms) for chain in folding.chains] == [2]
    np.testing.assert_allclose(outputs(folding, X)[0], compute(X), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "compute",
    [
        conv,
        lambda x: conv(x) + B,  # a bias already
        lambda x: conv(x) * variable_by_place,
        lambda x: conv(x) * tf.reduce_mean(x),
        lambda x: tf.nn.relu(conv(x)) * S,
        lambda x: tf.nn.conv2d(x, tf.reduce_mean(x) * KERNEL, 1, "SAME") * S,
        lambda x: tf.matmul(tf.reshape(x, [50, 3]), MATRIX_T, transpose_b=True) * S,
        lambda x: tf.cast(tf.nn.conv2d(tf.cast(x, tf.float16), HALF, 1, "SAME") * HALF_S, tf.float32),
    ],
)
def test_what_is_no_chain_stays_as_it_is(compute):
    folding = folding_of(compute, X)
    assert not folding.chains
    np.testing.assert_allclose(outputs(folding, X)[0], compute(X), rtol=1e-5, atol=1e-3)


variable_by_place, MATRIX_T = variable(5, 5, 4), variable(4, 3)
HALF, HALF_S = variable(3, 3, 3, 4, dtype=tf.float16), variable(4, dtype=tf.float16)


def test_what_is_taken_elsewhere_is_not_folded_away():
    def compute(x):
        y = conv(x)
        return y * S + B, tf.reduce_sum(y)

    folding = folding_of(compute, X)
    assert not folding.chains
    for found, expected in zip(outputs(folding, X), compute(X)):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("moving", [KERNEL, S])
def test_what_moves_is_not_folded(moving):
    folding = folding_of(lambda x: conv(x) * S + B, X, moving)
    assert [len(chain.terms) for chain in folding.chains] == []
    np.testing.assert_allclose(outputs(folding, X)[0], conv(X) * S + B, rtol=1e-5)


def test_what_is_written_to_is_not_told_by_the_graph_alone():
    # The caller says what is still; see `fold`.
    folding = folding_of(lambda x: conv(x) * S, X, S)
    assert not folding.chains
    assert not folding.others


def test_other_values_of_weights_alone_are_computed_once():
    def compute(x):
        return tf.nn.relu(x) * tf.math.rsqrt(variable3 + 1.0) + tf.cast(half, tf.float32)

    folding = folding_of(compute, X)
    assert [tensor.op.type for tensor in folding.others] == ["Rsqrt"]  # the cast would take twice the memory
    np.testing.assert_allclose(outputs(folding, X)[0], compute(X), rtol=1e-5, atol=1e-3)


variable3, half = variable(3), variable(3, dtype=tf.float16)


def test_a_value_that_is_larger_than_its_weights_is_computed_each_time():
    folding = folding_of(lambda x: x + tf.tile(variable3[None, None, None] * 2.0, [2, 5, 5, 1]), X)
    assert [tuple(tensor.shape) for tensor in folding.others] == []


def test_gradients_through_what_is_frozen_stay_right():
    def compute(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.nn.relu(normalized(conv(tf.nn.relu(normalized(conv(x)))[..., :3]))) ** 2)
        return loss, tape.gradient(loss, x)

    folding = folding_of(compute, X)
    assert folding.chains  # forward, and for what is multiplied by a kernel in the gradient
    for found, expected in zip(outputs(folding, X), compute(X)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_parts_of_one_op_and_variables_of_any_shape_are_told_apart():
    pair = variable(6)
    loose = tf.Variable(tf.ones([3]), shape=tf.TensorShape(None), trainable=False)

    def compute(x):
        first, second = tf.split(pair, 2)
        return x * first + second * tf.ensure_shape(loose, [3])

    folding = folding_of(compute, X)
    assert len(set(folding.keys())) == len(folding.keys()) == 2
    np.testing.assert_allclose(outputs(folding, X)[0], compute(X), rtol=1e-5)


def test_equal_computations_of_the_same_weights_have_equal_keys():
    one, other = (folding_of(lambda x: normalized(conv(x)), X) for _ in range(2))
    assert one.keys() == other.keys()
    assert one.keys() != folding_of(lambda x: conv(x) * S - B, X).keys()
    assert one.sources() == other.sources()
    assert len(one.sources()) == 2


RELU, KERNEL4 = tf.nn.relu, variable(1, 1, 4, 4)


def conv4(x):
    return tf.nn.bias_add(tf.nn.conv2d(x, KERNEL4, 1, "SAME"), B)


def summed(x):
    """Two convolutions that are added up, and taken by nothing that is computed with them."""
    return tf.nn.bias_add(conv(x), B) + normalized(conv(x))


def waiting(x):
    """A sum of which one part waits for the other."""
    one = tf.nn.bias_add(conv(x), B)
    with tf.control_dependencies([one]):
        other = tf.concat([x, x], -1)[..., :4] * 2.0
    return RELU(one + other)


def residual(x):
    """Two convolutions that are added up: only one of them can take in the sum."""
    y = RELU(normalized(conv(x)))
    return RELU(
        normalized(tf.nn.conv2d(y, KERNEL4, 1, "SAME")) + tf.nn.bias_add(tf.nn.conv2d(y, KERNEL4, 1, "SAME"), B)
    )


@pytest.mark.parametrize(
    ("compute", "fused"),
    [
        (lambda x: normalized(conv(x)), ["BiasAdd"]),
        (lambda x: tf.nn.relu6(normalized(conv(x))), ["BiasAdd,Relu6"]),
        (lambda x: tf.nn.elu(tf.nn.bias_add(conv(x), B)), ["BiasAdd,Elu"]),
        (residual, ["BiasAdd", "BiasAdd,Add,Relu", "BiasAdd,Relu"]),
        (summed, ["BiasAdd", "BiasAdd,Add"]),
        (lambda x: conv4(summed(x)), ["BiasAdd", "BiasAdd", "BiasAdd,Add"]),
        (lambda x: summed(x) + conv4(summed(x)), [*["BiasAdd"] * 2, *["BiasAdd,Add"] * 3]),
        (waiting, ["BiasAdd"]),
        (lambda x: tf.nn.bias_add(conv(x), B) + S, ["BiasAdd"]),
        (lambda x: RELU(normalized(conv(x))) + tf.reduce_mean(x), ["BiasAdd,Relu"]),
        (lambda x: tf.reduce_mean(normalized(conv(x)), [1, 2, 3]) + tf.reduce_mean(x), ["BiasAdd"]),
        (lambda x: (y := tf.nn.bias_add(conv(x), B)) + y, ["BiasAdd"]),
        (lambda x: [y := normalized(conv(x)), RELU(y)], ["BiasAdd"]),
        (lambda x: RELU(normalized(conv(x))) * tf.cast(tf.shape(conv(x) * S)[1], tf.float32), ["BiasAdd,Relu"]),
        (lambda x: tf.nn.bias_add(tf.nn.conv2d(x, KERNEL, 2, [[0, 0], [1, 2], [0, 1], [0, 0]]), B), ["BiasAdd"]),
        (lambda x: tf.nn.bias_add(tf.nn.conv2d(x, KERNEL, 1, "VALID", dilations=2), B), ["BiasAdd"]),
        (lambda x: conv(x), []),
    ],
)
def test_a_convolution_keeps_its_kernel(compute, fused):
    folding = folding_of(compute, X, keeps_filters=True)
    rest = folding.rest()
    nodes = [node for node in rest.definition.node if node.op == "_MklNativeFusedConv2D"]
    assert sorted(b",".join(node.attr["fused_ops"].list.s).decode() for node in nodes) == fused
    run = tf.function(lambda *values: rest(values), autograph=False)
    for _ in range(2):
        for one, other in zip(run(X, *folding.values()), tf.nest.flatten(compute(X))):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "fused"),
    [
        (lambda x: tf.nn.relu6(x) * 2.0, "BiasAdd,Add"),
        (lambda x: tf.nn.max_pool2d(x, 3, 1, "SAME"), "BiasAdd,Add"),
        (lambda x: x[:1], "BiasAdd"),
        (lambda x: tf.boolean_mask(x, [True, False]), "BiasAdd"),
        (lambda x: x[:, :1], "BiasAdd"),
        (lambda x: tf.reduce_max(x), "BiasAdd"),
    ],
)
def test_a_sum_is_taken_in_if_it_broadcasts_nothing(other, fused):
    x = tf.TensorSpec([None, 5, 5, 4], tf.float32)
    kernel = variable(3, 3, 4, 4)
    compute = lambda x: tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), B) + other(x)  # noqa: E731
    rest = folding_of(compute, x, keeps_filters=True).rest()
    (node,) = (node for node in rest.definition.node if node.op == "_MklNativeFusedConv2D")
    assert b",".join(node.attr["fused_ops"].list.s).decode() == fused
    given = tf.constant(RNG.normal(size=(2, 5, 5, 4)), tf.float32)
    (one,) = tf.function(lambda x: rest([x]), autograph=False)(given)
    np.testing.assert_allclose(one, compute(given), rtol=1e-5, atol=1e-5)


def test_a_convolution_in_groups_keeps_none_nor_does_one_by_what_moves():
    grouped = lambda x: tf.nn.bias_add(tf.nn.conv2d(tf.repeat(x, 2, -1), KERNEL, 1, "SAME"), B)  # noqa: E731
    assert not folding_of(grouped, X, keeps_filters=True).kept
    assert not folding_of(lambda x: tf.nn.bias_add(conv(x), B), X, KERNEL, keeps_filters=True).kept
