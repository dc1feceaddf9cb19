"""What one process measures of an arm in TensorFlow: a function, or a generator, for each of `KINDS`."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from benchmarks import devices
from benchmarks.arms import Arm, make_arm
from benchmarks.cases import Case, is_there
from benchmarks.measure import rounds
from benchmarks.workloads import Workload, cross_entropy, make

MEMORY_STEPS = 2  # steps in a round of the memory pass
COMPARED = ("hand+guard", "tapeloop", "tapeloop+cache", "tapeloop+plain", "keras")  # with `hand`, by `equivalence`
# Of the norm of a gradient. Folding alone makes up to 4e-3 of it in a deep network of random weights.
TOLERANCE = {"float32": 5e-3, "bfloat16": 1e-1}
SETTLED = 64  # inputs of which normalizations get their statistics
LARGEST_BATCH = 65_536
ACCURACY, MOST_EPOCHS, DIGITS = 0.95, 60, 32  # the last: digits in a batch


def set_up(case: Case, one_thread: bool = False) -> str:
    """Have devices grow as they need, or not beyond a cap, and return the name of the one that is measured.

    Where ops run one after the other, in one thread, peaks of memory do not depend on chance.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if devices.gpus() and not gpus:
        raise RuntimeError("TensorFlow does not see the GPU: install it with `tensorflow[and-cuda]`.")
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
    return {**figures, **found, **{name: found[name] - spare for name in ("peak", "persistent", "data_bytes")}}


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

    def bytes_of(values: Any) -> int:
        return sum(int(tf.as_dtype(v.dtype).size * tf.TensorShape(v.shape).num_elements()) for v in values)

    return {
        "peak": peak,
        "persistent": persistent,
        "growth": (persistent - before) / (times * steps),
        "weight_bytes": sum(bytes_of(model.variables) for model in models),
        "optimizer_bytes": sum(bytes_of(optimizer.variables) for optimizer in arm.optimizers),
        "data_bytes": bytes_of(tf.nest.flatten(arm.work.data)),
        "activation_bytes": peak - persistent,
    }


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


class Recording(keras.optimizers.SGD):
    """Keeps the last gradients."""

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make room for a gradient of each variable."""
        super().build(variables)
        self.moved = list(variables)
        self.kept = [self.add_variable_from_reference(variable, name="gradient") for variable in variables]

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Keep a gradient, and move."""
        self.assign(self.kept[self._get_variable_index(variable)], tf.convert_to_tensor(gradient))
        super().update_step(gradient, variable, learning_rate)


def equivalence(case: Case) -> dict[str, Any]:
    """Compare the arms of a case's group with the arm by hand, by ops that give the same each time.

    Apart from timing, since a loss after many steps tells little: reordered additions alone make it differ by
    hundredths.
    """
    # All that TensorFlow does to that end forbids `tf.timestamp` too, by which tapeloop's loop knows when to come back.
    os.environ["TF_CUDNN_DETERMINISTIC"] = "1"
    set_up(case, one_thread=True)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return compared(case, (*COMPARED, "full", "subset") if case.selection == "all" else COMPARED)


def compared(case: Case, arms: Sequence[str]) -> dict[str, Any]:
    """Compare arms with the arm by hand.

    Returns:
        `errors`, by arm the largest differences of gradients and of weights, relative to the norm of each; `invalid`,
        by arm why it computes something else; `said`, both in words.
    """
    expected = _stepped(dataclasses.replace(case, arm="hand"))
    tolerance = TOLERANCE[case.dtype]
    errors: dict[str, dict[str, float]] = {}
    invalid: dict[str, str] = {}
    for other in (dataclasses.replace(case, arm=arm, kind="step") for arm in arms):
        if not is_there(other):
            continue
        found = _stepped(other)
        counts = [len(values["gradients"]) for values in (found, expected)]
        if found["gradients"].keys() != expected["gradients"].keys():
            invalid[other.arm] = f"it trains {counts[0]} variables, and `hand` {counts[1]}"
            continue
        errors[other.arm] = {what: _error(found[what], values) for what, values in expected.items()}
        for what, error in errors[other.arm].items():
            if not error <= tolerance:
                invalid[other.arm] = f"its {what} differ from those of `hand` by {error:.2g} of their norm"
    said = "; ".join(f"{arm}: {why}" for arm, why in invalid.items()) or f"{len(errors)} arms compute the same"
    return {"errors": errors, "invalid": invalid, "tolerance": tolerance, "said": said}


def _stepped(case: Case) -> dict[str, dict[int, np.ndarray]]:
    """Take two steps that hardly move, so that the second has the same weights as the first.

    Returns the last gradients and all weights, by the number of the variable in the model.
    """
    work = make(case)
    settle(work.model, work.data[0])
    arm = make_arm(case, dataclasses.replace(work, optimizer=functools.partial(Recording, 1e-6)))
    for _ in range(2):
        arm(1)
    (optimizer,) = arm.optimizers
    variables = arm.work.model.variables
    place = {id(variable): number for number, variable in enumerate(variables)}
    kept = zip(optimizer.moved, optimizer.kept)
    weights = [(variable, variable) for variable in variables if "float" in variable.dtype]
    return {
        what: {place[id(variable)]: np.asarray(value.value, "float32") for variable, value in pairs}
        for what, pairs in (("gradients", kept), ("weights", weights))
    }


