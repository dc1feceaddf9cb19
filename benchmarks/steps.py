"""What one process measures of an arm in TensorFlow: the time of its steps, or the memory that they take."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Generator
from typing import Any

import tensorflow as tf

from benchmarks.arms import Arm, make_arm
from benchmarks.cases import Case
from benchmarks.measure import rounds

MEMORY_STEPS = 2  # steps in a round of the memory pass


def set_up(case: Case, one_thread: bool = False) -> str:
    """Have devices grow as they need, or not beyond a cap, and return the name of the one that is measured.

    Where ops run one after the other, in one thread, peaks of memory do not depend on chance.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        if case.cap_mb:
            limited = tf.config.LogicalDeviceConfiguration(memory_limit=case.cap_mb)
            tf.config.set_logical_device_configuration(gpu, [limited])
        else:
            tf.config.experimental.set_memory_growth(gpu, True)
    if one_thread:
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)
    return "GPU:0" if gpus else "CPU:0"


def step(case: Case) -> Generator[None, None, dict[str, Any]]:
    """Time an arm, and read the allocator beside, whose peak depends on chance where ops run in parallel."""
    device = set_up(case)
    arm, figures = yield from rounds(case, lambda: make_arm(case))
    found = memory_of(arm, device, case)
    # A long round has data for more steps than memory is told for.
    spare = int(found["data_bytes"] * (1 - min(case.steps, MEMORY_STEPS) / case.steps))
    for name in ("peak", "persistent", "data_bytes"):
        found[name] -= spare
    return {**figures, **found}


def memory(case: Case) -> dict[str, Any]:
    """Measure the memory of an arm, on the data of two steps, with one thread, and count the nodes of its graph."""
    device = set_up(case, one_thread=True)
    case = dataclasses.replace(case, steps=min(case.steps, MEMORY_STEPS))  # no more data than is gone through
    arm = make_arm(case)
    nodes = count_nodes(arm)
    arm(case.steps)
    return {**memory_of(arm, device, case), "nodes": nodes}


def memory_of(arm: Arm, device: str, case: Case, times: int = 5) -> dict[str, Any]:
    """Return the bytes of an arm that has run before: what its weights, its optimizer and its data take, and the peak.

    `persistent` is what stays between rounds, all these included; `growth` is by how much a step makes it grow.
    Garbage is collected before anything is read.
    """
    models = arm.work.model.values() if isinstance(arm.work.model, dict) else [arm.work.model]
    steps = min(case.steps, MEMORY_STEPS)
    arm(steps)
    gc.collect()
    before = tf.config.experimental.get_memory_info(device)["current"]
    tf.config.experimental.reset_memory_stats(device)
    for _ in range(times):
        arm(steps)
    peak = tf.config.experimental.get_memory_info(device)["peak"]
    gc.collect()
    persistent = tf.config.experimental.get_memory_info(device)["current"]
    return {
        "peak": peak,
        "persistent": persistent,
        "growth": (persistent - before) / (times * steps),
        "weight_bytes": sum(_bytes(variable) for model in models for variable in model.variables),
        "optimizer_bytes": sum(_bytes(variable) for one in arm.optimizers for variable in one.variables),
        "data_bytes": sum(_bytes(part) for part in tf.nest.flatten(arm.work.data)),
        "activation_bytes": peak - persistent,
    }


def _bytes(value: Any) -> int:
    return int(tf.as_dtype(value.dtype).size * tf.TensorShape(value.shape).num_elements())


def count_nodes(arm: Arm) -> int:
    """Return how many nodes the largest of the graphs has that an arm's first step runs, as TensorFlow optimized it.

    It must be the first: a graph is told of when it is made.
    """
    with tempfile.TemporaryDirectory() as folder:
        tf.summary.trace_on(graph=True)
        try:
            arm(1)
        except BaseException:
            tf.summary.trace_off()  # or all that runs later in this process would be kept
            raise
        with tf.summary.create_file_writer(folder).as_default():
            tf.summary.trace_export("step", step=0)
        (file,) = tf.io.gfile.glob(f"{folder}/events*")
        records = [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(file)]
    exported = [value.tensor.string_val[0] for record in records for value in record.summary.value]
    graphs = [g for part in exported for g in tf.compat.v1.RunMetadata.FromString(part).function_graphs]
    return max((len(graph.node) for some in graphs for graph in some.partition_graphs), default=0)
