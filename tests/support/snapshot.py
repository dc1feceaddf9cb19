"""All that stands in a trainer's own objects at one moment, by the paths of attributes."""

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from tapeloop.loop.phases import PhaseTracker
from tapeloop.model.tree import Tree, VariableInfo, raw


def told(phases):
    return [(name, inner) for name, inner in vars(phases).items() if name not in ("_resolved", "_tree", "_read_at")]


def walk(value, path, found, stop):
    """Note what the attributes of tapeloop's own objects are, and the values of variables, by their paths."""
    if id(value) in stop or isinstance(value, (Tree, VariableInfo)):
        return
    if isinstance(value, (keras.Variable, tf.Variable)):
        found[path] = raw(value).numpy().tobytes()
    elif isinstance(value, (bool, int, float, str, type(None), np.generic)):
        found[path] = repr(value)
    elif isinstance(value, dict):
        found[f"{path}.keys"] = [id(key) if not isinstance(key, (str, int)) else key for key in value]
        for number, inner in enumerate(value.values()):
            walk(inner, f"{path}.{number}", found, stop)
    elif isinstance(value, (list, tuple)):
        found[f"{path}.length"] = len(value)
        for number, inner in enumerate(value):
            walk(inner, f"{path}.{number}", found, stop)
    elif isinstance(value, (set, frozenset)):
        found[path] = {each if isinstance(each, (str, int)) else id(each) for each in value}
    elif type(value).__module__.startswith("tapeloop.") or isinstance(value, tl.Trainer):
        stop.add(id(value))
        # What a policy selects is kept from one look to the next.
        for name, inner in vars(value).items() if not isinstance(value, PhaseTracker) else told(value):
            walk(inner, f"{path}.{name}".lstrip("."), found, stop)
    elif isinstance(value, keras.optimizers.Optimizer):
        walk(list(value.variables), path, found, stop)
    else:
        found[path] = id(value)


def snapshot(trainer):
    found, stop = {}, {id(trainer.model)}
    walk(trainer.state, "state", found, stop)
    walk(trainer, "", found, stop)
    return found
