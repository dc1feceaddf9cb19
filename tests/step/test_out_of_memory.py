"""`microbatches="auto"`: more and smaller pieces when memory runs out, and nothing moved twice."""

import keras
import pytest
import tensorflow as tf

from tests.support import models
from tests.support.inspect import iterations
from tests.support.models import network, trainer_of

layers = keras.layers


def allocated(much, value):
    """The largest of many copies of a value: far more of them than any memory holds, if `much`."""
    return tf.reduce_max(tf.fill([tf.where(much, tf.constant(2**48, tf.int64), 1)], value))


def refused(much, value):
    """The same without the ten seconds that TensorFlow waits for memory before it gives up."""

    def refuse(much, value):
        if much:
            raise MemoryError
        return value

    return tf.ensure_shape(tf.py_function(refuse, [much, value], value.dtype), ())


class Hungry(layers.Layer):
    """Asks for more memory than there is when it sees more than `limit` examples; counts its calls."""

    def __init__(self, limit, ask):
        super().__init__(name="hungry")
        self.limit = limit
        self.ask = ask
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs + tf.stop_gradient(0 * self.ask(tf.shape(inputs)[0] > self.limit, inputs[0, 0]))


def hungry(limit, ask=refused):
    keras.utils.set_random_seed(0)
    before = [keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(8, name="hidden")]
    return keras.Sequential([*before, Hungry(limit, ask), layers.Dense(3, name="head")])


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_auto_doubles_until_a_step_fits_and_nothing_moves_twice(options, caplog):
    batches = [models.images(16), models.images(24)]
    auto, known = (
        trainer_of(hungry(4), optimizer="adam", microbatches=count, metrics=["accuracy"], **options)
        for count in ("auto", 4)
    )
    history = auto.fit([batches[0]] * 3, verbose=0).history
    assert auto.microbatches == 4
    assert [record.getMessage() for record in caplog.records if record.name == "tapeloop"] == [
        "Out of memory with microbatches=1: going on with microbatches=2.",
        "Out of memory with microbatches=2: going on with microbatches=4.",
    ]
    assert known.fit([batches[0]] * 3, verbose=0).history == history
    assert models.values(auto.model) == models.values(known.model)
    assert auto.step == 3
    auto.fit([models.images(3)], verbose=0)  # fewer examples than pieces: one each
    auto.fit([batches[1]], verbose=0)
    assert auto.microbatches == 8


def test_auto_notices_when_the_device_itself_is_out_of_memory():
    auto = trainer_of(hungry(4, allocated), microbatches="auto")
    auto.fit([models.images(8)], verbose=0)
    assert auto.microbatches == 2


def test_auto_gives_up_at_one_example():
    with pytest.raises(RuntimeError, match=r"ran out of memory with one example at a time, 4 micro-batches of a batch"):
        trainer_of(hungry(0), microbatches="auto").fit([models.images(4)], verbose=0)


class Late(keras.optimizers.SGD):
    """Runs out of memory while it updates."""

    def update_step(self, gradient, variable, learning_rate):
        much = refused(tf.norm(gradient) >= 0, tf.norm(gradient))
        super().update_step(gradient + 0 * much, variable, learning_rate)


def test_running_out_while_variables_are_updated_leaves_them_as_they_were():
    trainer = trainer_of(network(), optimizer=Late(0.1), microbatches="auto", ema=0.9)
    before = models.values(trainer.model)
    with pytest.raises(RuntimeError, match=r"ran out of memory with one example at a time, 4 micro-batches of a batch"):
        trainer.fit([models.images(4)], verbose=0)
    assert models.values(trainer.model) == before
    assert iterations(trainer) == [0]
    assert trainer.step == 0


def test_what_fits_on_trial_goes_on_in_the_graph_and_is_found_anew_by_the_next_fit():
    batch = models.images(16)
    trainer = trainer_of(hungry(4), microbatches="auto")
    trainer.fit([batch] * 3, verbose=0)
    assert (trainer.microbatches, trainer.step) == (4, 3)
    with pytest.raises(tf.errors.ResourceExhaustedError):  # in the loop nothing is put aside that could be put back
        trainer.fit([batch, models.images(24)], verbose=0)
    trainer.fit([models.images(24)], verbose=0)
    assert trainer.microbatches == 8


def test_a_number_that_is_known_does_not_change():
    with pytest.raises(tf.errors.ResourceExhaustedError):
        trainer_of(hungry(4), microbatches=2).fit([models.images(16)], verbose=0)


def test_what_a_layer_keeps_in_a_closure_does_not_move_twice():
    seen = models.Seen()
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), seen, Hungry(4, refused), layers.Dense(3)])
    trainer = trainer_of(model, microbatches="auto")
    trainer.fit([models.images(16)], verbose=0)
    assert trainer.microbatches == 4
    assert int(seen.count()) == 4  # once a piece, and not in the trials that ran out
