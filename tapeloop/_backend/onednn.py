"""oneDNN, with which TensorFlow computes on many processors: whether it is used, and its convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.util import _pywrap_util_port

# What may follow on a convolution in one op of oneDNN's.
ACTIVATIONS = frozenset({"Relu", "Relu6", "Elu"})
_CONVOLUTION = "_MklNativeFusedConv2D"
_KEPT = frozenset({"T", "strides", "padding", "explicit_paddings", "data_format", "dilations", "use_cudnn_on_gpu"})


def is_used() -> bool:
    """Tell whether TensorFlow computes convolutions with oneDNN, as it does by itself where the processor has AVX-512.

    A machine with a GPU is answered no: its steps run there.
    """
    return bool(_pywrap_util_port.IsMklEnabled()) and not tf.config.list_logical_devices("GPU")


def keep_filter(node: Any, fused: Sequence[str]) -> None:
    """Turn the node of a `Conv2D` into one that keeps its kernel, as it is when it runs first, in oneDNN's order.

    TensorFlow makes such a node of a convolution whose kernel is a constant of the graph, and puts the kernel of any
    other in order in each step. See `tensorflow/core/kernels/mkl/mkl_conv_ops.cc`, `is_filter_const`.

    Args:
        node: The node. After what it took it must take a bias, and then what is added, if `fused` says so.
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
