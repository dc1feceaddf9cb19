"""Python iterables: what they may give, how far they are read, and what happens when they fail."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.sampler import Sampler
from tests.support import models
from tests.support.models import trainer_of
from tests.support.params import params
from tests.support.streams import X, Y, breaking, from_pydataset, loader_of, network, trainer_on

layers = keras.layers


def test_batches_of_any_length_in_time_cost_a_trace_more_at_most():
    data = [(np.ones((4, length, 5), "float32"), Y) for length in (3, 3, 5, 4, 7, 3)]
    trainer = trainer_on(data, keras.Sequential([keras.Input((None, 5)), layers.GRU(4), layers.Dense(3)]))
    assert (trainer.step, trainer.trace_count) == (6, 2)
    trainer.fit(data, epochs=2, verbose=0)
    assert (trainer.step, trainer.trace_count) == (18, 2)


def test_batches_of_any_size_cost_one_trace():
    trainer = trainer_on([(X[:size], Y[:size]) for size in (4, 2, 3, 1, 4)])
    assert (trainer.step, trainer.trace_count) == (5, 1)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y, None),
        [X, Y],
        ({"a": X, "b": [X, X]}, Y),
        {"x": X, "y": Y, "more": [X, (Y, None)]},
        (tf.RaggedTensor.from_tensor(X), Y),
        (tf.sparse.from_dense(X), Y),
        (np.array(["a", "b", "c", "d"]), Y),
        (X > 0, X.astype("float16"), X.astype("int8")),
    ],
    ids=lambda batch: repr(type(batch).__name__),
)
def test_a_batch_arrives_as_it_was_given(batch):
    seen = []

    class Looking(tl.Trainer):
        def train_step(self, given):
            seen.append(tf.nest.map_structure(lambda value: None if value is None else value.dtype, given))
            with self.tape() as tape:
                loss = tf.reduce_sum(self.model(X))
            self.update(tape, loss)
            return {}

    trainer = Looking(network(), optimizer="sgd")
    trainer.fit([batch] * 3, verbose=0)
    assert trainer.step == 3
    as_given = tf.nest.map_structure(lambda value: None if value is None else tf.as_dtype(value.dtype), batch)
    assert seen == [as_given]


def good_then(bad, number=3):
    return [(X, Y)] * number + [bad] + [(X, Y)]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ((X,),
         r"^The structure changes at batch 3 of `x` \(the first is 0\): it is \(\*,\), those before it are \(\*,"),
        ((X, None), r"structure changes at batch 3 .* is \(\*, None\), those before it are \(\*, \*\)"),
        ({"x": X, "y": Y}, r"structure changes at batch 3 .* is \{'x': \*, 'y': \*\}"),
        ((X.astype("int32"), Y), r"types change at batch 3 of `x` .*: \(4, 5\) int32 where .* have float32"),
        ((np.ones((4, 6), "float32"), Y), r"At batch 3 of `x` .*: The inputs do not fit .* has the shape 4 6"),
        ((np.ones((4, 5, 2), "float32"), Y), r"At batch 3 of `x` .*: The inputs do not fit .* has \(None, 5, 2\)"),
        ((np.array([[1], "a"], object), Y), r"In batch 3 of `x`, ndarray of the dtype `object`"),
    ],
)  # fmt: skip
def test_bad_batches_are_named_and_nothing_is_lost(bad, text):
    trainer = trainer_of(network(), optimizer="sgd")
    with pytest.raises(tl.DataError, match=text):
        trainer.fit(good_then(bad), verbose=0)
    assert trainer.step == 3
    trainer.fit([(X, Y)], verbose=0)  # it can go on
    assert trainer.step == 4


class Broken(Exception):
    """The user's own."""


