"""What is taken over from the scope of a strategy, and what is refused before anything has moved."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.batch import Share
from tapeloop.distribution.adoption import Copies
from tapeloop.distribution.options import check_options
from tapeloop.distribution.reduction import MOST_BYTES, _packs
from tapeloop.distribution.replicas import Replicas
from tapeloop.distribution.spread import SpreadStep, _check_taken_over
from tapeloop.model.tree import Tree
from tests.support import distributed

x, y = distributed.data(16)


def test_one_device_of_a_strategy_trains_as_without_one():
    alone = distributed.made("head", None)
    expected = alone.fit(x, y, epochs=2, verbose=0)
    for strategy in (tf.distribute.MirroredStrategy(["CPU:0"]), tf.distribute.OneDeviceStrategy("CPU:0")):
        trainer = distributed.made("head", strategy)
        history = trainer.fit(x, y, epochs=2, verbose=0)
        assert history.history == expected.history
        for mine, other in zip(trainer.model.variables, alone.model.variables):
            np.testing.assert_array_equal(mine.numpy(), other.numpy())
        assert trainer.reduced_bytes == 0


def test_a_model_that_was_taken_over_is_one_of_one_device():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model, optimizer = distributed.plain(), keras.optimizers.Adam(1e-2)
        metric = keras.metrics.SparseCategoricalAccuracy()
    before = [value.numpy() for value in model.variables]
    tl.Trainer(model, loss="mse", optimizer=optimizer, metrics=[metric], strategy=strategy)
    for variable in (*model.variables, *optimizer.variables, *metric.variables):
        assert not isinstance(variable.value, tf.distribute.DistributedValues)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable.numpy(), value)
        assert variable.value.trainable


def test_what_was_made_elsewhere_is_refused():
    strategy, other = (tf.distribute.MirroredStrategy(["CPU:0"]) for _ in range(2))
    outside = "MirroredStrategy, and `base/wide/kernel`.* were made outside of the scope.*`with strategy.scope"
    with pytest.raises(ValueError, match=outside):
        tl.Trainer(distributed.plain(), loss="mse", strategy=strategy)
    with other.scope():
        model, lazy = distributed.plain(), keras.Sequential([keras.layers.Dense(1, name="late")])
    with pytest.raises(ValueError, match="were made in the scope of another strategy"):
        tl.Trainer(model, loss="mse", strategy=strategy)
    with pytest.raises(ValueError, match=r"`late` of it has none yet: call it once on an input"):
        tl.Trainer(lazy, loss="mse", strategy=other)
    with pytest.raises(ValueError, match=r"in the scope of a MirroredStrategy, .* Pass `strategy=strategy`"):
        tl.Trainer(model, loss="mse")
    assert isinstance(model.variables[0].value, tf.distribute.DistributedValues)  # nothing was taken over
    with pytest.raises(TypeError, match="must be one of `OneDeviceStrategy`, `MirroredStrategy`, `MultiWorkerMirrored"):
        tl.Trainer(distributed.plain(), loss="mse", strategy="mirrored")


def test_another_trainer_of_the_same_model_goes_on_with_it():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    first = distributed.made("head", strategy)
    first.fit(x, y, verbose=0)
    before = [value.numpy() for value in first.model.variables]
    second = tl.Trainer(first.model, tl.TrainAll(), loss=distributed.CLASSES["loss"], strategy=strategy)
    for variable, value in zip(first.model.variables, before):
        np.testing.assert_array_equal(variable.numpy(), value)
    second.fit(x, y, verbose=0)


def test_metrics_of_layers_are_taken_over_and_others_of_the_scope_are_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model, metric = distributed.with_layer(distributed.Noting()), keras.metrics.Mean()
    trainer = tl.Trainer(model, loss=distributed.CLASSES["loss"], strategy=strategy)
    trainer.fit(x, y, verbose=0)
    (held,) = (layer.seen for layer in model.layers if isinstance(layer, distributed.Noting))
    assert not isinstance(held.total.value, tf.distribute.DistributedValues)
    with pytest.raises(ValueError, match=r"was made in the scope of the strategy and is no part of the model"):
        _check_taken_over([variable.value for variable in metric.variables])


def test_variables_that_are_not_keras_own_are_refused():
    class Bare(tf.Module):
        def __init__(self):
            super().__init__()
            self.weight = tf.Variable([1.0])

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        module = Bare()
    with pytest.raises(ValueError, match=r"Keras variables alone, and `weight` are TensorFlow's own"):
        tl.Trainer(module, loss="mse", strategy=strategy)


def test_a_trainer_is_made_and_used_outside_of_the_scope():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = distributed.plain()
        with pytest.raises(RuntimeError, match=r"within `strategy.scope\(\)`.*after the `with` block"):
            tl.Trainer(model, loss="mse", strategy=strategy)
    trainer = tl.Trainer(model, loss="mse", strategy=strategy)
    with strategy.scope(), pytest.raises(RuntimeError, match="within `strategy"):
        trainer.fit(x, x[:, :3], verbose=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapts": True}, "tries on each device by itself"),
        ({"run_eagerly": True}, "runs one device after the other"),
        ({"jit_compile": True}, "XLA compiles no sums over several devices"),
    ],
)
def test_options_that_do_not_go_with_several_devices(options, text):
    tree = Tree.of(distributed.plain())
    plain = {"adapts": False, "jit_compile": "auto", "run_eagerly": False}
    check_options(tree, **plain)
    with pytest.raises(ValueError, match=text):
        check_options(tree, **{**plain, **options})


def test_statistics_over_all_devices_are_refused():
    norm = keras.layers.BatchNormalization(synchronized=True, name="norm")
    tree = Tree.of(keras.Sequential([keras.Input((4,)), norm]))
    with pytest.raises(ValueError, match=r"`norm` would be normalized over all devices"):
        check_options(tree, "auto", adapts=False, run_eagerly=False)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shares_are_the_whole_and_differ_by_one_at_most(count):
    for examples in range(count, 30):
        bounds = [Share(number, count).bounds(examples) for number in range(count)]
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == examples
        sizes = {stop - start for start, stop in bounds}
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


def test_a_share_has_its_rows_of_every_kind_of_tensor():
    rows = tf.reshape(tf.range(10), [5, 2])
    batch = {"dense": rows, "ragged": tf.RaggedTensor.from_tensor(rows), "sparse": tf.sparse.from_dense(rows)}
    share = Share(1, 2).rows({**batch, "scalar": tf.constant(3)})
    np.testing.assert_array_equal(share["dense"], rows[3:])
    np.testing.assert_array_equal(share["ragged"].to_tensor(), rows[3:])
    np.testing.assert_array_equal(tf.sparse.to_dense(share["sparse"]), rows[3:])
    assert share["scalar"] == 3
    with pytest.raises(tl.DataError, match=r"A batch of 5 cannot be shared by 6 devices"):
        Share(0, 2, 6).rows(batch)


def test_side_inputs_that_are_no_examples_are_refused():
    with pytest.raises(tl.DataError, match="Examples must be the first dimension of each tensor of a batch that"):
        Share(0, 2).rows((tf.ones([4, 2]), tf.ones([3, 2])))

    @tf.function(input_signature=[tf.TensorSpec([None, 2]), tf.TensorSpec([None, 2])])
    def shared(one, other):
        return Share(0, 2).rows((one, other))[0]

    assert shared(tf.ones([4, 2]), tf.ones([4, 2])).shape == (2, 2)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Examples must be the first dimension"):
        shared(tf.ones([4, 2]), tf.ones([3, 2]))


def test_what_a_step_only_reads_is_not_among_what_it_may_assign_to():
    frozen, moved, counts = tf.Variable([1.0]), tf.Variable([1.0]), tf.Variable(0)
    inner = tf.function(lambda x: moved.assign_add(x * frozen)).get_concrete_function(tf.TensorSpec([None]))
    copies = Copies(Replicas(), counts)
    spread = SpreadStep(inner, tf.TensorSpec([1]), [frozen, moved], copies, may_skip=False)
    assert [variable is moved for variable in spread.assigned] == [True]


def test_a_batch_with_fewer_examples_than_devices_is_refused_before_the_fit(monkeypatch):
    replicas = Replicas()
    replicas.require_examples("x", 1)
    monkeypatch.setattr(Replicas, "count", 4)
    replicas.require_examples("x", None)
    with pytest.raises(tl.DataError, match=r"`x` has a batch of 3 for 4 devices.*another `batch_size`"):
        replicas.require_examples("x", 3)


def test_small_gradients_go_in_one_message_and_large_ones_by_themselves():
    large = MOST_BYTES // 4
    tensors = [tf.TensorSpec([5]), tf.TensorSpec([large]), tf.TensorSpec([7]), tf.TensorSpec([3], tf.float64)]
    packs = list(_packs(tensors))
    assert sorted(number for pack in packs for number in pack) == [0, 1, 2, 3]
    assert packs == [[0], [1], [2], [3]]
    assert list(_packs([tensors[0], tensors[2], tensors[3]])) == [[0, 1], [2]]
