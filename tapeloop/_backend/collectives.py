"""TensorFlow's collective ops, and what stands in the way of calling one traced step on several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class Group(NamedTuple):
    """Some devices whose collective ops belong together.

    Attributes:
        key: What the ops of the group, and of no other, have in common.
        size: How many devices it has: each takes part in each op.
        hint: How they talk: `"nccl"` between GPUs, else `"ring"`.
    """

    key: int
    size: int
    hint: str


def all_reduced(tensor: tf.Tensor, group: Group, instance: int, token: tf.Variable, merge: str = "Add") -> tf.Tensor:
    """Return the sum, or the largest, of what all devices of a group give.

    `ReplicaContext.all_reduce`, the public counterpart, cannot stand in a function that is called within a step: it
    leaves the replica (`merge_call`), which TensorFlow allows at the top level of `strategy.run` alone.

    Args:
        tensor: What this device gives: all give as many numbers.
        group: The devices.
        instance: What tells this op from the others of the group: the same number on all devices.
        token: A variable of this device: in a function that has the ops of several devices, stateful ops would wait
            for each other, but for those that take other resources.
        merge: `"Add"` or `"Max"`.
    """
    return tf.raw_ops.CollectiveReduceV2(
        input=tensor,
        group_size=group.size,
        group_key=group.key,
        instance_key=instance,
        ordering_token=[token.handle],
        merge_op=merge,
        final_op="Id",
        communication_hint=group.hint,
    )


def all_gathered(tensor: tf.Tensor, group: Group, instance: int) -> tf.Tensor:
    """Return what all devices of a group give, one after the other along the first dimension."""
    return tf.raw_ops.CollectiveGatherV2(
        input=tensor,
        group_size=group.size,
        group_key=group.key,
        instance_key=instance,
        ordering_token=[],
        communication_hint=group.hint,
    )


def called_with(function: Any, args: Sequence[tf.Tensor], variables: Sequence[tf.Variable | None]) -> Any:
    """Call a concrete function with other variables in the place of those that it has captured.

    Nothing public does so: a traced step could otherwise be called on the variables alone that it was traced with.

    Args:
        function: The function.
        args: Its arguments.
        variables: The variable for each of its captures; None: what was captured.
    """
    captured = zip(function.captured_inputs, variables)
    return function._call_flat(list(args), [outer if own is None else own.handle for outer, own in captured])


def put_in(variable: keras.Variable, value: tf.Variable) -> None:
    """Have a Keras variable keep its value in another `tf.Variable`; the public `value` can only be read."""
    variable._value = value


def leave_strategy(optimizer: keras.optimizers.Optimizer) -> None:
    """Have an optimizer that was made in the scope of a strategy update variables as on one device.

    It would update all replicas from one of them, and can do so at the top level of `strategy.run` alone.
    """
    optimizer._distribution_strategy = tf.distribute.get_strategy()


def is_lost(error: BaseException) -> bool:
    """Tell whether an error says that a device of a group is gone: TensorFlow aborts the ops of the others then."""
    names = "UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError"
    is_internal = isinstance(error, tf.errors.InternalError) and "ollective" in str(error)
    return is_internal or isinstance(error, tuple(getattr(tf.errors, name) for name in names))
