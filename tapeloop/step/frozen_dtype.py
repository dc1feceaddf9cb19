"""The frozen part computes in half precision, what trains in its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._backend.patching import all_patched
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo

# Not float16: its range is so small that a gradient through frozen layers would need the loss scaled.
DTYPES = None, "bfloat16"


class FrozenDtype:
    """Has frozen layers compute in another dtype while a step is traced.

    Their policy is `mixed_bfloat16` then, under which BatchNormalization, LayerNormalization and softmax compute in
    float32 all the same.

    Source: https://keras.io/api/mixed_precision/
    """

    def __init__(self, name: str | None) -> None:
        """Check and keep the dtype.

        Args:
            name: `"bfloat16"`, or None: the dtype that each layer has.

        Raises:
            ValueError: It is neither.
        """
        if name not in DTYPES:
            raise ValueError(f"`frozen_dtype` must be None or 'bfloat16'. Received: {name!r}.")
        self.name = name

    @contextlib.contextmanager
    def applied(self, selection: Selection) -> Iterator[None]:
        """Trace inside this context, and what `selection` freezes as a whole computes in the dtype."""
        if self.name is None:
            yield
            return
        inner, outermost = _frozen_layers(selection)
        layers = [layer for layer in (*inner, *outermost) if _is_float32(layer)]
        before = [layer.dtype_policy for layer in layers]
        with _giving_float32(filter(_is_float32, outermost)):
            try:
                for layer in layers:
                    layer.dtype_policy = f"mixed_{self.name}"
                yield
            finally:
                for layer, policy in zip(layers, before):
                    layer.dtype_policy = policy


def _frozen_layers(selection: Selection) -> tuple[list[keras.Layer], list[keras.Layer]]:
    """Return the layers that lie in none but frozen submodels, and the frozen ones around them."""
    tree = selection.tree

    @functools.cache
    def is_inner(submodel: SubmodelInfo) -> bool:
        # One without weights, such as a pooling layer, is as what encloses it.
        return bool(tree.parents[submodel]) and all(s in selection.idle or is_inner(s) for s in tree.parents[submodel])

    inner = [submodel for submodel in tree.layers if is_inner(submodel)]
    outermost = [submodel for submodel in tree.layers if submodel in selection.idle and not is_inner(submodel)]
    return [submodel.object for submodel in inner], [submodel.object for submodel in outermost]


def _is_float32(layer: keras.Layer) -> bool:
    """Tell whether a layer has the plain policy; a quantized one, or one of mixed precision already, keeps its own."""
    return getattr(layer.dtype_policy, "name", None) == "float32" and layer.autocast


def _giving_float32(layers: Iterable[keras.Layer]) -> contextlib.AbstractContextManager[None]:
    """Have layers give float32 inside this context, since what takes it may be no layer."""
    return all_patched(
        (layer, name, _cast(getattr(layer, name))) for layer in layers for name in keras_internals.call_methods(layer)
    )


def _cast(call: Callable[..., Any]) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        is_half = isinstance(value, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)) and value.dtype == tf.bfloat16
        return tf.cast(value, tf.float32) if is_half else value

    @functools.wraps(call)
    def shadow(*args: Any, **kwargs: Any) -> Any:
        return tf.nest.map_structure(cast, call(*args, **kwargs))

    return shadow
