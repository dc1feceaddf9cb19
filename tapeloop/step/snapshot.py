"""The values of variables at one moment, so that a bad step can be rolled back."""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf


class Snapshot:
    """The values of variables at one moment. A value that is not asked for again costs nothing in a traced step."""

    def __init__(self, variables: Iterable[tf.Variable]) -> None:
        # A read that nothing asks for again is pruned from the graph; one that is costs a copy when its variable is
        # written.
        self._values = {variable.ref(): variable.read_value() for variable in variables}

    def add(self, variable: tf.Variable) -> None:
        """Take in the value of one more variable, unless it is there."""
        if variable.ref() not in self._values:
            self._values[variable.ref()] = variable.read_value()

    def roll_back(self) -> tf.Tensor:
        """Give the variables their values of then."""
        for variable, value in self._values.items():
            variable.deref().assign(value)
        return tf.constant(True)
