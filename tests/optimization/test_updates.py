"""The verbs of a step: tape, update, gradients and apply; clipping; what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.models import trainer_of

layers = keras.layers
GROUPS = tl.Groups({"base": "base", "head": "head"})
SGD = {"base": keras.optimizers.SGD(1.0), "head": keras.optimizers.SGD(1.0)}


def quiet_model():
    """A base and a head of dense layers, with nothing random or stateful in them."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh", name="dense")], name="base")
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, name="head")(base(inputs)))


def batch():
    generator = np.random.default_rng(0)
    return generator.normal(size=(16, 4)).astype("float32"), generator.integers(0, 3, 16)


def by_hand(model, factor=1.0):
    """The gradient of a plain tape, by path."""
    x, y = batch()
    weights = {v.path.replace("sequential/", ""): v for v in model.trainable_variables}
    with tf.GradientTape() as tape:
        loss = factor * models.cross_entropy()(y, model(x))
    return [g.numpy() for g in tape.gradient(loss, list(weights.values()))]


def moved(trainer_type=tl.Trainer, policy=GROUPS, model=None, **options):
    """By how much one step with a rate of 1 moves each weight: the gradient that was applied."""
    model = model or quiet_model()
    before = model.get_weights()
    options.setdefault("optimizer", SGD)
    trainer_type(model, policy, loss=models.cross_entropy(), **options).fit([batch()], progress="none")
    return [was - now for was, now in zip(before, model.get_weights())]


def assert_close(mine, its):
    for one, other in zip(mine, its):
        np.testing.assert_allclose(one, other, atol=2e-6)


class TwoTapes(tl.Trainer):
    def train_step(self, batch):
        x, y = batch
        with self.tape("base", "head") as tape:
            loss = models.cross_entropy()(y, self.model(x, training=True))
        self.update(tape, loss)
        return {"loss": loss}


@pytest.mark.parametrize("kind", [tl.Trainer, TwoTapes])
@pytest.mark.parametrize("options", [{}, {"microbatches": 4}, {"run_eagerly": True}], ids=str)
def test_clipping_is_to_one_norm_over_all_that_an_update_touches(kind, options):
    gradients = by_hand(quiet_model())
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    assert_close(moved(kind, clip_norm=float(norm / 3), **options), [g / 3 for g in gradients])
    assert_close(moved(kind, clip_norm=float(norm * 3), **options), gradients)


def test_clipping_by_group_leaves_other_groups_alone():
    gradients = by_hand(quiet_model())
    norm = np.sqrt(sum((g**2).sum() for g in gradients[2:]))
    expected = [*gradients[:2], *(g / 2 for g in gradients[2:])]
    assert_close(moved(clip_norm={"head": float(norm / 2)}), expected)


class Apart(tl.Trainer):
    """Takes gradients and applies others: those of the head doubled, those of the base left out."""

    def train_step(self, batch):
        x, y = batch
        with self.tape() as tape:
            loss = models.cross_entropy()(y, self.model(x, training=True))
        gradients = self.gradients(tape, loss)
        self.apply({path: 2 * gradient for path, gradient in gradients.items() if path.startswith("head/")})
        return {"loss": loss}


@pytest.mark.parametrize("options", [{}, {"microbatches": 4}, {"run_eagerly": True}], ids=str)
def test_gradients_may_be_taken_and_applied_apart(options):
    gradients = by_hand(quiet_model())
    assert_close(moved(Apart, **options), [*(0 * g for g in gradients[:2]), *(2 * g for g in gradients[2:])])


def test_taken_apart_they_also_serve_a_model_that_is_built_by_its_first_batch():
    model = keras.Sequential([layers.Dense(3, name="head")])
    Apart(model, loss=models.cross_entropy(), optimizer="sgd").fit([batch()], progress="none")
    assert model.built


class Penalty(tl.Trainer):
    """A gradient penalty: the gradient of the output by the inputs, differentiated again."""

    def train_step(self, batch):
        x, _ = batch
        with self.tape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                out = tf.reduce_sum(self.model(x, training=True))
            loss = tf.reduce_mean(inner.gradient(out, x) ** 2)
        self.update(tape, loss)
        return {"loss": loss}


def penalized(model):
    x = tf.constant(batch()[0])
    with tf.GradientTape() as tape:
        with tf.GradientTape() as inner:
            inner.watch(x)
            out = tf.reduce_sum(model(x))
        loss = tf.reduce_mean(inner.gradient(out, x) ** 2)
    zero = tf.UnconnectedGradients.ZERO
    found = tape.gradient(loss, [v.value for v in model.trainable_variables], unconnected_gradients=zero)
    return [g.numpy() for g in found]


def test_tapes_nest_for_second_order():
    model = quiet_model()
    expected = penalized(model)
    policy = tl.TrainOnly("**/kernel")  # no bias of the head, which the penalty does not depend on
    kernels = [expected[0], 0 * expected[1], expected[2], 0 * expected[3]]
    assert_close(moved(Penalty, policy, model, optimizer=keras.optimizers.SGD(1.0)), kernels)


class Watching(tl.Trainer):
    """The tape of the trainer's own watches an input too, and lasts."""

    def train_step(self, batch):
        x, y = batch
        with self.tape("head", persistent=True) as tape:
            tape.watch(x)
            loss = models.cross_entropy()(y, self.model(x, training=True))
        by_input = tape.gradient(loss, x)
        self.update(tape, loss)
        return {"loss": loss, "by_input": tf.norm(by_input)}


