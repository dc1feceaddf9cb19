"""What the user assigns in a step happens, and `follow` moves one submodel towards another."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl

layers = keras.layers
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
HOW = [{}, {"run_eagerly": True}, {"microbatches": 2}, {"nonfinite": "skip"}, {"nonfinite": "ignore"}]


def network(name):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)],
        name=name,
    )


def twins():
    online, target = network("online"), network("target")
    target.set_weights(online.get_weights())
    return {"online": online, "target": target}


class Following(tl.Trainer):
    """Trains `online`, which `target` follows."""

    decay = 0.5

    def compute_loss(self, batch, training):
        x, y = batch
        goal = self.model["target"](x, training=False)
        return tf.reduce_mean((self.model["online"](x, training=training) - y - tf.stop_gradient(goal)) ** 2)

    def train_step(self, batch):
        logs = super().train_step(batch)
        self.follow("target", "online", decay=self.decay)
        return logs


def fit_step_by_step(trainer, batches):
    """The weights of both models after each step."""
    seen = []
    for batch in batches:
        trainer.fit([batch], progress="none")
        seen.append([trainer.model[name].get_weights() for name in ("online", "target")])
    return seen


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_target_follows_by_polyak_averaging(how):
    models = twins()
    trainer = Following(models, tl.Freeze("target"), optimizer=keras.optimizers.SGD(0.1), **how)
    expected = models["target"].get_weights()
    for online, target in fit_step_by_step(trainer, [(X, Y)] * 3):
        expected = [np.float32(0.5) * kept + np.float32(0.5) * new for kept, new in zip(expected, online)]
        for mine, theirs in zip(target, expected):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)
    assert trainer.trace_count <= 1


@pytest.mark.parametrize("decay", [0.0, 0, 1.0, tf.constant(0.0)], ids=str)
def test_decay_zero_is_a_copy_and_one_stands_still(decay):
    models = twins()
    before = models["target"].get_weights()
    trainer = Following(models, tl.Freeze("target"), optimizer=keras.optimizers.SGD(0.1))
    trainer.decay = decay
    trainer.fit([(X, Y)] * 2, progress="none")
    expected = before if float(decay) == 1.0 else models["online"].get_weights()
    for mine, theirs in zip(models["target"].get_weights(), expected):
        np.testing.assert_array_equal(mine, theirs)


def test_the_decay_may_change_with_the_step():
    class Warming(Following):
        def train_step(self, batch):
            logs = tl.Trainer.train_step(self, batch)
            self.follow("target", "online", decay=tf.where(self.step < 1, 0.0, 1.0))
            return logs

    models = twins()
    trainer = Warming(models, tl.Freeze("target"), optimizer=keras.optimizers.SGD(0.1))
    first, second = fit_step_by_step(trainer, [(X, Y)] * 2)
    np.testing.assert_array_equal(first[1][0], first[0][0])
    np.testing.assert_array_equal(second[1][0], first[1][0])


ASSIGN = {
    "assign": lambda variable: variable.assign(variable * 0.0 + 7.0),
    "assign_add": lambda variable: variable.assign_add(variable * 0.0 + 7.0),
    "value": lambda variable: variable.value.assign(variable.value * 0.0 + 7.0),
}


@pytest.mark.parametrize("verb", ASSIGN)
@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("where", ["before", "after", "eval"])
def test_what_the_user_assigns_to_a_frozen_variable_happens(verb, eagerly, where):
    model = network("net")
    kernel = model.layers[0].kernel

    class Assigning(tl.Trainer):
        def train_step(self, batch):
            if where == "before":
                ASSIGN[verb](kernel)
            logs = super().train_step(batch)
            if where == "after":
                ASSIGN[verb](kernel)
            return logs

        def eval_step(self, batch):
            ASSIGN[verb](kernel)
            return super().eval_step(batch)

    trainer = Assigning(model, tl.TrainOnly(model.layers[-1]), loss="mse", run_eagerly=eagerly)
    before = kernel.numpy()
    if where == "eval":
        trainer.evaluate([(X, Y)], progress="none")
    else:
        trainer.fit([(X, Y)], progress="none")
    added = before if verb == "assign_add" else 0.0
    np.testing.assert_allclose(kernel.numpy(), added + np.full_like(before, 7.0), rtol=1e-6)


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"nonfinite": "skip"}, {"microbatches": 2}], ids=str)
@pytest.mark.parametrize("outside", [False, True])
def test_it_is_undone_with_a_bad_step(how, outside):
    models = twins()
    kept = models if not outside else {"online": models["online"]}
    target = models["target"]

    class Guarded(tl.Trainer):
        def train_step(self, batch):
            x, y = batch
            with self.tape() as tape:
                loss = tf.reduce_mean((self.model["online"](x, training=True) - y) ** 2)
            self.update(tape, loss)
            self.follow(target, self.model["online"], decay=0.5)
            target.layers[0].bias.assign_add(tf.ones(5))
            return {"loss": loss}

    policy = tl.TrainAll() if outside else tl.Freeze("target")
    trainer = Guarded(kept, policy, optimizer=keras.optimizers.SGD(0.1), **how)
    trainer.target = target
    trainer.fit([(X, Y)], progress="none")
    before = target.get_weights()
    bad = np.full_like(X, np.nan)
    if how.get("nonfinite") == "skip":
        trainer.fit([(bad, Y)], progress="none")
    else:
        with pytest.raises(tl.NonFiniteError):
            trainer.fit([(bad, Y)], progress="none")
    for mine, theirs in zip(target.get_weights(), before):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("sync", ["follow", "every tenth step", "between fits", "in a closure"])
def test_a_target_beside_the_model_is_not_warned_of(sync):
    online, target = network("online"), network("target")

    class Dqn(tl.Trainer):
        def train_step(self, batch):
            x, y = batch
            network = target if sync == "in a closure" else self.target
            goal = y + 0.9 * network(x, training=False)
            with self.tape() as tape:
                loss = tf.reduce_mean((self.model(x, training=True) - goal) ** 2)
            self.update(tape, loss)
            if sync in ("follow", "in a closure"):
                self.follow(network, self.model, decay=0.9)
            elif sync == "every tenth step":
                self._sync(network)
            return {"loss": loss}

        def _sync(self, network):
            if self.step % 10 == 0:
                for old, new in zip(network.trainable_variables, self.model.trainable_variables):
                    old.assign(new)

    trainer = Dqn(online, optimizer="sgd")
    trainer.target = target
    trainer.fit([(X, Y)] * 2, progress="none")  # a warning would be an error


def test_a_layer_beside_the_model_that_looks_as_if_it_trained_is_warned_of():
    class Projects(tl.Trainer):
        def compute_loss(self, batch, training):
            return tf.reduce_mean((self.head(self.model(batch[0], training=training)) - batch[1]) ** 2)

    trainer = Projects(network("online"), optimizer="sgd")
    trainer.head = layers.Dense(3)
    trainer.head.build((None, 3))
    with pytest.warns(UserWarning, match="uses 2 variables that the model does not track"):
        trainer.fit([(X, Y)], progress="none")


def test_what_is_assigned_is_moving_for_the_frontier():
    inputs = keras.Input((4,))
    base = keras.Sequential([keras.Input((4,)), layers.Dense(5), layers.Dense(5, name="perturbed")], name="base")
    model = keras.Model(inputs, layers.Dense(3, name="head")(base(inputs)))

    class Perturbs(tl.Trainer):
        def train_step(self, batch):
            self.model.get_layer("base").get_layer("perturbed").bias.assign_add(tf.ones(5))
            return super().train_step(batch)

    assert tl.Trainer(model, tl.Freeze("base"), loss="mse").frontier((X, Y)).submodels == ("base",)
    assert tl.Trainer(model, tl.Freeze("base"), loss="mse").frontier((X, Y)).bytes_per_example < 40
    found = Perturbs(model, tl.Freeze("base"), loss="mse").frontier((X, Y))
    assert "base" not in found.submodels


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda self: self.follow("target", "onlin", decay=0.5),
            ValueError,
            r"no submodel at the path 'onlin'. There are",
        ),
        (lambda self: self.follow("target", 3, decay=0.5), TypeError, r"`source` must be a submodel or its path"),
        (lambda self: self.follow("online", "online", decay=0.5), ValueError, r"one submodel as target and as source"),
        (lambda self: self.follow("target", "online", decay=1.5), ValueError, r"`decay` must be a number from 0 to 1"),
        (lambda self: self.follow("target", "online", decay="x"), ValueError, r"`decay` must be a number from 0 to 1"),
        (
            lambda self: self.follow("target", self.model["online"].layers[0], decay=0.5),
            ValueError,
            r"Received: 8 variables to move and 2 to move towards.*`keras.models.clone_model`",
        ),
        (
            lambda self: self.follow(layers.Dense(3), self.model["online"].layers[0], decay=0.5),
            ValueError,
            r"Received: 0 variables to move",
        ),
    ],
)
def test_what_cannot_follow(call, error, text):
    class Wrong(Following):
        def train_step(self, batch):
            call(self)
            return super().train_step(batch)

    models = twins()
    before = models["online"].get_weights()
    with pytest.raises(error, match=text):
        Wrong(models, tl.Freeze("target"), optimizer="sgd").fit([(X, Y)], progress="none")
    for mine, theirs in zip(models["online"].get_weights(), before):
        np.testing.assert_array_equal(mine, theirs)


def test_follow_belongs_in_a_step():
    trainer = Following(twins(), tl.Freeze("target"), optimizer="sgd")
    with pytest.raises(RuntimeError, match="`follow` was called outside a step"):
        trainer.follow("target", "online", decay=0.5)


def test_with_micro_batches_it_cannot_stand_in_a_branch():
    class Branches(Following):
        def train_step(self, batch):
            logs = tl.Trainer.train_step(self, batch)
            if self.step >= 0:
                self.follow("target", "online", decay=0.5)
            return logs

    with pytest.raises(RuntimeError, match=r"`follow` in a branch or a loop .* cannot wait"):
        Branches(twins(), tl.Freeze("target"), optimizer="sgd", microbatches=2).fit([(X, Y)], progress="none")


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
    trainer = tl.Trainer(model, tl.Freeze("sliced"), loss="mse", run_eagerly=eagerly, nonfinite="skip")
    before = model.get_layer("sliced").w.numpy()
    trainer.fit([(X, Y)] * 2, progress="none")
    np.testing.assert_array_equal(model.get_layer("sliced").w, before)
    trainer.policy = tl.TrainAll()
    before = [value.copy() for value in model.get_weights()]
    trainer.fit([(np.full_like(X, np.nan), Y)] * 2, progress="none")
    for mine, theirs in zip(model.get_weights(), before):
        np.testing.assert_array_equal(mine, theirs)


def test_the_same_paths_are_paired_whatever_the_order_of_construction():
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

    one, other = Two("pq"), Two("qp")
    for layer in (one, other):
        layer(X)

    class Copies(tl.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            self.follow(other, self.model, decay=0.0)
            return logs

    trainer = Copies(one, loss="mse", optimizer="sgd")
    trainer.fit([(X, X)], progress="none")
    np.testing.assert_array_equal(other.p.kernel, one.p.kernel)
    np.testing.assert_array_equal(other.q.kernel, one.q.kernel)


def test_run_eagerly_a_bad_step_is_undone_wherever_its_variables_are_kept():
    target, count = network("target"), tf.Variable(0.0)

    class Closure(tl.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            self.follow(target, self.model, decay=0.5)
            count.assign_add(1.0)
            return logs

    trainer = Closure(network("online"), loss="mse", run_eagerly=True, nonfinite="skip")
    before = target.get_weights()
    trainer.fit([(np.full_like(X, np.nan), Y)], progress="none")
    assert float(count) == 0.0
    for mine, theirs in zip(target.get_weights(), before):
        np.testing.assert_array_equal(mine, theirs)
