"""What does not go together with training on several devices."""

from __future__ import annotations

import keras

from tapeloop.errors import listed
from tapeloop.model.tree import Tree


def check_options(tree: Tree, jit_compile: bool | str, *, adapts: bool, run_eagerly: bool) -> None:
    """Check that a model and the options of a trainer go together with several devices.

    Args:
        tree: The model.
        jit_compile: The option of this name.
        adapts: Whether the number of micro-batches is found by trial.
        run_eagerly: The option of this name.

    Raises:
        ValueError: They do not.
    """
    if adapts:
        raise ValueError(
            "`microbatches='auto'` tries on each device by itself, and several devices must cut their batches alike. "
            "Give a number."
        )
    if run_eagerly:
        raise ValueError(
            "`run_eagerly=True` runs one device after the other, and several devices wait for each other in a step. "
            "Look for what is wrong on one device, without a strategy."
        )
    if jit_compile is True:
        raise ValueError(
            "`jit_compile=True` compiles a step as a whole, and XLA compiles no sums over several devices. Leave it "
            "out."
        )
    norms = [layer for layer in tree.layers if isinstance(layer.object, keras.layers.BatchNormalization)]
    synchronized = [norm.path for norm in norms if norm.object.synchronized]
    if synchronized:
        raise ValueError(
            f"{listed(synchronized)} would be normalized over all devices (`synchronized=True`), and each device of a "
            "trainer normalizes by its own share of a batch. Leave `synchronized` out, and make the batches larger."
        )
