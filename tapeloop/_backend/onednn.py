"""oneDNN, with which TensorFlow computes on many processors: whether it is used, and its convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.util import _pywrap_util_port

# The activations that one op of oneDNN's computes together with a convolution.
ACTIVATIONS = frozenset({"Relu", "Relu6", "Elu"})
_CONVOLUTION = "_MklNativeFusedConv2D"
_KEPT = frozenset({"T", "strides", "padding", "explicit_paddings", "data_format", "dilations", "use_cudnn_on_gpu"})


def is_used() -> bool:
    """Tell whether TensorFlow computes convolutions with oneDNN, as it does by itself where the processor has AVX-512.

    On a machine with a GPU the answer is no, since steps run on the GPU.
    """
    return bool(_pywrap_util_port.IsMklEnabled()) and not tf.config.list_logical_devices("GPU")


def keep_filter(node: Any, fused: Sequence[str]) -> None:
    """Turn a `Conv2D` node into one that copies its kernel in its first run, in oneDNN's order, and then uses the copy.

    TensorFlow makes such a node of a convolution whose kernel is a constant of the graph, and puts the kernel of any
    other in order in each step. See `tensorflow/core/kernels/mkl/mkl_conv_ops.cc`, `is_filter_const`.

    Args:
        node: The node. Its inputs become: the images, the kernel, a bias and, if `fused` has `"Add"`, the summand.
        fused: The ops that are computed with it: `"BiasAdd"`, then `"Add"` or one of `ACTIVATIONS` or both.
    """
    dtype = node.attr["T"].type
    for name in [name for name in node.attr if name not in _KEPT]:
        del node.attr[name]
    node.op = _CONVOLUTION
    arguments = 1 + ("Add" in fused)
    node.attr["TArgs"].list.type.extend([dtype] * arguments)
    node.attr["num_args"].i = arguments
    node.attr["num_host_args"].i = 0
    node.attr["fused_ops"].list.s.extend(op.encode() for op in fused)
    node.attr["is_filter_const"].b = True
    node.attr["_kernel"].s = b"MklNameChangeOp"  # TensorFlow registers its kernels by this label
