"""What is frozen costs its forward pass, and in the middle its activation gradient: seen on the graph that runs."""

from collections import Counter

import keras
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

import tapeloop as tl
from tests.support.params import params

layers = keras.layers
SIZE = 4
HEAVY = ("Conv", "Depthwise", "Fused", "Einsum", "Batch")


def executed(run, folder):
    """How often each type of op stands in the optimized graphs of what runs, functions and loops included."""
    context.context().export_run_metadata()  # what another test has left is none of this run's
    tf.summary.trace_on(graph=True)
    run()
    with tf.summary.create_file_writer(str(folder)).as_default():
        tf.summary.trace_export("run", step=0)
    (file,) = tf.io.gfile.glob(f"{folder}/events*")
    counts = Counter()
    for record in tf.data.TFRecordDataset(file):
        for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
            metadata = tf.compat.v1.RunMetadata.FromString(value.tensor.string_val[0])
            for graphs in metadata.function_graphs:
                graph = graphs.post_optimization_graph
                for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
                    # A frozen convolution that keeps its kernel is one of oneDNN's already.
                    ops = [node.op.strip("_").removeprefix("MklNative") for node in nodes]
                    counts.update(op for op in ops if op.startswith(HEAVY) or "MatMul" in op)
    return counts


def dense():
    return [layers.Dense(6, activation="relu") for _ in range(3)], (5,)


def convolutions():
    return [layers.Conv2D(3, 3, padding="same") for _ in range(3)], (4, 4, 3)


def normalized():
    return [layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization(), layers.DepthwiseConv2D(2)], (4, 4, 3)


class SelfAttention(layers.Layer):
    def build(self, shape):
        self.attention = layers.MultiHeadAttention(2, 3)
        self.norm = layers.LayerNormalization()
        self.attention.build(shape, shape)
        self.norm.build(shape)

    def call(self, inputs):
        return self.norm(inputs + self.attention(inputs, inputs))


def attention():
    return [SelfAttention(), SelfAttention()], (5, 6)


def recurrent():
    return [layers.LSTM(6, return_sequences=True), layers.GRU(6, return_sequences=True)], (5, 6)


def sandwich(make):
    """A frozen middle between an adapter and a head."""
    keras.utils.set_random_seed(0)
    middle, shape = make()
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Dense(shape[-1], name="adapter"),
            keras.Sequential([keras.Input(shape), *middle], name="middle"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )


def batch_of(make):
    return tf.random.normal((SIZE, *make()[1])), tf.zeros((SIZE, 2))


def trained(make, policy, folder):
    trainer = tl.Trainer(sandwich(make), policy, loss=tf_loss, optimizer="sgd", nonfinite="ignore")
    return executed(lambda: trainer.fit(batch_of(make), batch_size=SIZE, verbose=0), folder / "trained")


def tf_loss(y, outputs):
    return (y - outputs) ** 2


def by_hand(make, names, folder):
    """The same without tapeloop: what trains is named, all else runs in inference mode."""
    model = sandwich(make)
    x, y = batch_of(make)
    sources = [v.value for layer in model.layers if layer.name in names for v in layer.trainable_variables]

    @tf.function
    def step():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            loss = tf.reduce_mean(tf_loss(y, model(x, training=False)))
        return [loss, *tape.gradient(loss, sources)]

    return executed(step, folder / "by_hand")


KINDS = [dense, convolutions, normalized, attention, recurrent]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_frozen_prefix_costs_its_forward_pass(make, tmp_path):
    frozen = trained(make, tl.TrainOnly("head"), tmp_path)
    model, (x, _) = sandwich(make), batch_of(make)
    forward = executed(tf.function(lambda: model(x, training=False)), tmp_path / "forward")
    assert frozen.total() == forward.total() + 1  # the gradient of the head's kernel
    assert not [op for op in frozen if "Backprop" in op or "Grad" in op]


@pytest.mark.parametrize("make", params(KINDS, {recurrent}), ids=lambda make: make.__name__)
def test_a_frozen_middle_costs_its_activation_gradient_and_no_more(make, tmp_path):
    policy = tl.TrainOnly("adapter", "head")
    frozen = trained(make, policy, tmp_path)
    assert frozen.total() == by_hand(make, ("adapter", "head"), tmp_path).total()
    everything = trained(make, tl.TrainAll(), tmp_path / "all")
    kernels = [v for v in sandwich(make).get_layer("middle").trainable_variables if v.name.endswith("kernel")]
    assert everything.total() == frozen.total() + len(kernels)
    assert "Conv2DBackpropFilter" not in frozen
    assert not [op for op in frozen if op.startswith("FusedBatchNormGrad")]
