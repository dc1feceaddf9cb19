"""Taking over what was made in the scope of a strategy, and keeping a copy of it on each device."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable

import keras
import tensorflow as tf

from tapeloop._backend.collectives import leave_strategy, put_in
from tapeloop._backend.keras_internals import own_metrics
from tapeloop.distribution.replicas import Replicas, kind_of
from tapeloop.errors import listed
from tapeloop.model.tree import Tree, raw

# The variables in which Keras variables keep their values that were taken over, by identity.
_TAKEN: weakref.WeakValueDictionary[int, tf.Variable] = weakref.WeakValueDictionary()


def adopt(tree: Tree, beside: Iterable[object], replicas: Replicas) -> None:
    """Have a model, its optimizers and its metrics keep their values in variables of one device.

    TensorFlow makes a variable in the scope of a strategy as one that knows the copies of all devices, the same on
    each worker. The trainer keeps the copies itself: so the model can be used anywhere, and what is known of a step
    holds for one device.

    Args:
        tree: The model.
        beside: What the user made beside it; of that the optimizers and the metrics.
        replicas: Who trains.

    Raises:
        RuntimeError: The scope of a strategy is open.
        ValueError: The model was made outside of the strategy's scope, or has not made its variables; or it was made in
            one, and there is none.
    """
    replicas.check_outside()
    strategy = replicas.strategy
    if strategy is None:
        _check_made_without_strategy(tree)
        return
    unbuilt = [submodel.path or "the model itself" for submodel in tree.layers if not submodel.object.built]
    if unbuilt and not isinstance(strategy, tf.distribute.OneDeviceStrategy):
        raise ValueError(
            f"Under a strategy the model must have made its variables, so that all workers begin with the same. "
            f"{listed(unbuilt)} of it has none yet: call it once on an input within `strategy.scope()`, or use "
            "`keras.Input`."
        )
    _check_scope(tree, strategy)
    for info in tree.variables:
        _take_over(info.variable)
    beside = [*beside, *(metric for layer in tree.layers for metric in own_metrics(layer.object))]
    for each in beside:
        if isinstance(each, (keras.optimizers.Optimizer, keras.metrics.Metric)):
            for variable in each.variables:
                _take_over(variable)
        if isinstance(each, keras.optimizers.Optimizer):
            leave_strategy(each)


def _check_made_without_strategy(tree: Tree) -> None:
    for variable in tree.variables:
        if isinstance(variable.tf_variable, tf.distribute.DistributedValues):
            kind = kind_of(variable.tf_variable.distribute_strategy)
            raise ValueError(
                f"`{variable.path}` of the model was made in the scope of a {kind}, and the trainer was given none. "
                "Pass `strategy=strategy`, or make the model outside of the scope to train on one device."
            )


def _check_scope(tree: Tree, strategy: tf.distribute.Strategy) -> None:
    if isinstance(strategy, tf.distribute.OneDeviceStrategy):
        return
    kind = kind_of(strategy)
    outside, other, bare = [], [], []
    for variable in tree.variables:
        value = variable.tf_variable
        if _TAKEN.get(id(value)) is value:  # by another trainer
            continue
        if not isinstance(value, tf.distribute.DistributedValues):
            outside.append(variable.path)
        elif value.distribute_strategy is not strategy:
            other.append(variable.path)
        elif not isinstance(variable.variable, keras.Variable):
            bare.append(variable.path)
    if outside or other:
        where = "outside of the scope of the strategy" if outside else "in the scope of another strategy"
        raise ValueError(
            f"The trainer was given a {kind}, and {listed(outside or other)} of the model were made {where}. Make the "
            "model within it: `with strategy.scope(): model = ...`."
        )
    if bare:
        raise ValueError(
            f"Under a {kind} a trainer can take over Keras variables alone, and {listed(bare)} are TensorFlow's own. "
            "Make them by `self.add_weight` of a Keras layer."
        )


def _take_over(variable: keras.Variable) -> None:
    """Have a Keras variable keep its value in a variable of one device."""
    value = raw(variable)
    if isinstance(value, tf.distribute.DistributedValues):
        first = value.values[0]
        with tf.device(first.device):
            mine = tf.Variable(first.read_value(), trainable=value.trainable, name=variable.name)
        put_in(variable, mine)
        _TAKEN[id(mine)] = mine


class Copies:
    """The copies of variables on the other devices of this process, made when they are first asked for.

    Attributes:
        replicas: Who trains.
    """

    def __init__(self, replicas: Replicas, shared: tf.Variable) -> None:
        """Take in who trains, and the one variable of which there are no copies: it says how far the run has come."""
        self.replicas = replicas
        self._shared = shared
        # References: TensorFlow's variables have no hash.
        self._copies: dict[object, list[tf.Variable]] = {}
        self._renewed_at: Hashable = None

    def of(self, variable: tf.Variable, replica: int) -> tf.Variable:
        """Return the variable itself for the first device, and its copy for another."""
        if not replica or variable is self._shared:
            return variable
        if variable.ref() not in self._copies:
            made = []
            for device in self.replicas.devices[1:]:
                with tf.init_scope(), tf.device(device):
                    made.append(tf.Variable(variable.read_value(), trainable=False, name="copy"))
            self._copies[variable.ref()] = made
        return self._copies[variable.ref()][replica - 1]

    def all_of(self, variable: tf.Variable) -> list[tf.Variable]:
        """Return the variable, and its copies on the other devices."""
        return [self.of(variable, replica) for replica in range(len(self.replicas.devices))]

    def renew(self, moment: Hashable) -> None:
        """Give all copies the values that their variables have, unless this was done at the same moment."""
        if not self._copies or moment == self._renewed_at:
            return
        self._renewed_at = moment
        for reference, copies in self._copies.items():
            value = reference.deref().read_value()  # type: ignore[attr-defined]
            for copy in copies:
                copy.assign(value, read_value=False)
