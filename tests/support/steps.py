"""Training steps that are written with the tape."""

import tensorflow as tf

import tapeloop as tl


class OneUpdate(tl.Trainer):
    """One tape and one update; `loss_of(batch)` is the loss."""

    groups = ()

    def train_step(self, batch):
        with self.tape(*self.groups) as tape:
            loss = self.loss_of(batch)
        self.update(tape, loss)
        return {"loss": loss}

    def loss_of(self, batch):
        return self.compute_loss(batch, training=True)


class Counting(tl.Trainer):
    """Counts its steps in the graph, in ways that depend on nothing in the batch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.trained = tf.Variable(0)
        self.evaluated = tf.Variable(0)

    def train_step(self, batch):
        self.trained.assign_add(1)
        return super().train_step(batch)

    def eval_step(self, batch):
        self.evaluated.assign_add(1, read_value=False)
        return super().eval_step(batch)


class InTurn(tl.Trainer):
    """A tape and an update for each of some groups; `loss_of(group, batch)` is the loss."""

    order = ("first", "second")

    def train_step(self, batch):
        logs = {}
        for group in self.order:
            logs[group] = self.turn(group, batch)
        return logs

    def turn(self, group, batch):
        with self.tape(group) as tape:
            loss = self.loss_of(group, batch)
        self.update(tape, loss)
        return loss
