"""A trainer as bytes, and made again; what cannot be sent, and what is said of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.tuning.importable import Unsendable
from tapeloop.tuning.parcel import Held, Made, check_same, opened, packed
from tests.support import tuned
from tests.support.models import Subclassed

X, Y = tuned.data(8)


def sent(trainer, made=None, batches=((X, Y),)):
    """The trainer, made again as another process makes it."""
    again = opened(packed(trainer, made or vars(trainer)["_made"], trainer.selection, list(batches)))
    copy = again.kind(*again.made.args, **again.made.kwargs)
    check_same(copy.model, again.variables)
    copy.policy = again.policy
    return copy, again


def test_a_trainer_is_made_again_and_trains_to_the_same_bits():
    trainer = tl.Trainer(
        tuned.mlp(keras.layers.Dropout(0.5)),
        tl.Groups({"base": "base", "head": "head"}, multipliers={"base": 0.5}),
        loss=tuned.Halved(),
        optimizer={"base": keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 5)), "head": "adam"},
        metrics=[tuned.Counted(3, name="counted")],
    )
    copy, again = sent(trainer)
    assert again.run == (0, 0)
    np.testing.assert_equal(again.batches, [(X, Y)])
    assert copy.model is not trainer.model
    logs = [each.train_on_batch(X, Y) for each in (trainer, copy)]
    assert logs[0] == logs[1]
    assert logs[0]["counted"] == 4.0
    for one, other in zip(trainer.model.get_weights(), copy.model.get_weights()):
        np.testing.assert_array_equal(one, other)
    assert copy.learning_rates == trainer.learning_rates


def test_layers_that_are_named_elsewhere_are_those_of_the_model():
    model = tuned.mlp()
    base = model.get_layer("base")
    trainer = tl.Trainer(model, tl.Freeze(base), loss="mse", remat=base)
    copy, _ = sent(trainer)
    assert [one.path for one in copy.selection.frozen] == ["base/kernel", "base/bias"]
    assert vars(copy)["_made"].kwargs["remat"] is copy.model.get_layer("base")


def test_a_policy_is_sent_as_what_it_selects_whatever_it_is_made_of():
    trainer = tl.Trainer(tuned.mlp(), tl.TrainOnly(tl.matching(lambda variable: variable.path == "head/bias")))
    copy, again = sent(trainer)
    assert isinstance(again.policy, Held)
    assert [one.path for one in copy.selection.trained] == ["head/bias"]


def test_a_subclass_makes_its_own_attributes_and_keeps_its_arguments():
    model, teacher = tuned.mlp(), tuned.mlp()
    table, noise = tf.Variable([1.0, 2.0], name="table"), tf.random.Generator.from_seed(1)
    copy, _ = sent(tuned.Tempered(model, 0.5, teacher=teacher, table=table, noise=noise))
    assert (copy.temperature, copy.table.name) == (0.5, "table:0")
    np.testing.assert_array_equal(copy.table, table)
    np.testing.assert_array_equal(copy.noise.normal([3]), noise.normal([3]))
    np.testing.assert_array_equal(copy.teacher(X), teacher(X))


def test_a_module_of_tensorflow_keeps_its_variables():
    trainer = tl.Trainer(tuned.Module(), loss="mse")
    trainer.model.w.assign([[1, 2], [3, 4], [5, 6]])
    copy, _ = sent(trainer)
    np.testing.assert_array_equal(copy.model(X), trainer.model(X))
    assert [v.trainable for v in Tree.of(copy.model).variables] == [
        v.trainable for v in Tree.of(trainer.model).variables
    ]


def test_of_several_models_one_may_be_a_part_of_another():
    whole = keras.Sequential([keras.Input((4,)), tuned.mlp(), keras.layers.Dense(2, name="last")])
    copy, _ = sent(tl.Trainer({"part": whole.layers[0], "whole": whole}, loss="mse"))
    assert list(copy.model) == ["part", "whole"]
    assert copy.model["part"] is copy.model["whole"].layers[0]


def test_batches_keep_their_kind():
    ragged = tf.ragged.constant([[1.0, 2.0], [3.0]])
    _, again = sent(tl.Trainer(tuned.mlp(), loss="mse"), batches=[({"a": ragged, "b": None}, tf.constant([1, 2]))])
    (inputs, targets), *_ = again.batches
    assert inputs["a"].to_list() == ragged.to_list()
    assert inputs["b"] is None
    np.testing.assert_array_equal(targets, [1, 2])


def test_a_subclassed_model_and_one_that_is_compiled_are_sent():
    model = Subclassed()
    model.compile(loss=lambda y, outputs: 0.0)  # which would not be found, and is not needed
    model(np.zeros((1, 6, 6, 1)))
    model.base.layers[0].trainable = False
    copy, _ = sent(tl.Trainer(model, tl.Freeze("base"), loss="mse"))
    assert [one.trainable for one in copy.model.base.layers] == [False, True, True, True]
    for one, other in zip(model.get_weights(), copy.model.get_weights()):
        np.testing.assert_array_equal(one, other)


def nameless():
    class Local(keras.layers.Layer):
        pass

    return Local()


def shares_layers():
    shared, x = keras.layers.Dense(3, name="shared"), keras.Input((4,))
    return {name: keras.Model(x, keras.layers.Dense(2, name=name)(shared(x))) for name in ("actor", "critic")}


class LocalTrainer:
    @staticmethod
    def of(model):
        class Mine(tl.Trainer):
            pass

        return Mine(model, loss="mse")


CANNOT = {
    "a loss that is a lambda": (
        lambda: tl.Trainer(tuned.mlp(), loss=lambda y, outputs: 0.0),
        r"^the argument `loss` of `Trainer`: `<lambda>.<locals>.<lambda>` of `tests.tuning.test_parcel` is not "
        r"found by its name, as what is made in a function, or by `lambda`, is not: define it at the top of a module$",
    ),
    "a layer of a local class": (
        lambda: tl.Trainer(tuned.mlp(nameless()), loss="mse"),
        r"^the model: `Local` of `tests.tuning.test_parcel` is not found by its name",
    ),
    "a trainer of a local class": (
        lambda: LocalTrainer.of(tuned.mlp()),
        r"^`Mine`: `LocalTrainer.of.<locals>.Mine` of `tests.tuning.test_parcel` is not found by its name",
    ),
    "models that share layers": (
        lambda: tl.Trainer(shares_layers(), loss="mse"),
        r"^made again from its config, the model has 8 variables and had 6, and the first that differs is '",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_sent_is_named(name):
    make, text = CANNOT[name]
    with pytest.raises(Unsendable, match=text):
        sent(make())


def test_the_policy_of_a_model_that_is_not_built_is_sent_itself():
    model = Subclassed()
    trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
    again = opened(packed(trainer, Made((model,), {}), trainer.policy, []))
    assert again.policy == tl.Freeze("base")
    policy = tl.TrainOnly(tl.matching(lambda variable: True))
    with pytest.raises(Unsendable, match=r"^the policy of a model that is not built yet \(call .*<lambda>` of"):
        packed(trainer, Made((model,), {}), policy, [])
