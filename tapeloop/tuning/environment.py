"""What a process is set up with before it makes a trainer: as the program's own, so that it measures the same."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tapeloop.tuning.importable import Main


@dataclass(frozen=True)
class Environment:
    """Settings of Python, Keras and TensorFlow that are not in the environment's variables.

    Attributes:
        path: Where Python looks for modules.
        folder: The working directory.
        main: The script of the program, if something of it is needed.
        keras: Keras' float type, dtype policy and image format.
        threads: TensorFlow's threads within ops and between them.
        tensor_float_32: Whether a GPU may compute in fewer digits.
        gpus: The names of the GPUs that TensorFlow uses.
        optimizer: What TensorFlow's graph optimizer was told.
    """

    path: list[str]
    folder: str
    main: str | None
    keras: tuple[str, str, str]
    threads: tuple[int, int]
    tensor_float_32: bool
    gpus: list[str]
    optimizer: dict[str, Any]

    @classmethod
    def now(cls, main: str | None) -> Environment:
        """Return the settings of this process.

        Args:
            main: The script of the program, if something of it is needed.
        """
        config, threading = keras.config, tf.config.threading
        return cls(
            path=list(sys.path),
            folder=os.getcwd(),
            main=main,
            keras=(config.floatx(), config.dtype_policy().name, config.image_data_format()),
            threads=(threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads()),
            tensor_float_32=tf.config.experimental.tensor_float_32_execution_enabled(),
            gpus=[device.name for device in tf.config.get_visible_devices("GPU")],
            optimizer=tf.config.optimizer.get_experimental_options(),
        )

    def restore(self) -> None:
        """Give this process the settings, which has run no op yet, and import the script."""
        sys.path[:] = self.path
        os.chdir(self.folder)
        threading = tf.config.threading
        if self.threads[0] != threading.get_intra_op_parallelism_threads():
            threading.set_intra_op_parallelism_threads(self.threads[0])
        if self.threads[1] != threading.get_inter_op_parallelism_threads():
            threading.set_inter_op_parallelism_threads(self.threads[1])
        gpus = [device for device in tf.config.list_physical_devices("GPU") if device.name in self.gpus]
        if gpus:
            tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:  # or the first process would take all memory, and the program has some already
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.experimental.enable_tensor_float_32_execution(self.tensor_float_32)
        tf.config.optimizer.set_experimental_options(self.optimizer)
        floatx, policy, image_format = self.keras
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
        keras.config.set_image_data_format(image_format)
        # The same in all candidates, of which each draws what the model does not have yet.
        keras.utils.set_random_seed(0)
        if self.main is not None:
            Main.run(self.main)


def check_gpu_memory() -> None:
    """Check that other processes find memory on the GPUs that this one uses.

    Raises:
        RuntimeError: This one has taken all of it.
    """
    if os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() == "true":
        return
    for gpu in tf.config.get_visible_devices("GPU"):
        limits = tf.config.get_logical_device_configuration(gpu) or []
        is_limited = any(each.memory_limit is not None for each in limits)
        if not is_limited and not tf.config.experimental.get_memory_growth(gpu):
            raise RuntimeError(
                f"TensorFlow has taken the whole memory of {gpu.name} for this process, and `tune` measures in "
                "processes of their own. Call `tf.config.experimental.set_memory_growth(gpu, True)` for each of "
                "`tf.config.list_physical_devices('GPU')` at the start of the program."
            )
