import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.loader import as_loader
from tapeloop.data.sampler import Sampler
from tests.support.models import trainer_of

X, Y = np.arange(10.0).reshape(10, 1), np.arange(10)


def firsts(batches):
    """The first input of each example of one epoch, batch by batch."""
    return [batch[0][:, 0].numpy().tolist() for batch in batches.drawn()]


def test_arrays_are_cut_in_batches_with_a_ragged_last():
    batches = as_loader((X, Y), batch_size=4)
    assert batches.per_epoch == 3
    assert firsts(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert firsts(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_arrays_are_shuffled_anew_each_epoch_by_the_seed():
    def epochs(seed):
        batches = as_loader((X, Y), batch_size=10, orders=Sampler(True, seed))
        return [firsts(batches)[0] for _ in range(2)]

    one, two = epochs(7)
    assert sorted(one) == sorted(two) == X[:, 0].tolist()
    assert one != two
    assert epochs(7) == [one, two]
    assert epochs(8) != [one, two]


def test_targets_and_weights_stay_with_their_examples():
    for x, y, weight in as_loader((X, Y, X[:, 0] * 2), batch_size=3, orders=Sampler(True)).drawn():
        np.testing.assert_array_equal(x[:, 0], tf.cast(y, tf.float32))
        np.testing.assert_array_equal(weight, 2 * x[:, 0])


def test_floating_arrays_come_in_keras_float_type_and_others_as_they_are():
    x, y = next(as_loader((X, Y)).drawn())
    assert (x.dtype, y.dtype) == (tf.float32, tf.int64)


def test_nested_inputs_and_missing_weights():
    (batch,) = as_loader(({"a": X, "b": [X, X]}, Y, None), batch_size=10).drawn()
    assert batch[0]["b"][1].shape == (10, 1)
    assert batch[2] is None


def test_a_signature_takes_nothing_away():
    batches = as_loader([(X[:2], Y[:2]), (X[2:4], Y[2:4])])
    assert next(batches.specs())[0] == tf.TensorSpec([None, 1])
    assert firsts(batches) == [[0, 1], [2, 3]]
    assert firsts(batches) == [[0, 1], [2, 3]]


def test_a_generator_lasts_one_epoch():
    batches = as_loader(((X[i : i + 1], Y[i : i + 1]) for i in range(3)), name="train")
    assert batches.per_epoch is None
    batches.feed()
    assert firsts(batches) == [[0], [1], [2]]
    with pytest.raises(tl.DataError, match=r"`train` ended after 3 batches, and more were asked for"):
        batches.feed()


def test_data_without_end_is_cut_in_epochs_that_go_on_where_the_last_one_ended():
    endless = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5).repeat()
    batches = as_loader(endless, steps=("steps_per_epoch", 3))
    assert batches.per_epoch == 3
    assert [len(batch) for batch in firsts(batches)] == [5, 5, 5]
    assert firsts(batches)[0] == [5, 6, 7, 8, 9]


def test_data_that_ends_within_an_epoch_goes_on_from_its_start():
    batches = as_loader([(X[i : i + 1], Y[i : i + 1]) for i in range(3)], steps=("steps_per_epoch", 2))
    assert [firsts(batches) for _ in range(3)] == [[[0], [1]], [[2], [0]], [[1], [2]]]


def test_an_iterator_that_cannot_last_is_refused_at_once():
    batches = as_loader(((X, Y) for _ in range(3)), name="train")
    batches.lasts(1)
    with pytest.raises(tl.DataError, match=r"`train` is an iterator, which lasts one epoch, and 3 epochs were asked"):
        batches.lasts(3)
    as_loader(iter([(X, Y)] * 3), steps=("steps_per_epoch", 1)).lasts(3)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"])
@pytest.mark.parametrize("name", ["batch_size", "steps_per_epoch"])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a whole number, 1 or more. Received: "):
        trainer_of().fit((X, Y), **{name: value})
    assert as_loader((X, Y), batch_size=np.int64(4), steps=("steps", np.int64(4)))


def test_nested_python_lists_are_named_for_what_they_are():
    with pytest.raises(tl.DataError, match=r"Lists are taken for several arrays: make one of them with `np.asarray`"):
        as_loader((X.tolist(), Y.tolist()))


def test_datasets_know_their_length():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
    assert as_loader(data).per_epoch == 2
    assert as_loader(data.filter(lambda x, y: True)).per_epoch is None
    assert firsts(as_loader(data)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


class Pairs(keras.utils.PyDataset):
    ended = 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return X[5 * index : 5 * index + 5], Y[5 * index : 5 * index + 5]

    def on_epoch_end(self):
        self.ended += 1


def test_a_pydataset_is_gone_through_by_its_own_rules():
    data = Pairs()
    batches = as_loader(data)
    assert batches.per_epoch == 2
    assert firsts(batches) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert data.ended == 1
