"""The state of a policy, as JSON can hold it: numbers, texts, arrays, generators, and lists and mappings of such."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np


def encoded_attributes(owner: object, constant: tuple[type, ...]) -> dict[str, Any]:
    """Return the attributes of an object that may be state.

    Args:
        owner: The object.
        constant: The kinds of attributes that are what it was made with, and no state.

    Raises:
        TypeError: An attribute is neither constant nor of a kind that can be saved.
    """
    return {
        name: _encoded(value, f"{type(owner).__name__}.{name}")
        for name, value in vars(owner).items()
        if not isinstance(value, constant) and not callable(value)
    }


def restore_attributes(owner: object, state: Mapping[str, Any]) -> None:
    """Set the attributes that `encoded_attributes` returned; a generator is set in place, as others may hold it."""
    for name, value in state.items():
        kept, restored = getattr(owner, name, None), _decoded(value)
        if isinstance(kept, random.Random):
            kept.setstate(restored.getstate())
        elif isinstance(kept, np.random.Generator):
            kept.bit_generator.state = restored.bit_generator.state
        elif isinstance(value, Mapping) and "state" in value and kept is not None:
            kept.set_state(restored)
        else:
            setattr(owner, name, restored)


def _encoded(value: Any, name: str) -> Any:
    """Return a value as JSON has it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    # These very types: of a subclass, such as a named tuple or a counter, another object would come back.
    if type(value) in (list, tuple, set, frozenset):
        # Sorted, so that equal sets are saved alike.
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return {type(value).__name__: [_encoded(item, name) for item in items]}
    if type(value) is dict:
        return {"dict": [[_encoded(key, name), _encoded(item, name)] for key, item in value.items()]}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, random.Random):
        return {"random": _encoded(value.getstate(), name)}
    if isinstance(value, np.random.Generator):
        return {"generator": _encoded(value.bit_generator.state, name)}
    if hasattr(value, "get_state") and hasattr(value, "set_state"):  # a policy within this one, say
        return {"state": _encoded(value.get_state(), name)}
    raise TypeError(
        f"`{name}` is a {type(value).__name__}, of which a checkpoint cannot know how to save it. Write `get_state` "
        "and `set_state` for the policy, which say what it has come to."
    )


def _decoded(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kind, content = next(iter(value.items()))
    if kind == "array":
        return np.asarray(content, value["dtype"])
    if kind == "dict":
        return {_decoded(key): _decoded(item) for key, item in content}
    if kind == "random":
        source = random.Random()
        source.setstate(_decoded(content))
        return source
    if kind == "generator":
        state = _decoded(content)
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
        return generator
    if kind == "state":
        return _decoded(content)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_decoded, content))
