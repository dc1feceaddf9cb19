"""A process that measures one arm: it builds it, then does what it is told through a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks import adversarial
from benchmarks.arms import Adam, Arm, by_hand, forward, keras_fit, tapeloop
from benchmarks.cases import ADDED, CACHED, Case
from benchmarks.measure import MEMORY_STEPS, Measured
from benchmarks.workloads import Workload, make


class TensorFlowAllocator:
    """What TensorFlow's own allocator says; the CPU's counts where `TF_CPU_ALLOCATOR_USE_BFC=1` was set."""

    def __init__(self) -> None:
        self._device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"

    def reset(self) -> None:
        """Let the peak be what is in use now."""
        tf.config.experimental.reset_memory_stats(self._device)

    def read(self) -> tuple[int, int]:
        """Return the bytes in use and the most since the last reset."""
        found = tf.config.experimental.get_memory_info(self._device)
        return int(found["current"]), int(found["peak"])


def make_arm(case: Case, policy: str) -> Arm:
    """Build an arm, which goes through the data in its order."""
    group, arm = case.group, case.arm
    if arm == "full" and group.selection in ADDED:
        group = dataclasses.replace(group, selection="all")
    work = make(group, policy)
    if group.workload == "gan":
        return _adversarial(work, case)
    if arm == "forward":
        return forward(work.model, work.data, group.batch, shuffle=False, jit_compile=group.xla)
    if arm == "tapeloop":
        return _tapeloop(work, case)
    if arm == CACHED:
        return _tapeloop(work, case, feature_cache="memory")
    if arm == "full":
        return _by_hand(work, case, work.model.trainable_variables)
    trained = [v.variable for v in tl.Trainer(work.model, work.policy).selection.trained]
    if arm == "subset":
        return _by_hand(work, case, trained, default_tape=True)
    freeze(work.model, trained)
    if arm == "selective":
        return _by_hand(work, case, trained, model=work.frozen_first or work.model)
    return keras_fit(
        work.model, work.data, group.batch, loss=work.loss, metrics=None, shuffle=False, verbose=0,
        jit_compile=group.xla,
    )  # fmt: skip


def freeze(model: keras.Model, trained: list[keras.Variable]) -> None:
    """Set Keras' flags so that nothing but `trained` trains, and what has nothing that trains is in inference mode."""
    chosen = {id(variable) for variable in trained}
    for layer in _leaves(model):
        if layer.trainable_variables and not any(id(variable) in chosen for variable in layer.trainable_variables):
            layer.trainable = False
    for variable in model.trainable_variables:
        variable.trainable = id(variable) in chosen


def _leaves(model: keras.Model) -> Iterator[keras.Layer]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


def _tapeloop(work: Workload, case: Case, **options: Any) -> Arm:
    options = {"loss": work.loss, "metrics": None, "jit_compile": case.group.xla, **options}
    return tapeloop(work.model, work.policy, work.data, case.group.batch, verbose=0, shuffle=False, **options)


def _by_hand(work: Workload, case: Case, trained: Any, model: Any = None, default_tape: bool = False) -> Arm:
    return by_hand(
        model or work.model, trained, work.data, case.group.batch, metrics=0, loss=work.loss,
        default_tape=default_tape, shuffle=False, jit_compile=case.group.xla,
    )  # fmt: skip


def _adversarial(work: Workload, case: Case) -> Arm:
    if case.arm == "tapeloop":
        return _tapeloop(work, case, trainer=adversarial.AdversarialTrainer)
    sources, default_tape = ("all" if case.arm == "full" else "group"), case.arm != "selective"
    options = {"sources": sources, "default_tape": default_tape, "xla": case.group.xla}
    return adversarial.by_hand(work.model, work.data, case.group.batch, **options)


def count_ops(arm: Arm) -> int:
    """Return how many nodes the largest of the graphs has that an arm's first step runs, as TensorFlow optimized it."""
    with tempfile.TemporaryDirectory() as folder:
        tf.summary.trace_on(graph=True)
        arm(1)
        with tf.summary.create_file_writer(folder).as_default():
            tf.summary.trace_export("step", step=0)
        (file,) = tf.io.gfile.glob(f"{folder}/events*")
        records = [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(file)]
    exported = [value.tensor.string_val[0] for record in records for value in record.summary.value]
    graphs = [g for part in exported for g in tf.compat.v1.RunMetadata.FromString(part).function_graphs]
    return max((len(graph.node) for some in graphs for graph in some.partition_graphs), default=0)


def described() -> dict[str, Any]:
    """Return the versions and devices of this process."""
    devices = tf.config.list_physical_devices("GPU")
    details = tf.config.experimental.get_device_details(devices[0]) if devices else {}
    build = tf.sysconfig.get_build_info()
    return {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "tapeloop": tl.__version__,
        "device": details.get("device_name", "CPU"),
        "compute_capability": ".".join(map(str, details.get("compute_capability", ()))),
        "cuda": build.get("cuda_version", "") if devices else "",
        "cudnn": build.get("cudnn_version", "") if devices else "",
    }


def serve(pipe: Connection, case: Case, policy: str, one_thread: bool) -> None:
    """Build an arm and obey until told to stop. Whatever goes wrong is answered, not raised.

    Args:
        pipe: Takes `(command, steps)` and gives a dict back; `error` in it says what went wrong.
        case: What to measure.
        policy: For a user's own model: its policy.
        one_thread: Whether ops run one after the other, so that peaks of memory do not depend on chance.
    """
    os.dup2(2, 1)  # what libraries print is not the user's to read
    try:
        for device in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(device, True)
        if one_thread:
            tf.config.threading.set_inter_op_parallelism_threads(1)
            tf.config.threading.set_intra_op_parallelism_threads(1)
            steps = min(case.group.steps, MEMORY_STEPS)  # no more data than is gone through
            case = dataclasses.replace(case, group=dataclasses.replace(case.group, steps=steps))
        arm = make_arm(case, policy)
        measured = Measured(arm, time.perf_counter, TensorFlowAllocator())
        pipe.send(described())
        while True:
            command, steps = pipe.recv()
            if command == "round":
                pipe.send(measured.round(steps))
            elif command == "memory":
                ops = count_ops(arm)
                pipe.send({**measured.memory(), "state_bytes": Adam.state_bytes(), "ops": ops})
            else:
                return
    except EOFError:
        return
    except tf.errors.ResourceExhaustedError as error:
        with contextlib.suppress(OSError):
            pipe.send({"error": f"out of memory: {str(error)[:200]}"})
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        with contextlib.suppress(OSError):
            pipe.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"})
