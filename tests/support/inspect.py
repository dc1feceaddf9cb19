"""What a trainer and its model have come to. No other file of the tests reads private attributes of a trainer."""

import dataclasses
import time

import numpy as np
import pytest
import tensorflow as tf

from tapeloop.data.batch import spec_of
from tapeloop.folding.option import Folding
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.step_counts import counts_before
from tapeloop.step.accumulation import Microbatches
from tapeloop.step.plan import Planner
from tests.support import models


def cohorts(trainer):
    """The optimizer's cohorts, in the order in which their variables began to train."""
    return trainer.state.optimizers.cohorts


def optimizers(trainer):
    """The Keras optimizer of each cohort."""
    return [cohort.optimizer for cohort in cohorts(trainer)]


def iterations(trainer):
    """The step count of each cohort."""
    return [int(optimizer.iterations) for optimizer in optimizers(trainer)]


def optimizer_state_bytes(trainer, variable):
    """How many bytes of optimizer state there are for a `VariableInfo`."""
    return trainer.state.optimizers.state_bytes(variable)


def averages(trainer):
    """The moving averages of what has trained, by the paths of the variables."""
    held = {v.path: trainer.state.averages.held([v]) for v in trainer.selection.tree.variables}
    return {path: average.numpy() for path, found in held.items() for average in found}


def own_variables(trainer):
    """The values of the variables among the attributes of a subclass."""
    return [variable.numpy() for variable in trainer._parts.attributes.variables()]


def start_phase(trainer):
    """Prepare what trains next, as a fit does that starts, and return its training step."""
    return trainer._loop.phases.due(starting=True).step


def train_step(trainer):
    """The compiled training step of what trains now."""
    return trainer._loop.steps.get("train", trainer.selection)


def eval_step(trainer):
    """The compiled evaluation step of what trains now."""
    return trainer._loop.evaluation()


def step_of(body, compilation):
    """A compiled step that runs `body` on a batch."""
    parts = dataclasses.replace(models.trainer_of()._parts, bodies={"predict": body}, compilation=compilation)
    step = CompiledStep(Planner("predict", models.trainer_of().selection, parts), Microbatches(1), Folding(False))
    return lambda batch: step.predict(batch, counts_before(0, 0, 0))


def everything(trainer):
    """The bytes of all that a run leaves behind: the model, the optimizers' state and step counts, the averages."""
    state = [variable for optimizer in optimizers(trainer) for variable in optimizer.variables]
    values = [np.asarray(value).tobytes() for value in (*state, *averages(trainer).values())]
    return models.values(trainer.model), values, trainer.step


def ops_of_the_loop(trainer):
    """The types of the ops in the loop that was traced last, in its functions too."""
    graph = train_step(trainer)._latest[1].graph.as_graph_def()
    return {node.op for function in graph.library.function for node in function.node_def} | {n.op for n in graph.node}


def calls_of_the_loop(trainer, data, **options):
    """How many batches each call of the loop drew in a fit, and in how many seconds."""
    calls, run = [], CompiledStep.run_steps

    def noting(*args, **more):
        began = time.monotonic()
        found = run(*args, **more)
        calls.append((found[0].batches, time.monotonic() - began))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledStep, "run_steps", noting)
        trainer.fit(data, verbose=0, **options)
    return calls


def live_ops(trainer, batch):
    """The types of the ops in the training step that anything comes of, in its functions too: others are pruned."""
    graph = train_step(trainer)._compiled(spec_of(tuple(tf.constant(value) for value in batch))).graph
    definition = graph.as_graph_def()
    library = {function.signature.name: function for function in definition.library.function}
    roots = [t.op.name for t in graph.outputs] + [op.name for op in graph.control_outputs]
    found, waiting = [], [(definition.node, roots)]
    while waiting:
        definitions, needed = waiting.pop()
        nodes, seen = {node.name: node for node in definitions}, set()
        needed = list(needed)
        while needed:
            name = needed.pop().lstrip("^").split(":")[0]
            if name in seen or name not in nodes:
                continue
            seen.add(name)
            found.append(nodes[name].op)
            needed += nodes[name].input
            for called in [attribute.func.name for attribute in nodes[name].attr.values() if attribute.func.name]:
                inner = library[called]
                waiting.append((inner.node_def, [*inner.ret.values(), *inner.control_ret.values()]))
    return found
