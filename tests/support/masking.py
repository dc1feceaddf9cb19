"""Trainers whose bad steps are masked, as on a GPU, and what their graphs leave for the host to decide.

`python -m tests.support.masking 9` prints what each guard costs on this machine, of 9 rounds.
"""

import statistics
import sys
import time

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support.inspect import train_step

# What a call of the loop is told by the host, and what is known without looking at what a device computes.
TOLD = {"start", "counts", "limit", "seconds"}
KNOWN = {"Const", "Timestamp", "NoOp", "Shape", "ShapeN", "Size", "Rank", "VariableShape"}


def masked(kind, *args, **options):
    """A trainer of a kind, made as it is made where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tapeloop.trainer.runs_on_gpu", lambda: True)
        return kind(*args, **options)


def decided_by_devices(trainer):
    """The ops of the loop that was traced last by which the host would have to wait for what a device computes."""
    graph = train_step(trainer)._latest[1].graph.as_graph_def()
    analysis = _Analysis({function.signature.name: function for function in graph.library.function})
    analysis.run(graph.node, {node.name: node.name not in TOLD for node in graph.node if node.op == "Placeholder"}, [])
    return sorted(analysis.found)


class _Analysis:
    """Follows what devices compute (weights, data, and what comes of them) through graphs and functions."""

    def __init__(self, functions):
        self.functions = functions
        self.found = set()

    def run(self, nodes, computed, returned):
        """Tell of each returned reference whether a device computes it, given the same of the arguments."""
        nodes, outputs = {node.name: node for node in nodes}, {}

        def of(reference):
            name = reference.split(":")[0]
            if name in computed:
                return computed[name]
            if name not in outputs:
                outputs[name] = self.outputs(nodes[name], [of(given) for given in data(nodes[name])])
            found = outputs[name]
            place = int(reference.rpartition(":")[2]) if ":" in reference else 0
            return found[place] if isinstance(found, list) else found

        def data(node):
            return [given for given in node.input if given[0] != "^"]

        for name in nodes:
            of(name)
        return [of(reference) for reference in returned]

    def outputs(self, node, given):
        """Tell of the outputs of a node whether devices compute them: of each, or of all."""
        called = {name: attr.func.name for name, attr in node.attr.items() if attr.HasField("func")}
        if node.op in ("If", "StatelessIf", "Assert", "Switch", "Case") and given[0]:
            self.found.add(node.op)
        if node.op in ("While", "StatelessWhile"):
            while (after := [a or b for a, b in zip(given, self.call(called["body"], given))]) != given:
                given = after
            if self.call(called["cond"], given)[0]:
                self.found.add(node.op)
            return given
        if node.op in ("If", "StatelessIf"):
            branches = [self.call(called[name], given[1:]) for name in ("then_branch", "else_branch")]
            return [given[0] or any(each) for each in zip(*branches)]
        if node.op in self.functions:
            return self.call(node.op, given)
        if "f" in called:
            return self.call(called["f"], given)
        # What takes nothing, and is not known, is drawn at random or read from somewhere.
        return node.op not in KNOWN and (any(given) or not given)

    def call(self, name, given):
        function = self.functions[name]
        arguments = dict(zip([argument.name for argument in function.signature.input_arg], given))
        returned = [function.ret[output.name] for output in function.signature.output_arg]
        return self.run(function.node_def, arguments, returned)


def measure(rounds, width, steps):
    """Print the time of a step of an MLP under each guard, arms in turns, and its ratio to that without."""

    def made(make, *kind, nonfinite):
        hidden = [keras.layers.Dense(width, "relu") for _ in range(2)]
        model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return make(*kind, model, loss=loss, metrics=["accuracy"], optimizer="adam", nonfinite=nonfinite)

    arms = {
        "ignore": made(tl.Trainer, nonfinite="ignore"),
        "raise, Assert": made(tl.Trainer, nonfinite="raise"),
        "raise, mask": made(masked, tl.Trainer, nonfinite="raise"),
        "skip, tf.cond": made(tl.Trainer, nonfinite="skip"),
        "skip, mask": made(masked, tl.Trainer, nonfinite="skip"),
    }
    generator, times = np.random.default_rng(0), {arm: [] for arm in arms}
    x, y = generator.normal(size=(64 * steps, 64)).astype("float32"), generator.integers(0, 10, 64 * steps)
    for number in range(rounds + 3):
        for arm, trainer in arms.items():
            began = time.perf_counter()
            trainer.fit(x, y, batch_size=64, verbose=0)
            if number > 2:
                times[arm].append((time.perf_counter() - began) / steps)
    for arm, found in times.items():
        ratio = statistics.median(one / other for one, other in zip(found, times["ignore"]))
        print(f"{width:>5} {arm:<14} {1e6 * statistics.median(found):>7.0f} us {ratio:>6.2f}", flush=True)


if __name__ == "__main__":
    for units, count in ((128, 1000), (512, 250), (1500, 60)):
        measure(int(sys.argv[1]), units, count)
