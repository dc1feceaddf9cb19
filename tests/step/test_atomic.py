"""A bad step changes nothing: skipping, raising, undoing."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.inspect import everything, live_ops
from tests.support.models import trainer_of

layers = keras.layers


def batches(count=100, bad=(), size=4):
    x, y = models.images(count * size)
    data = [(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(count)]
    for number in bad:
        data[number] = (np.full_like(data[number][0], np.nan), data[number][1])
    return data


def run(data, model=None, **options):
    keras.utils.set_random_seed(0)
    options.setdefault("metrics", ["accuracy"])
    options.setdefault("optimizer", keras.optimizers.AdamW(0.01))
    trainer = trainer_of((model or models.functional)(), ema=0.9, **options)
    history = trainer.fit(data, progress="none").history
    return trainer, history


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"run_eagerly": True}, {"clip_norm": 0.5}], ids=str)
def test_a_skipped_batch_might_as_well_not_have_been_there(options):
    count = 20 if "run_eagerly" in options else 100
    data = batches(count, bad=[count // 2])
    trainer, history = run(data, nonfinite="skip", **options)
    other, without = run(data[: count // 2] + data[count // 2 + 1 :], nonfinite="skip", **options)
    assert everything(trainer) == everything(other)
    assert trainer.step == count - 1
    assert history.pop("skipped_steps") == [1.0]
    assert without.pop("skipped_steps") == [0.0]
    assert history == without


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"run_eagerly": True}], ids=str)
def test_raising_leaves_all_as_after_the_step_before(options):
    count = 10 if "run_eagerly" in options else 50
    data = batches(2 * count, bad=[count])
    keras.utils.set_random_seed(0)
    trainer = trainer_of(models.functional(), ema=0.9, optimizer="adam", **options)
    with pytest.raises(tl.NonFiniteError, match=rf"At step {count}, epoch 0, .*not finite: .*`base/conv/kernel`") as e:
        trainer.fit(data, progress="none")
    assert e.value.step == count
    assert "base/conv/kernel" in e.value.paths
    keras.utils.set_random_seed(0)
    other = trainer_of(models.functional(), ema=0.9, optimizer="adam", **options)
    other.fit(data[:count], progress="none")
    assert everything(trainer) == everything(other)
    trainer.fit(data[:2], progress="none")  # it can go on
    other.fit(data[:2], progress="none")
    assert everything(trainer) == everything(other)


def test_a_first_batch_that_is_bad_leaves_a_model_that_was_never_trained():
    for options in ({}, {"run_eagerly": True}):
        trainer, history = run(batches(3, bad=[0]), nonfinite="skip", **options)
        other, without = run(batches(3)[1:], nonfinite="skip", **options)
        assert everything(trainer) == everything(other)
        assert history["accuracy"] == without["accuracy"]
        assert history["loss"] == without["loss"]


def test_too_many_in_a_row_raise_and_good_ones_between_start_anew():
    data = batches(9, bad=[0, 1, 3, 4, 6, 7])
    trainer, history = run(data, nonfinite="skip", max_skipped=2)
    assert history["skipped_steps"] == [6.0]
    assert trainer.step == 3
    with pytest.raises(tl.NonFiniteError, match=r"2 steps in a row were skipped before it, as many as may be"):
        run(batches(9, bad=[3, 4, 5]), nonfinite="skip", max_skipped=2)


def test_ignoring_looks_at_nothing_and_moves_everything():
    trainer, _ = run(batches(2, bad=[1]), nonfinite="ignore")
    assert np.isnan(trainer.model.get_layer("base").get_layer("conv").kernel.numpy()).all()
    assert trainer.step == 2
    assert "IsFinite" not in live_ops(trainer, batches(1)[0])
    assert "IsFinite" in live_ops(run(batches(1))[0], batches(1)[0])


class Pair(tl.Trainer):
    """Two networks, updated one after the other; the second loss is what the batch says."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.calls = tf.Variable(0, trainable=False)

    def train_step(self, batch):
        x, factor = batch
        self.calls.assign_add(1, read_value=False)
        with self.tape("first") as tape:
            first = tf.reduce_mean(self.model["first"](x, training=True) ** 2)
        self.update(tape, first)
        with self.tape("second") as tape:
            second = tf.reduce_mean(self.model["second"](x, training=True) ** 2) * tf.reduce_mean(factor)
        self.update(tape, second)
        return {"first": first}


