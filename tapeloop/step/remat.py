"""Rematerialization: chosen submodels compute their activations again for the gradient, and do not keep them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._backend.patching import all_patched, noting_assignments
from tapeloop._backend.tracing import op_count, ops_since
from tapeloop.errors import PolicyError
from tapeloop.model.filters import FilterLike, to_filter
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo, raw

# Ops that draw from a state of their own: nobody can set it back.
RANDOM_OPS = (
    *("RandomUniform", "RandomStandardNormal", "RandomShuffle", "RandomGamma", "RandomPoisson", "TruncatedNormal"),
    *("ParameterizedTruncatedNormal", "Multinomial", "StatefulUniform", "StatefulStandardNormal"),
    *("StatefulTruncatedNormal", "StatefulRandomBinomial"),
)


class Remat:
    """Chooses submodels, and makes them compute twice while a step is traced.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; `tf.recompute_grad`.
    """

    def __init__(self, filter_: FilterLike | None) -> None:
        """Check and keep what is chosen.

        Args:
            filter_: Which submodels: a path glob that names them, a class, a submodel, or several of these; or None.

        Raises:
            TypeError: It is none of these, or speaks of variables.
        """
        several = filter_ if isinstance(filter_, (list, tuple)) else [] if filter_ is None else [filter_]
        self.filters = list(map(to_filter, several))

    def chosen(self, tree: Tree) -> list[SubmodelInfo]:
        """Return the layers that are chosen, but for those inside another that is.

        Raises:
            PolicyError: One of the filters names no layer.
            TypeError: One of them speaks of variables.
        """
        found: dict[SubmodelInfo, None] = {}
        for filter_ in self.filters:
            named = [submodel for submodel in tree.layers if submodel.path and filter_.identifies(submodel, tree)]
            if not named:
                raise PolicyError(
                    f"`remat` was asked for {filter_!r}, which names no layer of the model. It takes a path glob that "
                    "names layers to the end, as in 'encoder/blocks/*', a class of layers, or a layer; "
                    "`tl.paths(model)` prints what there is."
                )
            found.update(dict.fromkeys(named))
        # An inner layer would be computed a third time.
        return [one for one in found if not any(map(one.is_inside, found))]

    def applied(self, selection: Selection) -> contextlib.AbstractContextManager[None]:
        """Trace inside this context, and the chosen submodels compute twice."""
        return all_patched(
            (one.object, name, _recomputing(one, selection, getattr(one.object, name)))
            for one in self.chosen(selection.tree)
            for name in keras_internals.call_methods(one.object)
        )


class _Pure(keras.StatelessScope):
    """Holds back what is assigned to Keras variables, and knows to which."""

    def __init__(self, values: Sequence[tuple[keras.Variable, tf.Tensor]]) -> None:
        super().__init__(state_mapping=values, collect_losses=True)
        self.assigned: dict[int, keras.Variable] = {}  # by identity: Keras' variables have no hash

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Note a variable that is assigned to, and its new value."""
        self.assigned[id(update[0])] = update[0]
        super().add_update(update)