def settle(model: keras.Model, x: Any) -> None:
    """Give the normalizations of a model the statistics of many inputs like these.

    With those that they begin with, a deep frozen network of random weights gives next to nothing, and so all the same.
    """
    norms = list(_normalizations(model))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    if norms:
        model(tf.random.stateless_normal((SETTLED, *x.shape[1:]), (0, 3)), training=True)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _normalizations(model: keras.Model) -> Iterator[keras.layers.BatchNormalization]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _normalizations(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            yield layer


def _error(found: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> float:
    """Return the largest difference relative to a norm; none counts as less than a thousandth of the largest."""
    norms = {number: float(np.linalg.norm(value)) for number, value in expected.items()}
    least = max(1e-3 * max(norms.values()), 1e-12)
    return max(float(np.linalg.norm(found[key] - expected[key])) / max(norms[key], least) for key in norms)


def capacity(case: Case) -> dict[str, Any]:
    """Find the largest batch with which a step fits the memory: doubled until it does not, then to a sixteenth."""
    set_up(case)
    least, most = 0, case.batch
    tried = []
    while most <= LARGEST_BATCH and fits(case, most):
        tried.append(most)
        least, most = most, 2 * most
    while most - least > max(1, least // 16):
        middle = (least + most) // 2
        tried.append(middle)
        least, most = (middle, most) if fits(case, middle) else (least, middle)
    return {"largest_batch": least, "tried": tried}


def fits(case: Case, batch: int) -> bool:
    """Tell whether two steps on a batch find room."""
    keras.backend.clear_session()
    gc.collect()
    try:
        arm = make_arm(dataclasses.replace(case, batch=batch, steps=1))
        for _ in range(2):
            arm(1)
    except tf.errors.OpError as error:
        if batch == case.batch and not isinstance(error, tf.errors.ResourceExhaustedError):
            raise  # of a larger batch it may be another limit, of an op or a library
        return False
    return True


def accuracy(case: Case) -> dict[str, Any]:
    """Train on the digits of scikit-learn until 95% of those that are held out are told right.

    Where the head alone trains, the layers under it have learnt the digits 0 to 4 before, and it learns 5 to 9. The
    number of the process is the seed. Evaluations are not timed.
    """
    set_up(case)
    keras.utils.set_random_seed(case.process)
    is_head = case.selection == "head"
    body = [keras.layers.Conv2D(32, 3, activation="relu", padding="same") for _ in range(3)]
    body += [keras.layers.MaxPooling2D(), keras.layers.Flatten()]
    head = keras.layers.Dense(10, name="head")
    model = keras.Sequential([keras.Input((8, 8, 1)), *body, head])
    if is_head:
        x, y, *_ = _digits(0, 5, case.process)
        model.compile("adam", cross_entropy())
        model.fit(x, y, epochs=5, verbose=0)
        head.set_weights([np.zeros_like(weights) for weights in head.get_weights()])
    x, y, held_x, held_y = _digits(5 if is_head else 0, 10, case.process)
    policy = tl.TrainOnly("head") if is_head else tl.TrainAll()
    work = Workload(model, (x, y), cross_entropy(), policy, optimizer=lambda: keras.optimizers.Adam(1e-3))
    case = dataclasses.replace(case, batch=DIGITS, steps=len(x) // DIGITS)
    arm = make_arm(case, work)
    seconds, reached, epoch = 0.0, 0.0, 0
    while reached < ACCURACY and epoch < MOST_EPOCHS:
        began = time.perf_counter()
        arm(case.steps)
        seconds, epoch = seconds + time.perf_counter() - began, epoch + 1
        reached = float(np.mean(np.argmax(model.predict_on_batch(held_x), -1) == held_y))
    said = f"{reached:.3f} after {epoch} epochs and {seconds:.2f} s"
    seconds_to = seconds if reached >= ACCURACY else None
    return {"accuracy": reached, "epochs": epoch, "seconds_to_accuracy": seconds_to, "said": said}


def _digits(low: int, high: int, seed: int) -> tuple[Any, ...]:
    """Return images and labels of some digits: those to train on, in whole batches, and a fifth that is held out."""
    from sklearn.datasets import load_digits  # by this case alone

    digits = load_digits()
    chosen = np.flatnonzero((digits.target >= low) & (digits.target < high))
    chosen = chosen[np.random.default_rng(seed).permutation(len(chosen))]
    x, y = digits.images[chosen, ..., None].astype("float32") / 16, digits.target[chosen].astype("int64") - low
    held = len(x) // 5
    end = held + (len(x) - held) // DIGITS * DIGITS
    return tf.constant(x[held:end]), tf.constant(y[held:end]), x[:held], y[:held]


def checkpoint(case: Case) -> dict[str, Any]:
    """Measure a checkpoint after the first: its bytes, and the seconds to load it."""
    set_up(case)
    work = make(case)
    trainer = tl.Trainer(work.model, work.policy, loss=work.loss, optimizer=work.optimizer())
    with tempfile.TemporaryDirectory() as folder:
        saved = tl.Checkpoints(folder, every_epochs=1)
        trainer.fit(work.data, batch_size=case.batch, epochs=2, verbose=0, checkpoint=saved)
        size = sum(path.stat().st_size for path in saved.newest.iterdir())
        began = time.perf_counter()
        trainer.load(saved.newest)
        seconds = time.perf_counter() - began
    return {"checkpoint_bytes": size, "load_s": seconds, "said": f"{size / 1e6:.2f} MB, loaded in {seconds:.2f} s"}
