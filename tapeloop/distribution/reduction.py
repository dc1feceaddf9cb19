"""What goes over the wire in a step: the gradients of what trains, weighted by examples, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import tensorflow as tf

from tapeloop._backend.collectives import all_reduced
from tapeloop.distribution.replicas import Replicas
from tapeloop.model.tree import VariableInfo

Gradients: TypeAlias = Sequence[tuple[tf.Tensor, VariableInfo]]
MOST_BYTES = 2**25  # of one message: smaller ones are put together, a larger gradient goes by itself


class Reduction:
    """Averages the gradients of all devices by the examples that each has computed them of.

    A loss is a mean over examples, so that the mean of the devices' gradients, weighted by their numbers of examples,
    is the gradient of the whole batch, however uneven the shares are.

    Source: Goyal et al., Accurate, Large Minibatch SGD, section 3, https://arxiv.org/abs/1706.02677

    Attributes:
        update_bytes: How many bytes each device gives in the update that was traced last.
        step_bytes: The same of all updates of the training step that was built last.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self.update_bytes = self.step_bytes = 0

    def averaged(
        self, gradients: Gradients, loss: tf.Tensor | None, examples: tf.Tensor
    ) -> tuple[list[tuple[tf.Tensor, VariableInfo]], tf.Tensor | None]:
        """Return the gradients and the loss of the whole batch, which are the same on all devices.

        Args:
            gradients: The gradients of this device's share.
            loss: Its loss, if there is one.
            examples: How many examples it has.
        """
        self.update_bytes = 0
        weight = tf.cast(examples, tf.float32)
        overwrites = [gradient for gradient, variable in gradients if variable.is_overwritten]
        # A sparse gradient has other rows on each device; half precision would overflow where many are added.
        dense = [tf.convert_to_tensor(gradient) for gradient, variable in gradients if not variable.is_overwritten]
        wire = [tf.cast(gradient, _wire(gradient.dtype)) for gradient in dense]
        told = tf.stack([weight, weight * tf.cast(0.0 if loss is None else loss, tf.float32)])
        sums = self._summed([told, *(gradient * tf.cast(weight, gradient.dtype) for gradient in wire)], "Add")
        total, told_loss = sums[0][0], sums[0][1] / sums[0][0]
        means = [tf.cast(sum_ / tf.cast(total, sum_.dtype), own.dtype) for sum_, own in zip(sums[1:], dense)]
        largest = self._summed(overwrites, "Max") if overwrites else []
        values = {False: iter(means), True: iter(largest)}
        pairs = [(next(values[variable.is_overwritten]), variable) for _, variable in gradients]
        return pairs, None if loss is None else tf.cast(told_loss, loss.dtype)

    def _summed(self, tensors: Sequence[tf.Tensor], merge: str) -> list[tf.Tensor]:
        """Return the sums of what all devices give, in as few messages as their sizes allow."""
        results: dict[int, tf.Tensor] = {}
        before: list[tf.Tensor] = []
        for numbers in _packs(tensors):
            pack = [tf.reshape(tensors[number], [-1]) for number in numbers]
            flat = pack[0] if len(pack) == 1 else tf.concat(pack, 0)
            self.update_bytes += flat.shape[0] * flat.dtype.size
            # One after the other, or two devices might begin with different ones, and wait for each other.
            with tf.control_dependencies(before):
                flat = all_reduced(flat, *self._replicas.group(), self._replicas.token, merge)
            before = [flat]
            parts = tf.split(flat, [math.prod(tensors[number].shape) for number in numbers])
            results |= {number: tf.reshape(part, tensors[number].shape) for number, part in zip(numbers, parts)}
        return [results[number] for number in range(len(tensors))]


def _wire(dtype: tf.DType) -> tf.DType:
    """Return the dtype in which gradients of a dtype are added up."""
    return tf.float32 if dtype.size < 4 else dtype


def _packs(tensors: Sequence[tf.Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of tensors that go in one message: of one dtype, `MOST_BYTES` or a single one."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        pack, size = list[int](), 0
        for number, tensor in enumerate(tensors):
            if tensor.dtype != dtype:
                continue
            added = math.prod(tensor.shape) * dtype.size
            if pack and size + added > MOST_BYTES:
                yield pack
                pack, size = [], 0
            pack.append(number)
            size += added
        yield pack
