"""Histories as fits record them, made without training."""

import functools

import tapeloop as tl
from tapeloop.loop.history import History, Phase
from tapeloop.model.tree import Tree
from tapeloop.policies.resolve import chain, resolve


def history_of(model, policy, epochs=4, steps=10, every=None, logs=None):
    """The history of a fit of so many epochs and steps an epoch, with a policy that is asked every so many steps."""
    tree, history = Tree.of(model), History()
    for epoch in range(epochs):
        for step in range(epoch * steps, (epoch + 1) * steps, every or steps):
            held = chain(policy, tl.Progress(step, epoch))[-1]
            history.add_phase(Phase(step, epoch, held, functools.cache(functools.partial(resolve, held, tree))))
        values = {"loss": 1 / (epoch + 1), "val_loss": 1.1 / (epoch + 1)} if logs is None else logs[epoch]
        history.add_epoch(epoch + 1, (epoch + 1) * steps, values)
    return history
