"""TensorFlow's private names of oneDNN still mean what they are used for."""

import tensorflow as tf
from tensorflow.python.eager import context

from tapeloop._backend import onednn


def test_whether_onednn_is_used_is_what_graphs_show():
    @tf.function(autograph=False)
    def convolution(x):
        return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, x, 1, "SAME"), x[0, 0, 0]))

    running = context.context()
    running.enable_graph_collection()
    try:
        convolution(tf.ones([1, 1, 1, 1]))
        graphs = running.export_run_metadata().partition_graphs
    finally:
        running.disable_graph_collection()
    ops = {node.op for graph in graphs for node in graph.node}
    ops |= {node.op for graph in graphs for function in graph.library.function for node in function.node_def}
    assert onednn.is_used() == ("_MklNativeFusedConv2D" in ops)
