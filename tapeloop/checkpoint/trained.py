"""Files of the variables that train alone: an adapter or a head, to be put onto a fresh backbone."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import uuid
from collections.abc import Iterable
from typing import Any

import h5py
import numpy as np
import tensorflow as tf

from tapeloop._digest import digest
from tapeloop.errors import CheckpointError, listed
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Tree, VariableInfo

FORMAT = 1


def write_trained(path: pathlib.Path, selection: Selection) -> None:
    """Write the variables that move while a selection trains, whole or not at all.

    Source: the format is HDF5, as that of Keras' weights files, with a dataset for each path.

    Args:
        path: The file, which is replaced.
        selection: What trains.
    """
    moving = [v for v in selection.tree.variables if v not in set(selection.still) and not v.seed]
    rest = {variable for variable in selection.tree.variables if not variable.seed} - set(moving)
    values = {variable.path: variable.tf_variable.numpy() for variable in moving}
    aside, content = path.parent / f".{path.name}-{uuid.uuid4().hex}", io.BytesIO()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In memory first: HDF5 does not survive a disk that is full.
        with h5py.File(content, "w") as file:
            file.attrs["tapeloop_format"] = FORMAT
            file.attrs["rest"] = fingerprint(rest)
            file.attrs["content"] = _content(values)
            for name, value in values.items():
                # NumPy has no bfloat16 of its own, nor has HDF5: its bits are kept.
                plain = value if value.dtype.isbuiltin == 1 else value.view(f"u{value.dtype.itemsize}")
                file.create_dataset(name, data=plain).attrs["dtype"] = tf.as_dtype(value.dtype).name
        with open(aside, "wb") as written:
            written.write(content.getbuffer())
            written.flush()
            os.fsync(written.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Choose another place.") from None
    finally:
        aside.unlink(missing_ok=True)


def read_trained(path: pathlib.Path, tree: Tree, *, strict: bool) -> None:
    """Give variables of a model the values in a file of `write_trained`, having looked at all of it first.

    Args:
        path: The file.
        tree: The model.
        strict: Whether the model's other weights must be those beside which the file's were trained.

    Raises:
        CheckpointError: The file cannot be read, or is of another model.
    """
    values, rest_then = _read(path)
    mine = {name: variable for variable in tree.variables for name in variable.paths}
    missing = [name for name in values if name not in mine]
    other = [name for name in values if name in mine and mine[name].shape != values[name].shape]
    if missing or other:
        said = [f"has no {listed(missing)}"] * bool(missing) + [f"has other shapes for {listed(other)}"] * bool(other)
        terms = [name for name in (*missing, *other) if name.rpartition("/")[2].startswith("lora_")]
        hint = "" if not terms else " Call `enable_lora` first, on the same layers and with the same rank."
        raise CheckpointError(
            f"{path} is of another model than the trainer's, which {' and '.join(said)}. Make the model as it was, "
            f"with the same names of layers, and call it on a batch first if its layers are not built.{hint}"
        )
    trained = {mine[name] for name in values}
    rest = {variable for variable in tree.variables if not variable.seed} - trained
    if strict and fingerprint(rest) != rest_then:
        raise CheckpointError(
            f"{path} was trained beside other weights: the {len(rest)} variables of the model that are not in the file "
            "differ in value or in number. Load the backbone that it was trained on, or pass `strict=False`."
        )
    for name, value in values.items():
        mine[name].tf_variable.assign(value)


def fingerprint(variables: Iterable[VariableInfo]) -> str:
    """Return a digest of the paths and values of variables."""
    said = sorted(f"{variable.path} {digest(variable.tf_variable.numpy())}" for variable in variables)
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    """Return the values in a file by path, and the digest of the weights beside which they trained."""
    values: dict[str, np.ndarray] = {}

    def take(name: str, found: Any) -> None:
        if isinstance(found, h5py.Dataset):
            value = np.asarray(found[()])
            values[name] = value.view(tf.as_dtype(found.attrs["dtype"]).as_numpy_dtype)

    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("tapeloop_format", 0) > FORMAT:
                raise CheckpointError(f"{path} was written by a newer tapeloop. Update tapeloop.")
            file.visititems(take)
            rest, content = file.attrs["rest"], file.attrs["content"]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no file of `save_trained`, or is damaged: {error}.") from None
    if _content(values) != content:
        raise CheckpointError(f"{path} is damaged: its values are not as they were written.")
    return values, rest


def _content(values: dict[str, np.ndarray]) -> str:
    said = sorted(f"{name} {digest(value)}" for name, value in values.items())
    return hashlib.sha256("\n".join(said).encode()).hexdigest()