def pair(**options):
    keras.utils.set_random_seed(0)
    network = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((3,)), layers.Dense(4, name="dense"), layers.BatchNormalization(name="bn")]
    )
    networks = {"first": network(), "second": network()}
    policy = tl.Groups({"first": "first", "second": "second"})
    return Pair(networks, policy, optimizer="adam", **options)


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"run_eagerly": True}], ids=str)
def test_an_update_that_came_before_the_bad_one_is_undone_with_it(options):
    good = (np.ones((4, 3), "float32"), np.ones(4, "float32"))
    bad = (good[0], np.full(4, np.inf, "float32"))
    trainer, other = pair(nonfinite="skip", **options), pair(nonfinite="skip", **options)
    history = trainer.fit([good, bad, good], progress="none").history
    without = other.fit([good, good], progress="none").history
    assert everything(trainer) == everything(other)
    assert history["first"] == without["first"]
    assert int(trainer.calls) == int(other.calls)
    with pytest.raises(tl.NonFiniteError, match=r"the loss is (inf|nan)") as error:
        pair(**options).fit([bad], progress="none")
    assert {path.split("/")[0] for path in error.value.paths} == {"second"}


class Sometimes(Pair):
    """Updates the second network in a branch that the graph takes in every other step."""

    def train_step(self, batch):
        x, factor = batch
        self.calls.assign_add(1)
        with self.tape("first") as tape:
            first = tf.reduce_mean(self.model["first"](x, training=True) ** 2)
        self.update(tape, first)
        if self.calls % 2 == 0:
            with self.tape("second") as tape:
                second = tf.reduce_mean(self.model["second"](x, training=True) ** 2) * tf.reduce_mean(factor)
            self.update(tape, second)
        return {"first": first}


def sometimes(**options):
    made = pair(**options)
    return Sometimes(made.model, made.policy, optimizer="adam", **options)


def test_an_update_in_a_branch_is_guarded_like_any_other():
    good = (np.ones((4, 3), "float32"), np.ones(4, "float32"))
    bad = (good[0], np.full(4, np.inf, "float32"))
    trainer = sometimes(nonfinite="skip")
    history = trainer.fit([good, bad, good, good], progress="none").history
    assert history["skipped_steps"] == [1.0]
    assert trainer.trace_count == 1
    assert trainer.step == 3
    other = sometimes(nonfinite="skip")
    other.fit([good, good, good], progress="none")
    assert everything(trainer) == everything(other)


def test_an_update_in_a_branch_cannot_wait_for_other_microbatches():
    good = (np.ones((4, 3), "float32"), np.ones(4, "float32"))
    with pytest.raises(RuntimeError, match=r"`update` in a branch or a loop .* `microbatches=1`, or move it out"):
        sometimes(microbatches=2).fit([good], progress="none")


class Shrinking(layers.Layer):
    """Assigns to its own trained weight when it is called, and to another value each time."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, inputs):
        self.kernel.assign(0.5 * self.kernel)
        return inputs @ self.kernel


def shrinking():
    return keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), Shrinking(name="shrinking")])


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_a_weight_that_the_forward_pass_itself_assigns_is_undone_too(options):
    trainer, _ = run(batches(4, bad=[2]), model=shrinking, nonfinite="skip", **options)
    other, _ = run([batch for number, batch in enumerate(batches(4)) if number != 2], model=shrinking, **options)
    assert everything(trainer) == everything(other)


def stateful():
    inputs = keras.Input((6, 6, 1), batch_size=4)
    x = layers.LSTM(4, stateful=True, name="lstm")(layers.Reshape((6, 6))(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_states_that_keras_does_not_track_are_undone_too(options):
    trainer, _ = run(batches(5, bad=[2]), model=stateful, nonfinite="skip", **options)
    other, _ = run([batch for number, batch in enumerate(batches(5)) if number != 2], model=stateful, **options)
    assert "lstm/states/0" in models.values(trainer.model)
    assert everything(trainer) == everything(other)


class Own(tl.Trainer):
    """Keeps a metric and a random state of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.metric = keras.metrics.Mean()
        self.random = tf.random.Generator.from_seed(1)

    def compute_loss(self, batch, training):
        loss = super().compute_loss(batch, training)
        self.metric.update_state(loss)
        return loss * self.random.uniform(())


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_what_a_subclass_keeps_is_undone_too(options):
    kept = []
    for data in (batches(4, bad=[1]), [batch for number, batch in enumerate(batches(4)) if number != 1]):
        keras.utils.set_random_seed(0)
        trainer = Own(models.functional(), loss=models.cross_entropy(), optimizer="sgd", nonfinite="skip", **options)
        trainer.fit(data, progress="none")
        kept.append((float(trainer.metric.result()), trainer.random.state.numpy().tolist(), everything(trainer)))
    assert kept[0] == kept[1]


def test_an_epoch_of_which_nothing_counts_is_logged_as_that():
    trainer = trainer_of(nonfinite="skip", metrics=["accuracy"])
    history = trainer.fit(batches(2, bad=[0, 1]), progress="none").history
    assert np.isnan(history["loss"] + history["accuracy"]).all()
    assert history["skipped_steps"] == [2.0]
    assert len(trainer.fit(batches(1), progress="none").history["loss"]) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nonfinite": "warn"}, r"`nonfinite` must be one of 'raise', 'skip', 'ignore'. Received: 'warn'"),
        ({"max_skipped": 0}, r"`max_skipped` must be a whole number, 1 or more. Received: 0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        trainer_of(**options)
