"""What the user assigns in a step happens, and `follow` moves one submodel towards another."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.compare import assert_close, assert_same
from tests.support.fitting import BAD, X, Y, fit, refused
from tests.support.params import params
from tests.support.steps import OneUpdate

layers = keras.layers
HOW = [{}, {"run_eagerly": True}, {"microbatches": 2}, {"nonfinite": "skip"}, {"nonfinite": "ignore"}]


def network(name):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)],
        name=name,
    )


class Following(tl.Trainer):
    """Trains `online`, which `target` follows by a decay that may be a function of the step."""

    decay = 0.5

    def compute_loss(self, batch, training):
        x, y = batch
        goal = self.model["target"](x, training=False)
        return tf.reduce_mean((self.model["online"](x, training=training) - y - tf.stop_gradient(goal)) ** 2)

    def train_step(self, batch):
        logs = super().train_step(batch)
        self.follow("target", "online", decay=self.decay(self.step) if callable(self.decay) else self.decay)
        return logs


def twins(kind=Following, **options):
    online, target = network("online"), network("target")
    target.set_weights(online.get_weights())
    options = {"optimizer": keras.optimizers.SGD(0.1), **options}
    return kind({"online": online, "target": target}, tl.Freeze("target"), **options)


def weights_after_each_step(trainer, steps):
    for _ in range(steps):
        trainer.fit([(X, Y)], verbose=0)
        yield [trainer.model[name].get_weights() for name in ("online", "target")]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_target_follows_by_polyak_averaging(how):
    trainer = twins(**how)
    expected = trainer.model["target"].get_weights()
    for online, target in weights_after_each_step(trainer, 3):
        expected = [np.float32(0.5) * kept + np.float32(0.5) * new for kept, new in zip(expected, online)]
        assert_close(target, expected, rtol=1e-6, atol=1e-7)
    assert trainer.trace_count <= 1


@pytest.mark.parametrize("decay", [0.0, 0, 1.0, tf.constant(0.0)], ids=str)
def test_decay_zero_is_a_copy_and_one_stands_still(decay):
    trainer = twins()
    before = trainer.model["target"].get_weights()
    trainer.decay = decay
    trainer.fit([(X, Y)] * 2, verbose=0)
    assert_same(trainer.model["target"], before if float(decay) == 1.0 else trainer.model["online"])


def test_the_decay_may_change_with_the_step():
    trainer = twins()
    trainer.decay = lambda step: tf.where(step < 1, 0.0, 1.0)
    (online, copied), (_, kept) = weights_after_each_step(trainer, 2)
    assert_same(copied, online)
    assert_same(kept, copied)


def assign_by_each_verb(model):
    kernel, bias, gamma, *_ = model.trainable_variables
    kernel.assign(kernel * 0.0 + 7.0)
    bias.assign_add(bias * 0.0 + 7.0)
    gamma.value.assign(gamma.value * 0.0 + 7.0)


class Assigning(tl.Trainer):
    def train_step(self, batch):
        if self.when == "before":
            assign_by_each_verb(self.model)
        logs = super().train_step(batch)
        if self.when == "after":
            assign_by_each_verb(self.model)
        return logs

    def eval_step(self, batch):
        assign_by_each_verb(self.model)
        return super().eval_step(batch)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "eval"])
def test_what_the_user_assigns_to_frozen_variables_happens(eagerly, when):
    model = network("net")
    trainer = Assigning(model, tl.TrainOnly(model.layers[-1]), loss="mse", run_eagerly=eagerly)
    trainer.when = when
    kernel, bias, gamma, *_ = model.trainable_variables
    bias.assign(np.arange(5.0))
    (trainer.evaluate if when == "eval" else trainer.fit)([(X, Y)], verbose=0)
    assert_close(
        [kernel.numpy(), bias.numpy(), gamma.numpy()], [np.full((4, 5), 7.0), np.arange(5) + 7.0, np.full(5, 7.0)]
    )


EAGERLY = {"run_eagerly": True, "nonfinite": "skip"}
PLACES = [(place, how) for place in ("model", "attribute") for how in (*HOW[:4], EAGERLY)]


@pytest.mark.parametrize(("place", "how"), params([*PLACES, ("closure", EAGERLY)], PLACES[1:4]), ids=str)
def test_it_is_undone_with_a_bad_step_wherever_the_target_is_kept(place, how):
    online, target = network("online"), network("target")
    count = tf.Variable(0.0)

    class Guarded(OneUpdate):
        def loss_of(self, batch):
            return tf.reduce_mean((self.model["online"](batch[0], training=True) - batch[1]) ** 2)

        def train_step(self, batch):
            logs = super().train_step(batch)
            self.follow(target, self.model["online"], decay=0.5)
            target.layers[0].bias.assign_add(tf.ones(5))
            if place == "closure":
                count.assign_add(1.0)
            return logs

    networks = {"online": online, "target": target} if place == "model" else {"online": online}
    policy = tl.Freeze("target") if place == "model" else tl.TrainAll()
    trainer = Guarded(networks, policy, optimizer=keras.optimizers.SGD(0.1), **how)
    if place == "attribute":
        trainer.target = target
    trainer.fit([(X, Y)], verbose=0)
    before = [*target.get_weights(), count.numpy()]
    with contextlib.nullcontext() if "nonfinite" in how else pytest.raises(tl.NonFiniteError):
        trainer.fit([(BAD, Y)], verbose=0)
    assert_same([*target.get_weights(), count.numpy()], before)


@pytest.mark.parametrize(
    "sync", params(["follow", "every tenth step", "between fits", "in a closure"], ["between fits"])
)
def test_a_target_beside_the_model_is_not_warned_of(sync):
    target = network("target")

    class Dqn(tl.Trainer):
        def train_step(self, batch):
            network = target if sync == "in a closure" else self.target
            goal = batch[1] + 0.9 * network(batch[0], training=False)
            logs = super().train_step((batch[0], goal))
            if sync in ("follow", "in a closure"):
                self.follow(network, self.model, decay=0.9)
            elif sync == "every tenth step":
                self._sync(network)
            return logs

        def _sync(self, network):
            if self.step % 10 == 0:
                for old, new in zip(network.trainable_variables, self.model.trainable_variables):
                    old.assign(new)

    trainer = Dqn(network("online"), loss="mse", optimizer="sgd")
    trainer.target = target
    trainer.fit([(X, Y)] * 2, verbose=0)  # a warning would be an error


def test_a_layer_beside_the_model_that_looks_as_if_it_trained_is_warned_of():
    class Projects(tl.Trainer):
        def compute_loss(self, batch, training):
            return tf.reduce_mean((self.head(self.model(batch[0], training=training)) - batch[1]) ** 2)

    trainer = Projects(network("online"), optimizer="sgd")
    trainer.head = layers.Dense(3)
    trainer.head.build((None, 3))
    with pytest.warns(UserWarning, match="uses 2 variables that the model does not track"):
        trainer.fit([(X, Y)], verbose=0)


@pytest.mark.parametrize(
    ("target", "source", "decay", "error", "text"),
    [
        ("target", "onlin", 0.5, ValueError, r"no submodel at the path 'onlin'. There are"),
        ("target", 3, 0.5, TypeError, r"`source` must be a submodel or its path"),
        ("online", "online", 0.5, ValueError, r"one submodel as target and as source"),
        ("target", "online", 1.5, ValueError, r"`decay` must be a number from 0 to 1"),
        ("target", "online", "x", ValueError, r"`decay` must be a number from 0 to 1"),
        ("target", "online/dense", 0.5, ValueError, r"8 variables to move and 2 to .*`keras.models.clone_model`"),
        (layers.Dense(3), "online/dense", 0.5, ValueError, r"Received: 0 variables to move"),
    ],
)
def test_what_cannot_follow(target, source, decay, error, text):
    class Wrong(Following):
        def train_step(self, batch):
            part = self.model["online"].layers[0] if source == "online/dense" else source
            self.follow(target, part, decay=decay)
            return super().train_step(batch)

    trainer = twins(Wrong)
    with refused(trainer.model, error, text):
        trainer.fit([(X, Y)], verbose=0)


def test_follow_belongs_in_a_step():
    with pytest.raises(RuntimeError, match="`follow` was called outside a step"):
        twins().follow("target", "online", decay=0.5)


def test_with_micro_batches_it_cannot_stand_in_a_branch():
    class Branches(Following):
        def train_step(self, batch):
            logs = tl.Trainer.train_step(self, batch)
            if self.step >= 0:
                self.follow("target", "online", decay=0.5)
            return logs

    with pytest.raises(RuntimeError, match=r"`follow` in a branch or a loop .* cannot wait"):
        twins(Branches, microbatches=2).fit([(X, Y)], verbose=0)


class Sliced(layers.Layer):
    """Assigns to a part of its own weight whenever it is called."""

    def build(self, shape):
        self.w = self.add_weight(shape=(4,), initializer="ones")

    def call(self, x):
        self.w.value[0].assign(self.w.value[0] + 1.0)
        return x * self.w


@pytest.mark.parametrize("eagerly", [False, True])
def test_an_assignment_to_a_part_of_a_variable_is_one(eagerly):
    model = keras.Sequential([keras.Input((4,)), Sliced(name="sliced"), layers.Dense(3)])
    before = model.get_layer("sliced").w.numpy()
    trainer = fit(model, tl.Freeze("sliced"), steps=2, run_eagerly=eagerly, nonfinite="skip")
    assert_same(model.get_layer("sliced").w, before)
    trainer.policy = tl.TrainAll()
    before = model.get_weights()
    trainer.fit([(BAD, Y)] * 2, verbose=0)
    assert_same(model, before)


class Two(layers.Layer):
    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, layers.Dense(4))

    def build(self, shape):
        self.p.build(shape)
        self.q.build(shape)

    def call(self, x):
        return self.q(self.p(x))


def test_the_same_paths_are_paired_whatever_the_order_of_construction():
    one, other = Two("pq"), Two("qp")
    for layer in (one, other):
        layer(X)

    class Copies(tl.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            self.follow(other, self.model, decay=0.0)
            return logs

    fit(one, data=[(X, X)], kind=Copies, optimizer="sgd")
    assert_same(other.p.kernel, one.p.kernel)
    assert_same(other.q.kernel, one.q.kernel)
