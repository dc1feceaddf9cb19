"""Convolutions and products on which frozen factors and terms for each channel follow, as BatchNormalization does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from tapeloop.folding.frozen_values import FrozenValues


@dataclass(frozen=True)
class _Kind:
    """A type of op that multiplies what it takes by a kernel.

    Attributes:
        kernel: Which of its inputs is the kernel.
        given: Which is what it multiplies.
        layout: The value of its attribute for the layout that has the channels last; None if it has no such attribute.
    """

    kernel: int
    given: int
    layout: bytes | None


KINDS: Mapping[str, _Kind] = {
    "Conv2D": _Kind(1, 0, b"NHWC"),
    "Conv3D": _Kind(1, 0, b"NDHWC"),
    "DepthwiseConv2dNative": _Kind(1, 0, b"NHWC"),
    "Conv2DBackpropInput": _Kind(1, 2, b"NHWC"),
    "MatMul": _Kind(1, 0, None),
}
TERMS = frozenset({"Mul", "Add", "AddV2", "Sub", "BiasAdd"})
# In half precision a folded kernel would be rounded otherwise than the product that it stands for.
_PRECISE = (tf.float32, tf.float64)


@dataclass(frozen=True)
class Term:
    """One step of a chain: a factor or a term for each channel.

    Attributes:
        op: The op.
        value: The frozen vector that it takes.
        is_second: Whether the vector is the second of what it takes.
    """

    op: tf.Operation
    value: tf.Tensor
    is_second: bool


@dataclass(frozen=True)
class Chain:
    """A convolution or product, and the factors and terms that alone follow on it.

    Attributes:
        op: The convolution or product.
        kernel: Its kernel.
        terms: What follows.
    """

    op: tf.Operation
    kernel: tf.Tensor
    terms: Sequence[Term]

    @property
    def values(self) -> list[tf.Tensor]:
        """The frozen tensors that it takes: the kernel and the vectors."""
        return [self.kernel, *(term.value for term in self.terms)]

    @functools.cached_property
    def channels(self) -> int:
        """The number of channels that it gives."""
        return int(self.op.outputs[0].shape[-1])

    def folded(self, kernel: tf.Tensor, *vectors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the kernel and the bias that give the same as the whole chain, of the values that it takes."""
        # Op by op on the host: what is neither there nor needed is not computed.
        scale: tf.Tensor | None = None
        bias: tf.Tensor | None = None
        for term, vector in zip(self.terms, map(self._by_channel, vectors)):
            if term.op.type == "Mul":
                scale = vector if scale is None else scale * vector
                bias = None if bias is None else bias * vector
            elif term.op.type != "Sub":
                bias = vector if bias is None else bias + vector
            elif term.is_second:
                bias = -vector if bias is None else bias - vector
            else:
                scale = -tf.ones_like(vector) if scale is None else -scale
                bias = vector if bias is None else vector - bias
        bias = tf.zeros([self.channels], kernel.dtype) if bias is None else bias
        return kernel if scale is None else kernel * self._beside_kernel(scale), bias

    def _by_channel(self, vector: tf.Tensor) -> tf.Tensor:
        """Return a vector with a number for each channel, of one that may have one for all, or more dimensions."""
        if vector.shape == (self.channels,):
            return vector
        return tf.broadcast_to(tf.reshape(vector, [-1]), [self.channels])

    def _beside_kernel(self, scale: tf.Tensor) -> tf.Tensor:
        """Return a factor for each channel in the shape in which it multiplies the kernel."""
        # Depthwise, a channel is an input and one of its multiples; transposed, outputs come before inputs.
        if self.op.type == "DepthwiseConv2dNative":
            return tf.reshape(scale, self.kernel.shape[2:])
        return scale[:, tf.newaxis] if self.op.type == "Conv2DBackpropInput" else scale


def find_chains(
    ops: Sequence[tf.Operation], values: FrozenValues, takers: Callable[[tf.Tensor], list[tf.Operation | None]]
) -> Iterator[Chain]:
    """Yield the chains that are worth folding: with a factor, or with several terms.

    Args:
        ops: The ops of a step.
        values: What of it is frozen.
        takers: Returns the ops that take the values of a tensor, and not its shape alone; None stands for the end.
    """
    for op in ops:
        if _is_start(op, values):
            terms = list(_terms(op, values, takers))
            if len(terms) > 1 or (terms and terms[0].op.type == "Mul"):
                yield Chain(op, op.inputs[KINDS[op.type].kernel], terms)


def _is_start(op: tf.Operation, values: FrozenValues) -> bool:
    kind = KINDS.get(op.type)
    if kind is None or op.outputs[0].dtype not in _PRECISE or op.outputs[0].shape.rank is None:
        return False
    kernel, given = op.inputs[kind.kernel], op.inputs[kind.given]
    layout = kind.layout is None or op.get_attr("data_format") == kind.layout
    # The product of a kernel that lies the other way would need its factors in the other dimension.
    lies = op.type != "MatMul" or not op.get_attr("transpose_b")
    is_known = op.outputs[0].shape[-1] is not None and kernel.shape.is_fully_defined()
    return layout and lies and is_known and kernel.name in values.of_weights and given.name not in values.names


def _terms(
    op: tf.Operation, values: FrozenValues, takers: Callable[[tf.Tensor], list[tf.Operation | None]]
) -> Iterator[Term]:
    """Yield the factors and terms that follow on an op, each the only one to take what comes before it."""
    tensor = op.outputs[0]
    while True:
        after, *others = takers(tensor) or [None]
        if after is None or others or after.type not in TERMS:
            return
        is_second = after.inputs[0].name == tensor.name
        vector = after.inputs[1 if is_second else 0]
        keeps = after.outputs[0].shape.rank == tensor.shape.rank and after.outputs[0].shape[-1] == tensor.shape[-1]
        if vector.name not in values.names or not keeps or not _is_by_channel(vector, int(tensor.shape[-1])):
            return
        if after.type == "BiasAdd" and after.get_attr("data_format") != b"NHWC":
            return
        yield Term(after, vector, is_second)
        tensor = after.outputs[0]


def _is_by_channel(vector: tf.Tensor, channels: int) -> bool:
    """Tell whether a tensor has one number for each channel, or one for all."""
    shape = vector.shape
    count = shape.num_elements() if shape.is_fully_defined() else None
    return count in (1, channels) and shape[-1:].num_elements() == count
