"""A forward pass too many in tapeloop's step, as benchmark cases measure it, in processes of their own."""

import tensorflow as tf

import tapeloop as tl
from benchmarks import arms, kinds, workloads


class Doubled(tl.Trainer):
    """A trainer with a forward pass too many."""

    def train_step(self, batch):
        x, _ = batch
        seen = self.forward(tf.reverse(x, [0]), training=True)
        return {**super().train_step(batch), "seen": tf.reduce_mean(seen)}


def make_arm(case):
    """An arm of such a trainer."""
    work = workloads.make(case)
    optimizer = work.optimizer()
    return arms.Arm(arms.tapeloop(case, work, optimizer, Doubled), work, (optimizer,))


def step(case):
    """Time it."""
    kinds.make_arm = make_arm
    return (yield from kinds.step(case))


def memory(case):
    """Measure its memory, and count its nodes."""
    kinds.make_arm = make_arm
    return kinds.memory(case)
