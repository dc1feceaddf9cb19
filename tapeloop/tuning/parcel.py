"""A trainer and batches of its data as bytes, from which another process makes them again."""

from __future__ import annotations

import contextlib
import inspect
import io
import pathlib
import pickle
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.data.batch import map_tensors
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, SubmodelInfo, Tree, VariableInfo
from tapeloop.policies.base import VariablePolicy
from tapeloop.policies.static import TrainAll
from tapeloop.tuning.environment import Environment
from tapeloop.tuning.importable import Importable, Unsendable, config_in, custom_objects

# Their own pickling, where they have one, writes a file of a model.
KERAS_OBJECTS = keras.optimizers.Optimizer, keras.metrics.Metric, keras.losses.Loss, keras.random.SeedGenerator


@dataclass(frozen=True)
class Made:
    """How a trainer was made. It is no tuple, whose models would count as those that the trainer holds.

    Attributes:
        args: The arguments of its class by position.
        kwargs: Those by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Held(VariablePolicy):
    """Selects what another policy selects at a moment, by paths: the other may hold functions, or draw at random."""

    def __init__(self, selection: Selection) -> None:
        """Keep the paths of a selection."""
        self._groups = {variable.path: group for variable, group in selection.group_of.items()}
        self._inference = {submodel.path for submodel in selection.inference}
        self._multipliers = dict(selection.multipliers)

    def group(self, variable: VariableInfo) -> str | None:
        """Return the group in which a variable trains."""
        return self._groups.get(variable.path)

    def inference(self, submodel: SubmodelInfo, trained: bool) -> bool:
        """Tell whether a submodel runs in inference mode."""
        return submodel.path in self._inference

    def multiplier(self, variable: VariableInfo) -> float:
        """Return by how much the learning rate is multiplied."""
        return self._multipliers.get(self._groups[variable.path], 1.0)


@dataclass(frozen=True)
class Opened:
    """What a parcel holds, made again.

    Attributes:
        kind: The class of the trainer.
        made: How it is made.
        policy: What trains.
        run: The step and the epoch to which its run had come.
        batches: Batches of its data, as NumPy arrays.
        variables: The paths, shapes and flags of its model's variables.
    """

    kind: type
    made: Made
    policy: VariablePolicy
    run: tuple[int, int]
    batches: list[Any]
    variables: list[Any]


def packed(trainer: Any, made: Made, policy: VariablePolicy | Selection, batches: Sequence[Any]) -> bytes:
    """Return a trainer and batches as bytes. The trainer, its model and its data stay as they are.

    Args:
        trainer: The trainer.
        made: How it was made.
        policy: What trains: a selection or, of a model that is not built, the policy.
        batches: The batches.

    Raises:
        Unsendable: Something is not found by its name in another process, or cannot be made again.
    """
    importable = Importable()
    roots, places = _packed_roots(trainer.model, importable)
    run = trainer.state.step, trainer.state.epoch
    held = Held(policy) if isinstance(policy, Selection) else policy
    with _named(f"`{type(trainer).__name__}`"):
        importable.check(type(trainer))
    try:
        # The policy among the arguments is left out where it is known what it selects.
        rest = _dumped((type(trainer), made, run), importable, places, leaves_policies=isinstance(held, Held))
    except Exception as error:  # pickling raises whatever the objects themselves do
        raise _unsendable_argument(trainer, made, importable, places) or error from None
    with _named("the policy of a model that is not built yet (call the model on a batch first)"):
        policies = _dumped(held, importable, places)
    with _named("the data"):
        data = _dumped([map_tensors(_on_the_host, batch) for batch in batches], importable, places)
    variables = _variables(trainer.model)
    return pickle.dumps((Environment.now(importable.main()), roots, variables, rest, policies, data))


def opened(parcel: bytes) -> Opened:
    """Make again what was packed."""
    environment, packed_roots, variables, rest, policies, data = pickle.loads(parcel)
    environment.restore()
    model = _opened_roots(packed_roots)
    kind, made, run = _Unpickler(rest, model).load()
    return Opened(kind, made, _Unpickler(policies, model).load(), run, _Unpickler(data, model).load(), variables)


def check_same(model: Model, variables: list[Any]) -> None:
    """Check that a model that was made again has the variables that it had; of none, nothing is known.

    Args:
        model: The model, when it is built.
        variables: `Opened.variables`.

    Raises:
        Unsendable: It has others.
    """
    found = _variables(model)
    if variables and found != variables:
        other = next((a[0][0] for a, b in zip([*variables, (("",),)], [*found, ((),)]) if a != b), "")
        raise Unsendable(
            f"made again from its config, the model has {len(found)} variables and had {len(variables)}, and the first "
            f"that differs is {other!r}. `get_config` of its layers must say all that they are made of, and models of "
            "a mapping that share layers must be parts of one among them"
        )


def _variables(model: Model) -> list[Any]:
    return [(v.paths, v.shape, v.trainable) for v in Tree.of(model).variables]


# Models


def _packed_roots(model: Model, importable: Importable) -> tuple[Any, dict[int, tuple[str, str]]]:
    """Return a model, or each of several, as bytes, and the places of all that is in them, by identity."""
    tree = Tree.of(model)
    if not isinstance(model, Mapping):
        return _packed_root(model, "the model", importable, {}), _places(tree)
    packed_ones: dict[str, bytes] = {}
    # The largest first: a model that is part of another is found in that.
    for name in sorted(model, key=lambda name: -len(Tree.of(model[name]).submodels)):
        before = _places(Tree.of({done: model[done] for done in packed_ones}))
        packed_ones[name] = _packed_root(model[name], f"the model {name!r}", importable, before)
    return (packed_ones, list(model)), _places(tree)


def _packed_root(model: Model, name: str, importable: Importable, places: Mapping[int, Any]) -> bytes:
    tree = Tree.of(model)
    with _named(name):
        # Keras saves neither the states of seeds nor variables of TensorFlow's in a layer, and no flag that a
        # constructor does not take.
        plain = [v for v in tree.variables if v.seed or not isinstance(v.variable, keras.Variable)]
        values = {v.path: v.tf_variable.numpy() for v in plain} if isinstance(model, keras.Layer) else {}
        flags = [(layer.path, layer.object.trainable) for layer in tree.layers]
        return _dumped((model, values, flags), importable, places)


def _opened_roots(packed_roots: Any) -> Model:
    if isinstance(packed_roots, bytes):
        return _opened_root(packed_roots, {})
    packed_ones, names = packed_roots
    models: dict[str, Any] = {}
    for name, each in packed_ones.items():
        models[name] = _opened_root(each, models)
    return {name: models[name] for name in names}


def _opened_root(packed_root: bytes, others: Model) -> Model:
    model, values, flags = _Unpickler(packed_root, others).load()
    tree = Tree.of(model)
    for variable in tree.variables:
        if variable.path in values:
            variable.tf_variable.assign(values[variable.path])
    # Parents come first: what they set in their children is set right after.
    for path, flag in flags:
        layer = tree.by_path.get(path)
        if layer is not None and layer.object.trainable != flag:
            layer.object.trainable = flag
    return model


def _places(tree: Tree) -> dict[int, tuple[str, str]]:
    """Return where each submodel and variable stands, by identity: pickled, it is that place."""
    places = {id(submodel.object): ("submodel", submodel.path) for submodel in tree.submodels}
    for variable in tree.variables:
        places[id(variable.variable)] = places[id(variable.tf_variable)] = ("variable", variable.path)
    return places


# Pickling


def _dumped(
    value: Any, importable: Importable, places: Mapping[int, tuple[str, str]], *, leaves_policies: bool = False
) -> bytes:
    file = io.BytesIO()
    _Pickler(file, importable, places, leaves_policies).dump(value)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles what stands in the model as its place, and what Keras and TensorFlow do not pickle."""

    def __init__(
        self, file: Any, importable: Importable, places: Mapping[int, tuple[str, str]], leaves_policies: bool
    ) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._importable = importable
        self._places = places
        self._leaves_policies = leaves_policies

    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        return self._places.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) or inspect.isfunction(obj):
            self._importable.check(obj)
        elif isinstance(obj, keras.Layer):
            # A file of Keras', whose `compile` is left out when it is read.
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of a `lambda`, which goes no further than to a process of this program
                archive = obj.__reduce__()[1][0].getvalue()
            holders = [submodel.object for submodel in Tree.of(obj).layers]
            return _layer, (archive, custom_objects(config_in(archive), holders))
        elif isinstance(obj, KERAS_OBJECTS):
            config = keras.saving.serialize_keras_object(obj)
            return _keras_object, (config, custom_objects(config, [obj]))
        elif isinstance(obj, VariablePolicy) and self._leaves_policies:
            return TrainAll, ()
        elif isinstance(obj, keras.Variable):
            return _keras_variable, (obj.numpy(), obj.dtype, obj.trainable, obj.name)
        elif isinstance(obj, tf.Variable):
            return _variable, (obj.numpy(), obj.dtype.name, obj.trainable, obj.name.partition(":")[0])
        elif isinstance(obj, tf.random.Generator):
            return _generator, (obj.state.numpy(), int(obj.algorithm))
        elif isinstance(obj, (tf.RaggedTensor, tf.SparseTensor)):
            return _composite, (tf.type_spec_from_value(obj), tf.nest.flatten(obj, expand_composites=True))
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Finds again what was pickled as its place in a model."""

    def __init__(self, pickled: bytes, model: Model) -> None:
        super().__init__(io.BytesIO(pickled))
        tree = Tree.of(model)
        self._found = {("submodel", path): one.object for path, one in tree.by_path.items()}
        self._found |= {("variable", path): v.variable for v in tree.variables for path in v.paths}

    def persistent_load(self, pid: Any) -> Any:
        return self._found[pid]


class _Maker:
    """Makes layers of a class that may not take all that its config says, as if it was a class of its own.

    Keras' configs name the flag and the dtype of any layer, which a constructor without `**kwargs` does not take.
    """

    def __init__(self, kind: type[keras.Layer]) -> None:
        self._kind = kind

    def from_config(self, config: dict[str, Any]) -> keras.Layer:
        taken = inspect.signature(self._kind.__init__).parameters
        refused = {name for name in ("name", "trainable", "dtype") if name in config and name not in taken}
        if not refused or any(each.kind is each.VAR_KEYWORD for each in taken.values()):
            return self._kind.from_config(config)
        layer = self._kind.from_config({name: value for name, value in config.items() if name not in refused})
        if "name" in refused:
            layer.name = config["name"]
        return layer


def _layer(archive: bytes, custom: dict[str, Any]) -> Any:
    makers = {
        name: _Maker(one) if inspect.isclass(one) and issubclass(one, keras.Layer) else one
        for name, one in custom.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "layer.keras")
        path.write_bytes(archive)
        return keras.saving.load_model(path, makers, compile=False, safe_mode=False)


def _keras_object(config: dict[str, Any], custom: dict[str, Any]) -> Any:
    return keras.saving.deserialize_keras_object(config, custom, safe_mode=False)


def _keras_variable(value: np.ndarray, dtype: str, trainable: bool, name: str) -> keras.Variable:
    return keras.Variable(value, dtype=dtype, trainable=trainable, name=name)


def _variable(value: np.ndarray, dtype: str, trainable: bool, name: str) -> tf.Variable:
    return tf.Variable(value, dtype=dtype, trainable=trainable, name=name)


def _generator(state: np.ndarray, algorithm: int) -> tf.random.Generator:
    return tf.random.Generator.from_state(state, algorithm)


def _composite(spec: tf.TypeSpec, tensors: list[Any]) -> Any:
    return tf.nest.pack_sequence_as(spec, tensors, expand_composites=True)


def _on_the_host(tensor: Any) -> Any:
    return tensor.numpy() if isinstance(tensor, (tf.Tensor, tf.Variable)) else tensor


# Errors


@contextlib.contextmanager
def _named(what: str) -> Any:
    """Have whatever goes wrong inside this context say of what."""
    try:
        yield
    except Unsendable as error:
        raise Unsendable(f"{what}: {error}") from error
    except Exception as error:
        raise Unsendable(f"{what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error


def _unsendable_argument(
    trainer: Any, made: Made, importable: Importable, places: Mapping[int, tuple[str, str]]
) -> Unsendable | None:
    """Return what is the matter with the first argument that cannot be sent."""
    bound = inspect.signature(type(trainer).__init__).bind(None, *made.args, **made.kwargs)
    for name, value in bound.arguments.items():
        try:
            with _named(f"the argument `{name}` of `{type(trainer).__name__}`"):
                _dumped(value, importable, places, leaves_policies=True)
        except Unsendable as error:
            return error
    return None