def _recomputing(submodel: SubmodelInfo, selection: Selection, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `call` of a layer so that its gradient computes it again, from all the values that it first found.

    Both runs are a function of their inputs and of the values of the variables alone: what the first would assign is
    assigned after it, what the second would assign is dropped.
    """
    layer = submodel.object
    held = [v for v in selection.tree.variables_in[submodel] if isinstance(v.variable, keras.Variable)]
    trained = [(v, v.tf_variable) for v in held if v in selection.group_of]
    fixed = [(v.variable, v.tf_variable) for v in held if v not in selection.group_of]
    # A `StatelessScope` holds Keras variables alone.
    plain = [v.tf_variable for v in selection.tree.variables_in[submodel] if not isinstance(v.variable, keras.Variable)]
    again = False

    def shadow(*args: Any, **kwargs: Any) -> Any:
        if again:
            return call(*args, **kwargs)
        flat = tf.nest.flatten((args, kwargs))
        # `tf.recompute_grad` takes tensors; masks, flags and integers reach the call by closure.
        places = _floating(flat)
        # Trained values enter as arguments, all others as they were found: the second run is the first again, though
        # weights may have moved in between (two tapes, two updates).
        weights = [tensor.read_value() for _, tensor in trained]
        found = [(variable, tensor.read_value()) for variable, tensor in fixed]
        training = keras_internals.inherited_training(layer)
        outputs: list[Any] = []

        def run(*tensors: tf.Tensor) -> list[tf.Tensor]:
            given = list(flat)
            for place, tensor in zip(places, tensors):
                keras_internals.copy_mask(flat[place], tensor)
                given[place] = tensor
            inner_args, inner_kwargs = tf.nest.pack_sequence_as((args, kwargs), given)
            values = [*zip((v.variable for v, _ in trained), tensors[len(places) :]), *found]
            if outputs:
                results = tf.nest.flatten(replay(values, *inner_args, **inner_kwargs))
            else:
                with _Pure(values) as scope, noting_assignments(plain, lambda _: _refuse_raw(submodel)):
                    start = op_count()
                    outputs.append(call(*inner_args, **inner_kwargs))
                    _refuse_chance(submodel, ops_since(start))
                _assign_held_back(submodel, scope, [v for v, _ in trained], found)
                results = tf.nest.flatten(outputs[0])
            return [results[place] for place in _floating(tf.nest.flatten(outputs[0]))]

        def replay(values: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal again
            again = True
            try:
                with keras_internals.within_call(training), _Pure(values):
                    return layer(*args, **kwargs)
            finally:
                again = False

        # TensorFlow names the function in the error of a second-order gradient, and says nothing else of the cause.
        run.__name__ = f"`{submodel.path}`, which `remat` computes twice: it has no second-order gradient"
        computed = tf.nest.flatten(tf.recompute_grad(run)(*(flat[place] for place in places), *weights))
        results = tf.nest.flatten(outputs[0])
        for place, tensor in zip(_floating(results), computed):
            keras_internals.copy_mask(results[place], tensor)
            results[place] = tensor
        return tf.nest.pack_sequence_as(outputs[0], results)

    return shadow


def _assign_held_back(
    submodel: SubmodelInfo,
    scope: _Pure,
    trained: Sequence[VariableInfo],
    found: list[tuple[keras.Variable, tf.Tensor]],
) -> None:
    """Assign what the first run would have assigned, having noted what it found; refuse what has no second run."""
    # What the second run does is dropped, so that nothing may hang on it.
    if scope.losses:
        raise _refusal(submodel, "a layer in it adds a loss when it is called, which would have no gradient")
    for variable in trained:
        if id(variable.variable) in scope.assigned:
            raise _refusal(submodel, f"it assigns to `{variable.path}`, which trains, when it is called")
    known = {id(variable) for variable, _ in found}
    for key, variable in scope.assigned.items():
        if key not in known:
            found.append((variable, raw(variable).read_value()))
        variable.assign(scope.get_current_value(variable))


def _refuse_chance(submodel: SubmodelInfo, ops: Sequence[tf.Operation]) -> None:
    """Refuse random ops, which would draw anew in the second run."""
    for op in ops:
        if op.type.startswith(RANDOM_OPS):
            raise _refusal(
                submodel,
                f"it draws by `{op.type}`, anew each time; `keras.random` with a `SeedGenerator` can be repeated",
            )


def _refuse_raw(submodel: SubmodelInfo) -> None:
    raise _refusal(submodel, "it assigns to a `tf.Variable`, and would find another value the second time")


def _refusal(submodel: SubmodelInfo, why: str) -> PolicyError:
    return PolicyError(f"`remat` cannot hold for `{submodel.path}`: {why}. Leave it out of `remat`.")


def _floating(values: Sequence[Any]) -> list[int]:
    """Return the places of the tensors through which gradients flow."""
    return [place for place, value in enumerate(values) if tf.is_tensor(value) and value.dtype.is_floating]
