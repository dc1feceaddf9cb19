import keras
import tensorflow as tf

from tapeloop.model.tree import Tree
from tests.support import models

layers = keras.layers


class Holder(keras.Model):
    """A model with the attributes that it is given."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def dense(use_bias=False, **options):
    layer = layers.Dense(2, use_bias=use_bias, **options)
    layer.build((None, 2))
    return layer


def paths(model):
    return {variable.path: variable.trainable for variable in Tree.of(model).variables}


def test_subclassed_models_use_the_attributes_names_without_underscores():
    attention = layers.MultiHeadAttention(1, 2, use_bias=False)
    attention.build((None, 1, 2), (None, 1, 2))
    blocks = [dense(use_bias=True), {"inner": dense()}]
    assert list(paths(Holder(_first=dense(name="whatever"), blocks=blocks, attention=attention))) == [
        "first/kernel",
        "blocks/0/kernel",
        "blocks/0/bias",
        "blocks/1/inner/kernel",
        *(f"attention/{name}_dense/kernel" for name in ("query", "key", "value", "output")),
    ]


def test_an_attribute_that_collides_without_its_underscore_keeps_a_path_of_its_own():
    assert list(paths(Holder(dense=dense(), _dense=dense()))) == ["dense/kernel", "dense_2/kernel"]


def test_weights_kept_in_no_attribute_are_found_by_name():
    bag = layers.Layer()
    bag.add_weight(shape=(2,), name="loose")
    assert list(paths(bag)) == ["loose"]


def test_a_shared_layer_stands_once_with_all_its_paths_and_parents():
    shared = dense(name="dense")
    tree = Tree.of(Holder(one=keras.Sequential([keras.Input((2,)), shared]), two=shared))
    (variable,) = tree.variables
    assert variable.paths == ("one/dense/kernel", "two/kernel")
    submodel = variable.submodels[-1]
    assert submodel.paths == ("one/dense", "two")
    assert [parent.path for parent in tree.parents[submodel]] == ["one", ""]
    assert submodel in tree.children[tree.submodels[0]]


def test_a_child_that_refers_back_to_its_parent_ends():
    class Node(tf.Module):
        def __init__(self):
            self.w = tf.Variable(1.0)
            self.me = self

    assert list(paths(Node())) == ["w"]


def test_optimizers_and_metrics_are_no_part_of_the_tree():
    model = models.functional()
    before = paths(model)
    model.compile("adam", models.cross_entropy(), metrics=["accuracy"])
    model.fit(*models.images(), verbose=0)
    assert paths(model) == before


def test_what_a_variable_says_of_itself():
    variable = Tree.of(models.functional()).variables[0]
    assert (variable.path, variable.name, variable.shape) == ("base/conv/kernel", "kernel", (3, 3, 1, 4))
    assert (variable.dtype, variable.size) == ("float32", 36)
    assert isinstance(variable.tf_variable, tf.Variable)
    assert [submodel.path for submodel in variable.submodels] == ["", "base", "base/conv"]


def test_states_that_keras_does_not_track_are_part_of_the_tree():
    model = keras.Sequential([keras.Input((3, 4), batch_size=2), keras.layers.GRU(5, stateful=True, name="gru")])
    (state,) = [variable for variable in Tree.of(model).variables if variable.path == "gru/states/0"]
    assert state.shape == (2, 5)
    assert not state.trainable
