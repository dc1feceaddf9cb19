"""How data ends: on its own, by an error, by being left."""

import gc
import weakref

import keras
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.models import trainer_of
from tests.support.streams import X, Y, breaking, from_pydataset, network, trainer_on

layers = keras.layers


def test_an_error_that_ends_python_is_not_hidden():
    for error in (SystemExit(3), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised:
            trainer_on(breaking(2, error))
        assert raised.value is error


def test_a_stop_iteration_in_a_pydataset_is_an_error_and_no_end():
    for options in ({}, {"workers": 2}):
        with pytest.raises(RuntimeError, match="StopIteration"):
            trainer_on(from_pydataset(3, StopIteration(), **options))


def test_an_iterable_that_is_left_is_closed_and_let_go():
    closed = []

    class Closing:
        def __iter__(self):
            try:
                yield from [(X, Y)] * 20
            finally:
                closed.append(True)

    trainer = trainer_of(network(), optimizer="sgd")
    source = Closing()
    trainer.fit(source, steps_per_epoch=2, verbose=0)
    trainer.fit(source, verbose=0)
    trainer.evaluate(source, steps=2, verbose=0)
    trainer.predict(source, steps=2)
    gone = weakref.ref(source)
    del source
    gc.collect()
    assert len(closed) == 4
    assert gone() is None


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_evaluation_takes_no_more_than_its_steps_from_an_iterator(verb):
    data = iter([(X, Y)] * 5)
    quiet = {} if verb == "predict" else {"verbose": 0}
    getattr(trainer_of(network()), verb)(data, steps=2, **quiet)
    assert len(list(data)) == 3


def test_data_that_runs_out_says_after_how_many_batches():
    with pytest.raises(tl.DataError, match=r"`x` ended after 5 batches, and more were asked for"):
        trainer_of(network()).fit(iter([(X, Y)] * 5), steps_per_epoch=3, epochs=2, verbose=0)


def test_a_dataset_over_what_lasts_once_loses_nothing():
    specs = (tf.TensorSpec([None, 5]), tf.TensorSpec([None], tf.int64))
    once = iter([(X, Y)] * 5)
    data = tf.data.Dataset.from_generator(lambda: once, output_signature=specs)
    trainer = trainer_of(keras.Sequential([layers.Dense(3)]))
    trainer.fit(data, verbose=0)
    assert trainer.step == 5


@pytest.mark.parametrize("known", [True, False])
def test_an_end_that_a_step_reports_is_an_error(known):
    class Reading(tl.Trainer):
        def train_step(self, batch):
            return {**super().train_step(batch), "number": tf.cast(self.numbers.get_next(), tf.float32)}

    trainer = Reading(network(), loss="mse")
    trainer.numbers = iter(tf.data.Dataset.range(4))
    data = tf.data.Dataset.from_tensors((X, X[:, :3])).repeat(5)
    with pytest.raises(tf.errors.OutOfRangeError):
        trainer.fit(data if known else data.filter(lambda x, y: True), verbose=0)
    assert trainer.step == 4


def test_a_batch_of_unknown_shape_is_said():
    data = tf.data.Dataset.from_generator(lambda: [(X, Y)], output_types=(tf.float32, tf.int64))
    with pytest.raises(tl.DataError, match="of unknown shape, float32"):
        trainer_on(data)


HALF = len(X) // 2
ONCE = {
    "arrays": (X, Y),
    "a list": [(X[:HALF], Y[:HALF]), (X[HALF:], Y[HALF:])],
    "a dataset": tf.data.Dataset.from_tensor_slices((X, Y)).batch(HALF),
    "a dataset of unknown size": tf.data.Dataset.from_tensor_slices((X, Y)).batch(HALF).filter(lambda x, y: True),
}


@pytest.mark.parametrize("data", ONCE.values(), ids=ONCE.keys())
def test_an_evaluation_ends_with_the_data_and_counts_no_example_twice(data, caplog):
    trainer = trainer_of(network())
    size = {"batch_size": HALF} if isinstance(data, tuple) else {}
    whole = trainer.evaluate(data, **size, verbose=0)
    assert trainer.evaluate(data, steps=5, **size, verbose=0) == pytest.approx(whole)
    assert "`x` ends after 2 batches, and 5 were asked for." in caplog.messages
    assert len(trainer.predict(data, steps=5, **size)) == len(X)
    logs = trainer.fit(X, Y, validation_data=data, validation_steps=5, validation_batch_size=HALF, verbose=0).history
    again = trainer.evaluate(data, **size, verbose=0)
    assert logs["val_loss"] == pytest.approx([again["loss"]])
    assert "`validation_data` ends after 2 batches, and 5 were asked for." in caplog.messages
