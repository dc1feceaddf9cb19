"""AutoGraph converts what users write, and none of tapeloop's own code.

To convert that took three seconds of the first step of a process that trains with a subclass of `Trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tensorflow as tf
from tensorflow.python.autograph.core import config

Function = TypeVar("Function", bound=Callable[..., object])


def leave_unconverted(package: str) -> None:
    """Have AutoGraph leave the functions of a package as they are, as it does those of Keras and NumPy."""
    config.CONVERSION_RULES = (config.DoNotConvert(package), *config.CONVERSION_RULES)


def converted(function: Function) -> Function:
    """Return a function of the user's as AutoGraph converts it, where the trace that is running converts at all.

    From code that is not converted it would be called as it is.

    Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/python/autograph/impl/api.py, `tf_convert`
    """
    found: Function = tf.__internal__.autograph.tf_convert(function, tf.__internal__.autograph.control_status_ctx())
    return found


leave_unconverted("tapeloop")