def test_a_tape_may_watch_inputs_and_last():
    model = quiet_model()
    x, y = map(tf.constant, batch())
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = models.cross_entropy()(y, model(x))
    expected = float(tf.norm(tape.gradient(loss, x)))
    history = Watching(model, GROUPS, optimizer=SGD).fit([batch()], progress="none").history
    assert history["by_input"] == [pytest.approx(expected, rel=1e-5)]


class Alternating(tl.Trainer):
    """A generator against a discriminator; each is updated by itself."""

    def train_step(self, real):
        generator, discriminator = self.model["generator"], self.model["discriminator"]
        noise = tf.random.normal([tf.shape(real)[0], 2])
        with self.tape("discriminator") as tape:
            fake = generator(noise, training=True)
            d_loss = tf.reduce_mean(discriminator(fake, training=True) - discriminator(real, training=True))
        if self.trains_discriminator:
            self.update(tape, d_loss)
        with self.tape("generator") as tape:
            g_loss = -tf.reduce_mean(discriminator(generator(noise, training=True), training=True))
        self.update(tape, g_loss)
        return {"d_loss": d_loss, "g_loss": g_loss}


def adversaries(trains_discriminator, **options):
    networks = {
        "generator": keras.Sequential([keras.Input((2,)), layers.Dense(4), layers.BatchNormalization()]),
        "discriminator": keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="tanh"), layers.Dense(1)]),
    }
    policy = tl.Groups({"generator": "generator", "discriminator": "discriminator"})
    trainer = Alternating(networks, policy, optimizer="adam", **options)
    trainer.trains_discriminator = trains_discriminator
    return trainer


def test_a_thousand_alternating_steps_make_one_trace():
    trainer = adversaries(True)
    trainer.fit(tf.data.Dataset.from_tensors(np.ones((8, 4), "float32")).repeat(1000), progress="none")
    assert trainer.step == 1000
    assert trainer.trace_count == 1


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_steps_of_the_generator_leave_the_discriminator_bit_identical(options):
    trainer = adversaries(False, **options)
    before = models.values(trainer.model)
    trainer.fit([np.ones((8, 4), "float32")] * 20, progress="none")
    after = models.values(trainer.model)
    assert all(after[path] == before[path] for path in before if path.startswith("discriminator"))
    assert any(after[path] != before[path] for path in before if path.startswith("generator"))


def step_of(body):
    """A trainer whose step is `body`."""

    class Custom(tl.Trainer):
        def train_step(self, batch):
            return body(self, *batch)

    return Custom(quiet_model(), GROUPS, loss=models.cross_entropy(), optimizer=SGD)


def loss_of(trainer, x, y):
    return models.cross_entropy()(y, trainer.model(x, training=True))


def used_twice(trainer, x, y):
    with trainer.tape() as tape:
        loss = loss_of(trainer, x, y)
    trainer.update(tape, loss)
    trainer.update(tape, loss)


def applies(change):
    def body(trainer, x, y):
        with trainer.tape() as tape:
            loss = loss_of(trainer, x, y)
        trainer.apply(change(trainer.gradients(tape, loss)))
        return {}

    return body


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (used_twice, RuntimeError, r"The tape of 4 variables was used before.*`self.tape\(..., persistent=True\)`"),
        (
            lambda trainer, x, y: trainer.tape("tail"),
            tl.PolicyError,
            r"asked for the groups \['tail'\], but the policy .* has the groups \['base', 'head'\]",
        ),
        (
            applies(lambda gradients: {"tail/kernel": gradients["head/kernel"]}),
            tl.PolicyError,
            r"`apply` was given gradients for \['tail/kernel'\], which do not train. What trains is \['base/dense/",
        ),
        (
            applies(lambda gradients: {"head/kernel": gradients["head/bias"]}),
            ValueError,
            r"`apply` takes a tensor of the shape \(5, 3\) for `head/kernel`. Received: ",
        ),
        (
            applies(lambda gradients: {"head/kernel": None}),
            ValueError,
            r"`apply` takes a tensor of the shape \(5, 3\) for `head/kernel`. Received: None",
        ),
    ],
)
def test_what_a_step_may_not_do(body, error, text):
    trainer = step_of(body)
    before = models.values(trainer.model)
    with pytest.raises(error, match=text):
        trainer.fit([batch()], progress="none")
    assert models.values(trainer.model) == before


@pytest.mark.parametrize("verb", ["update", "gradients", "apply"])
def test_verbs_outside_of_a_step_that_trains(verb):
    arguments = ({},) if verb == "apply" else (None, None)
    with pytest.raises(RuntimeError, match=rf"`{verb}` was called outside a step that trains"):
        getattr(trainer_of(), verb)(*arguments)

    class Evaluating(tl.Trainer):
        def eval_step(self, batch):
            return getattr(self, verb)(*arguments)

    with pytest.raises(RuntimeError, match=rf"`{verb}` was called outside a step that trains"):
        Evaluating(quiet_model()).evaluate([batch()], progress="none")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"clip_norm": 0}, ValueError, r"`clip_norm` must be above 0 and finite. Received: 0"),
        ({"clip_norm": float("nan")}, ValueError, r"`clip_norm` must be above 0 and finite"),
        ({"clip_norm": "1"}, TypeError, r"`clip_norm` must be a number, or one for each of some groups. Received: '1'"),
        ({"clip_norm": {"head": True}}, TypeError, r"`clip_norm` must be a number"),
        (
            {"clip_norm": {"tail": 1.0}},
            tl.PolicyError,
            r"`clip_norm` is for \['tail'\], but the groups are \['base', 'head'\]",
        ),
    ],
)
def test_wrong_norms(options, error, text):
    with pytest.raises(error, match=text):
        moved(**options)