@pytest.mark.parametrize("steps_per_call", params([1, 2, "auto"], {2}))
@pytest.mark.parametrize("make", [breaking, from_pydataset], ids=lambda make: make.__name__)
def test_an_iterator_that_raises_raises_the_users_error_after_the_last_whole_step(make, steps_per_call):
    def trainer():
        keras.utils.set_random_seed(0)
        return trainer_of(models.functional(), optimizer="adam", steps_per_call=steps_per_call)

    error, batch = Broken("the disk is gone"), models.images(4)
    broken, whole = trainer(), trainer()
    with pytest.raises(Broken) as raised:
        broken.fit(make(5, error, batch), verbose=0, shuffle=False)
    assert raised.value is error
    assert any("batch 5 of `x` (the first is 0)" in note for note in error.__notes__)
    whole.fit([batch] * 5, verbose=0)
    for _ in range(2):  # the second time, both have gone on
        assert broken.step == whole.step
        assert models.values(broken.model) == models.values(whole.model)
        for each in (broken, whole):
            each.fit([batch] * 2, verbose=0)
    assert broken.step == 9


def test_a_dataset_that_raises_leaves_the_model_as_after_the_last_whole_step():
    def refuse(number):
        with tf.control_dependencies([tf.debugging.Assert(number < 5, ["five is too many"])]):
            return tf.ones((4, 5)), tf.zeros(4, tf.int64)

    trainer = trainer_of(network(), optimizer="adam")
    with pytest.raises(tf.errors.InvalidArgumentError, match="five is too many") as raised:
        trainer.fit(tf.data.Dataset.range(9).map(refuse), verbose=0)
    assert any("batch 5 of `x`" in note for note in raised.value.__notes__)
    assert trainer.step == 5


def test_shapes_that_only_the_running_step_can_see_are_named():
    data = tf.data.Dataset.from_generator(
        lambda: good_then((np.ones((4, 6), "float32"), Y)),
        output_signature=(tf.TensorSpec([None, None]), tf.TensorSpec([None], tf.int64)),
    )
    trainer = trainer_of(network(), optimizer="sgd")
    with pytest.raises(tl.DataError, match=r"At batch 3 of `x` .*: The inputs do not fit .* has the shape 4 6"):
        trainer.fit(data, verbose=0)
    assert trainer.step == 3


def test_an_iterator_gives_as_many_batches_as_are_asked_for_and_keeps_the_rest():
    numbers = itertools.count()
    data = ((X * next(numbers), Y) for _ in itertools.count())
    trainer = trainer_of(network(), optimizer="sgd")
    trainer.fit(data, steps_per_epoch=3, epochs=2, verbose=0)
    assert trainer.step == 6
    assert next(numbers) == 6
    trainer.fit(data, steps_per_epoch=1, verbose=0)
    assert next(numbers) == 8


class Numbered(keras.utils.PyDataset):
    ended = 0

    def on_epoch_end(self):
        self.ended += 1

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return np.array([index])


def two_epochs(loader):
    return [[int(batch[0]) for batch in loader] for _ in range(2)]


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"workers": 2, "use_multiprocessing": True}], ids=str)
def test_a_pydataset_gives_its_batches_in_order_and_is_told_of_each_end(options):
    data = Numbered(**options)
    loader = loader_of(data)
    assert loader.batches_per_epoch == 6
    assert two_epochs(loader) == [list(range(6))] * 2
    assert data.ended == 2


def test_a_pydataset_is_shuffled_by_the_seed():
    one, two = two_epochs(loader_of(Numbered(), Sampler(True, 1)))
    assert sorted(one) == sorted(two) == list(range(6))
    assert one != two
    assert two_epochs(loader_of(Numbered(), Sampler(True, 1))) == [one, two]


def test_an_error_in_a_worker_is_the_users():
    error = Broken("in a thread")
    with pytest.raises(Broken) as raised:
        trainer_on(from_pydataset(3, error, workers=2))
    assert raised.value is error


def test_a_step_that_fails_is_reported_though_the_data_fails_further_on():
    class Picky(keras.layers.Layer):
        def call(self, inputs):
            tf.debugging.assert_less(tf.reduce_max(inputs), 3.0, message="too large for the layer")
            return inputs

    def batches():
        for number in range(4):
            yield np.full((2, 3), number, "float32"), np.zeros((2, 1), "float32")
        raise KeyError("further on")

    model = keras.Sequential([keras.Input((3,)), Picky(), keras.layers.Dense(1)])
    trainer = tl.Trainer(model, loss="mse", optimizer="sgd")
    with pytest.raises(tf.errors.InvalidArgumentError, match="too large for the layer"):
        trainer.fit(batches())
    assert trainer.step == 3
