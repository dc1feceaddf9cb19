"""What a trainer can do with checkpoints: save, load, and the same for what trains alone."""

from __future__ import annotations

import os
import pathlib

import tensorflow as tf

from tapeloop.checkpoint import files, foreign, trained
from tapeloop.checkpoint.contents import RunContents
from tapeloop.checkpoint.saved import SavedRun
from tapeloop.checkpoint.store import CheckpointStore, write_checkpoint
from tapeloop.errors import CheckpointError
from tapeloop.model.tree import Tree


class SavesRuns:
    """The methods of a trainer that save and load."""

    _contents: RunContents

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the whole run in a folder: the model, the optimizers' state, how far it has come, and its history.

        What is there already is replaced at once, when all is written.

        Args:
            path: The folder; or a file that ends in `.keras` or `.weights.h5`, for what Keras writes of the model.

        Raises:
            CheckpointError: The path cannot be written, or is a folder of something else.
            RuntimeError: Called inside `ema_weights()`, unless for a file of Keras'.

        Example:
            >>> import tempfile
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
            >>> trainer = tl.Trainer(model, loss="mse")
            >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), verbose=0)
            >>> path = tempfile.mkdtemp() + "/run"
            >>> trainer.save(path)
            >>> trainer.load(path)
        """
        # A link stays, and what it leads to is replaced.
        folder = pathlib.Path(path).expanduser().resolve()
        if foreign.is_keras(folder):
            foreign.save_keras(folder, self._contents.model)
            return
        averages = self._contents.loop.state.averages
        averages.check_own_values("`save` was called inside `ema_weights()`, and a run is saved with its own weights.")
        if folder.exists() and not (folder / files.SUMS).exists():
            raise CheckpointError(f"{folder} is there already and is no checkpoint. Choose another path.")
        variables = {**self._contents.variables(), **self._contents.log_variables()}
        tensors = {name: variable.read_value() for name, variable in variables.items()}
        record = {**self._contents.record(variables), "epoch_logs": {}, "best": None}
        try:
            with files.written_aside(folder) as aside:
                write_checkpoint(aside, record, tensors, {})
        except (OSError, tf.errors.OpError) as error:
            raise CheckpointError(
                f"{folder} cannot be written: {files.first_line(error)}. Choose another path."
            ) from None

    def load(self, path: str | os.PathLike[str], *, strict: bool = True, fresh_optimizer: bool = False) -> None:
        """Restore the run from a checkpoint; the next `fit` goes on from there, and first ends an epoch that was begun.

        Args:
            path: A checkpoint, or a folder of `Checkpoints`, of which the newest is taken. Or weights alone: a `.keras`
                or `.weights.h5` file of Keras', or the prefix of what `tf.train.Checkpoint(model)` has written.
            strict: Whether the model must have the variables of the checkpoint, no more and no fewer.
            fresh_optimizer: Whether the optimizers start anew, with the averages and the loss scale.

        Raises:
            CheckpointError: There is no checkpoint, it is damaged, or it is of another model or trainer. Nothing has
                moved then.
            RuntimeError: Called inside `ema_weights()`.

        Example:
            >>> import tempfile
            >>> def make():
            ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
            ...     return tl.Trainer(model, loss="mse")
            >>> x, path = np.ones((8, 4)), tempfile.mkdtemp() + "/run"
            >>> first, second = make(), make()
            >>> history = first.fit(x, np.ones((8, 2)), epochs=3, verbose=0)
            >>> first.save(path)
            >>> second.load(path)
            >>> second.epoch, bool((second.predict(x) == first.predict(x)).all())
            (3, True)
        """
        place = pathlib.Path(path).expanduser()
        averages = self._contents.loop.state.averages
        averages.check_own_values("`load` was called inside `ema_weights()`, which would undo it at its end.")
        if foreign.is_keras(place):
            foreign.load_keras(place, self._contents.model)
        elif foreign.is_tensorflow(place):
            foreign.load_tensorflow(place, self._contents.model)
        else:
            self._contents.restore(self._saved_at(place), strict=strict, fresh_optimizer=fresh_optimizer)
            self._contents.loop.state.was_loaded = True

    def save_trained(self, path: str | os.PathLike[str]) -> None:
        """Save what trains, and the statistics beside it, in one small file: an adapter, or a head.

        Args:
            path: The file, such as `"adapter.h5"`.

        Raises:
            CheckpointError: The file cannot be written.

        Example:
            >>> import tempfile
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
            >>> path = tempfile.mkdtemp() + "/head.h5"
            >>> trainer.save_trained(path)
            >>> trainer.load_trained(path)
        """
        trained.write_trained(pathlib.Path(path).expanduser(), self._contents.loop.phases.held())

    def load_trained(self, path: str | os.PathLike[str], *, strict: bool = True) -> None:
        """Load what `save_trained` has saved into a model with the same backbone.

        Args:
            path: The file.
            strict: Whether the model's other weights must be those beside which the file's were trained.

        Raises:
            CheckpointError: The file cannot be read, or is of another model. Nothing has moved then.

        Example:
            >>> import tempfile
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer, path = tl.Trainer(model, tl.Freeze("base"), loss="mse"), tempfile.mkdtemp() + "/head.h5"
            >>> trainer.save_trained(path)
            >>> history = trainer.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
            >>> trainer.load_trained(path)  # the head is as it was before
        """
        trained.read_trained(pathlib.Path(path).expanduser(), Tree.of(self._contents.model), strict=strict)

    def _saved_at(self, place: pathlib.Path) -> SavedRun:
        """Return the checkpoint in a folder, or the newest of several.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        if CheckpointStore(place).names():
            found = CheckpointStore(place).newest(self._contents.require_readable)
            assert found is not None
            return found
        place = files.present(place)
        if not place.is_dir():
            raise CheckpointError(f"There is no checkpoint at {place}. Give the folder that `save` was given.")
        try:
            saved = SavedRun(place)
            self._contents.require_readable(saved)
        except (files.DamagedError, OSError) as error:
            raise CheckpointError(f"The checkpoint {place} is damaged, or is none: {error}.") from None
        return saved
