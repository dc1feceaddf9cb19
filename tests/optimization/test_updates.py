"""The verbs of a step: tape, update, gradients and apply; clipping; what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.compare import assert_close
from tests.support.fitting import moved, refused
from tests.support.models import trainer_of
from tests.support.params import params
from tests.support.steps import InTurn, OneUpdate

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


def by_hand():
    """The gradients of a plain tape, and their norm."""
    model, (x, y) = quiet_model(), batch()
    with tf.GradientTape() as tape:
        loss = models.cross_entropy()(y, model(x))
    return [gradient.numpy() for gradient in tape.gradient(loss, model.trainable_variables)]


def norm_of(gradients):
    return float(np.sqrt(sum((g**2).sum() for g in gradients)))


def applied(trainer_type=tl.Trainer, policy=GROUPS, model=None, **options):
    """By how much one step with a rate of 1 moves each weight: the gradient that was applied."""
    model = model or quiet_model()
    before = model.get_weights()
    options.setdefault("optimizer", SGD)
    trainer_type(model, policy, loss=models.cross_entropy(), **options).fit([batch()], verbose=0)
    return [was - now for was, now in zip(before, model.get_weights())]


class BothGroups(OneUpdate):
    groups = ("base", "head")


HOW = pytest.mark.parametrize("how", [{}, {"microbatches": 4}, {"run_eagerly": True}], ids=str)


@pytest.mark.parametrize("kind", params([tl.Trainer, BothGroups], [tl.Trainer]))
@HOW
def test_clipping_is_to_one_norm_over_all_that_an_update_touches(kind, how):
    gradients = by_hand()
    for factor in (1 / 3, 3):
        expected = [min(factor, 1) * g for g in gradients]
        assert_close(applied(kind, clip_norm=factor * norm_of(gradients), **how), expected, atol=2e-6)


def test_clipping_by_group_leaves_other_groups_alone():
    base, head = by_hand()[:2], by_hand()[2:]
    found = applied(clip_norm={"head": norm_of(head) / 2})
    assert_close(found, [*base, *(g / 2 for g in head)], atol=2e-6)


class Apart(tl.Trainer):
    """Takes gradients and applies others: those of the head doubled, those of the base left out."""

    def changed(self, gradients):
        return {path: 2 * gradient for path, gradient in gradients.items() if path.startswith("head/")}

    def train_step(self, batch):
        with self.tape() as tape:
            loss = self.compute_loss(batch, training=True)
        self.apply(self.changed(self.gradients(tape, loss)))
        return {"loss": loss}


@HOW
def test_gradients_may_be_taken_and_applied_apart(how):
    gradients = by_hand()
    expected = [*(0 * g for g in gradients[:2]), *(2 * g for g in gradients[2:])]
    assert_close(applied(Apart, **how), expected, atol=2e-6)


def test_taken_apart_they_also_serve_a_model_that_is_built_by_its_first_batch():
    model = keras.Sequential([layers.Dense(3, name="head")])
    Apart(model, loss=models.cross_entropy(), optimizer="sgd").fit([batch()], verbose=0)
    assert model.built


def penalty(model, x):
    """A gradient penalty: of the gradient of the output by the inputs."""
    with tf.GradientTape() as inner:
        inner.watch(x)
        out = tf.reduce_sum(model(x, training=True))
    return tf.reduce_mean(inner.gradient(out, x) ** 2)


class Penalty(OneUpdate):
    def loss_of(self, batch):
        return penalty(self.model, batch[0])


def test_tapes_nest_for_second_order():
    model = quiet_model()
    kernels = model.trainable_variables[::2]  # no bias of the head, which the penalty does not depend on
    with tf.GradientTape() as tape:
        loss = penalty(model, tf.constant(batch()[0]))
    first, second = tape.gradient(loss, [kernel.value for kernel in kernels])
    expected = [first, np.zeros(5), second, np.zeros(3)]
    found = applied(Penalty, tl.TrainOnly("**/kernel"), model, optimizer=keras.optimizers.SGD(1.0))
    assert_close(found, expected, atol=2e-6)


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
    history = Watching(model, GROUPS, optimizer=SGD).fit([batch()], verbose=0).history
    assert history["by_input"] == [pytest.approx(expected, rel=1e-5)]


class Adversaries(InTurn):
    """A generator against a discriminator."""

    def loss_of(self, group, real):
        fake = self.model["generator"](tf.random.normal([tf.shape(real)[0], 2]), training=True)
        score = tf.reduce_mean(self.model["discriminator"](fake, training=True))
        return -score if group == "generator" else score - tf.reduce_mean(self.model["discriminator"](real))


def adversaries(*order, **options):
    """Two networks that their first batch builds, with an optimizer each."""
    networks = {
        "generator": keras.Sequential([layers.Dense(4), layers.BatchNormalization()]),
        "discriminator": keras.Sequential([layers.Dense(3, activation="tanh"), layers.Dense(1)]),
    }
    policy = tl.Groups({name: name for name in networks})
    optimizers = {"generator": "adam", "discriminator": keras.optimizers.SGD(0.01)}
    trainer = Adversaries(networks, policy, optimizer=optimizers, **options)
    trainer.order = order
    return trainer


def test_a_thousand_alternating_steps_make_one_trace():
    trainer = adversaries("discriminator", "generator")
    history = trainer.fit(tf.data.Dataset.from_tensors(np.ones((8, 4), "float32")).repeat(1000), verbose=0)
    assert list(history.history) == ["discriminator", "generator"]
    assert trainer.step == 1000
    assert trainer.trace_count == 1


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_steps_of_the_generator_leave_the_discriminator_bit_identical(options):
    trainer = adversaries("generator", **options)
    trainer.fit(np.ones((8, 4), "float32"), verbose=0)  # builds both, and else there was nothing to compare
    found = moved(trainer.model, lambda: trainer.fit(np.ones((160, 4), "float32"), batch_size=8, verbose=0))
    assert {path.split("/")[0] for path in found} == {"generator"}


class UsedTwice(OneUpdate):
    def update(self, tape, loss):
        super().update(tape, loss)
        super().update(tape, loss)


class OtherGroup(OneUpdate):
    groups = ("tail",)


def applying(change):
    """A kind of trainer that applies its gradients changed."""
    return type("Applying", (Apart,), {"changed": staticmethod(change)})


SHAPE = r"`apply` takes a tensor of the shape \(5, 3\) for `head/kernel`. Received: "


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (UsedTwice, RuntimeError, r"The tape of 4 variables was used before.*`self.tape\(..., persistent=True\)`"),
        (
            OtherGroup,
            tl.PolicyError,
            r"`tape` was asked for the groups \['tail'\], but the policy Groups\(.* has the groups \['base', 'head'\]",
        ),
        (
            applying(lambda gradients: {"tail/kernel": gradients["head/kernel"]}),
            tl.PolicyError,
            r"`apply` was given gradients for \['tail/kernel'\], which do not train. What trains is \['base/dense/",
        ),
        (applying(lambda gradients: {"head/kernel": gradients["head/bias"]}), ValueError, SHAPE),
        (applying(lambda gradients: {"head/kernel": None}), ValueError, f"{SHAPE}None"),
        (applying(lambda gradients: list(gradients.values())), TypeError, r"gradients by the paths .*Received: \["),
    ],
)
def test_what_a_step_may_not_do(kind, error, text):
    model = quiet_model()
    with refused(model, error, text):
        applied(kind, model=model)


@pytest.mark.parametrize("verb", ["update", "gradients", "apply"])
def test_verbs_outside_of_a_step_that_trains(verb):
    arguments = ({},) if verb == "apply" else (None, None)
    with pytest.raises(RuntimeError, match=rf"`{verb}` was called outside a step that trains"):
        getattr(trainer_of(), verb)(*arguments)

    class Evaluating(tl.Trainer):
        def eval_step(self, batch):
            return getattr(self, verb)(*arguments)

    with pytest.raises(RuntimeError, match=rf"`{verb}` was called outside a step that trains"):
        Evaluating(quiet_model()).evaluate([batch()], verbose=0)


def test_a_tied_variable_has_one_gradient():
    class Twice(tl.Trainer):
        def train_step(self, batch):
            with self.tape() as tape:
                loss = self.compute_loss(batch, training=True)
            (gradient, *_) = self.gradients(tape, loss).values()
            self.apply(dict.fromkeys(self.selection.trained[0].paths, gradient))
            return {"loss": loss}

    shared = keras.layers.Dense(4, use_bias=False)
    model = keras.Sequential([keras.Input((4,)), shared])
    trainer = Twice({"one": model, "other": keras.Sequential([keras.Input((4,)), shared])}, loss="mse")
    trainer.forward = lambda inputs, training: model(inputs)
    with pytest.raises(
        ValueError, match=r"several gradients for one variable, under \('one/.*', 'other/.*'\). Add them"
    ):
        trainer.train_on_batch(np.ones((2, 4)), np.ones((2, 4)))
