import keras
import pytest

import tapeloop as tl
from tapeloop._table import format_bytes
from tests.support import models


def nested():
    layers = keras.layers

    def stage(name):
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, name="dense"), layers.BatchNormalization(name="bn")], name=name
        )

    inputs = keras.Input((4,))
    backbone = keras.Sequential([keras.Input((4,)), stage("stage1"), stage("stage2")], name="backbone")
    return keras.Model(inputs, layers.Dense(2, name="head")(backbone(inputs)))


POLICY = tl.Freeze("backbone/stage1", "**/beta")
NESTED = """
submodel               parameters  group    state         rule                             mode       optimizer state
---------------------------------------------------------------------------------------------------------------------
backbone                       72  default  trains 33.3%  mixed                            train                192 B
backbone/stage1                36  -        frozen        Freeze: glob('backbone/stage1')  inference              0 B
backbone/stage2                36  default  trains 66.7%  mixed                            train                192 B
backbone/stage2/dense          20  default  trains        Freeze: all else                 train                160 B
backbone/stage2/bn             16  default  trains 25.0%  mixed                            train                 32 B
head                           10  default  trains        Freeze: all else                 train                 80 B
---------------------------------------------------------------------------------------------------------------------
parameters       82
  train          34 (41.5%) in 1 group: default
  frozen         32
  non-trainable  16 (statistics, seeds, Keras' flags)
optimizer state  272 B
"""
MODULE = """
submodel   parameters  group  state          rule                     mode       optimizer state
------------------------------------------------------------------------------------------------
base               58  bn     trains 13.8%   mixed                    train                 64 B
base/conv          40  -      frozen         Groups: all else         inference              0 B
base/bn            16  bn     trains         Groups: glob('base/bn')  train                 64 B
base/drop           2  -      non-trainable  Keras: seed state        train                  0 B
w                 192  head   trains         Groups: glob('w')        train              1.5 KiB
b/0                 3  bias   trains         Groups: glob('b')        train                 24 B
b/1                 1  -      non-trainable  Keras: non-trainable     train                  0 B
------------------------------------------------------------------------------------------------
parameters       254
  train          203 (79.9%) in 3 groups: bn, head, bias
  frozen         40
  non-trainable  11 (statistics, seeds, Keras' flags)
optimizer state  1.6 KiB
"""


def words(table):
    """The rows of a table without the widths of its columns."""
    return [line.split() for line in table.splitlines() if line.strip("-")]


@pytest.mark.parametrize(("depth", "folded"), [(1, "backbone/"), (2, "backbone/stage2/"), (3, "nothing")])
def test_what_is_alike_inside_is_folded_and_the_rest_unfolded_to_the_depth(depth, folded):
    table = tl.Trainer(nested(), POLICY, loss="mse", optimizer="adam").explain(depth)
    assert words(table) == [row for row in words(NESTED) if not row[0].startswith(folded)]
    assert (table == NESTED.strip("\n")) == (depth == 3)


def test_raw_variables_and_several_groups():
    trainer = tl.Trainer(models.Module(), tl.Groups({"head": "w", "bias": "b", "bn": "base/bn"}), loss="mse")
    assert trainer.explain() == MODULE.strip("\n")


def test_a_flag_of_keras_is_named_as_the_reason():
    model = nested()
    model.get_layer("backbone").trainable = False
    row = tl.Trainer(model, loss="mse").explain().splitlines()[2]
    assert row.split("  ")[0] == "backbone"
    assert "non-trainable  Keras: backbone.trainable=False  inference" in row


class Block(keras.layers.Layer):
    """A layer with an adapter beside it."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)
        self.adapter = [keras.layers.Dense(4) for _ in range(2)]

    def build(self, shape):
        for part in (self.dense, *self.adapter):
            part.build(shape)


class Stack(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block() for _ in range(12)]
        self.head = keras.layers.Dense(2)

    def build(self, shape):
        for part in (*self.blocks, self.head):
            part.build(shape)


STACK = """
submodel                   parameters  group    state         rule                      mode       optimizer state
------------------------------------------------------------------------------------------------------------------
blocks/0..11                  12 x 60  default  trains 66.7%  mixed                     train           12 x 320 B
blocks/0..11/dense            12 x 20  -        frozen        Freeze: glob('**/dense')  inference              0 B
blocks/0..11/adapter/0..1     24 x 20  default  trains        Freeze: all else          train           24 x 160 B
head                               10  default  trains        Freeze: all else          train                 80 B
------------------------------------------------------------------------------------------------------------------
parameters       730
  train          490 (67.1%) in 1 group: default
  frozen         240
  non-trainable  0 (statistics, seeds, Keras' flags)
optimizer state  3.8 KiB
"""


def test_repeated_blocks_are_one_row_with_their_count_and_all_that_is_in_them():
    model = Stack()
    model.build((None, 4))
    trainer = tl.Trainer(model, tl.Freeze("**/dense"), loss="mse")
    assert trainer.explain() == STACK.strip("\n")
    trainer.policy = tl.Freeze("**/dense", "blocks/5/adapter")
    rows = [row[0] for row in words(str(trainer.selection))]
    assert rows[1:5] == ["blocks/0..4", "blocks/0..4/dense", "blocks/0..4/adapter/0..1", "blocks/5"]
    assert "blocks/6..11" in rows


SELECTED = """
submodel               parameters  group    state         rule                             mode
----------------------------------------------------------------------------------------------------
backbone                       72  default  trains 33.3%  mixed                            train
backbone/stage1                36  -        frozen        Freeze: glob('backbone/stage1')  inference
backbone/stage2                36  default  trains 66.7%  mixed                            train
backbone/stage2/dense          20  default  trains        Freeze: all else                 train
backbone/stage2/bn             16  default  trains 25.0%  mixed                            train
head                           10  default  trains        Freeze: all else                 train
----------------------------------------------------------------------------------------------------
parameters       82
  train          34 (41.5%) in 1 group: default
  frozen         32
  non-trainable  16 (statistics, seeds, Keras' flags)
"""


def test_a_selection_prints_as_the_table_without_the_state_of_optimizers():
    selection = tl.Trainer(nested(), POLICY, loss="mse").selection
    assert str(selection) == SELECTED.strip("\n")
    assert repr(selection) == f"<Selection: {selection.describe()}>"


def test_a_table_shows_as_html_with_everything_escaped():
    trainer = tl.Trainer(nested(), tl.Groups({"<b>": "head"}), loss="mse")
    table = trainer.explain()
    assert isinstance(table, str)
    assert repr(table) == str(table)
    html = table._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "color" not in html
    assert html.count("<tr>") == 1 + 2 + 5  # the header, two rows and five totals
    assert trainer.selection._repr_html_().count("<tr>") == 1 + 2 + 4


@pytest.mark.parametrize("depth", [0, -1, 1.5, None])
def test_depth_must_be_a_number_of_levels(depth):
    with pytest.raises(ValueError, match=r"`depth` must be a whole number, 1 or more. Received: "):
        tl.Trainer(nested(), loss="mse").explain(depth)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1 << 10, "1.0 KiB"),
        ((1 << 20) - 100, "1023.9 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (3 << 19, "1.5 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_bytes_are_said_in_the_largest_fitting_unit(count, said):
    assert format_bytes(count) == said


def test_penalties_that_count_and_that_do_not_are_told():
    penalized = [keras.layers.Dense(2, kernel_regularizer="l2", name=name) for name in ("a", "b", "c")]
    model = keras.Sequential([keras.Input((2,)), *penalized])
    table = tl.Trainer(model, tl.TrainOnly("c"), loss="mse").explain()
    assert table.splitlines()[-1] == "weight penalties 1 count, 2 of frozen variables do not"


PATHS = """
path                                                type                shape         Keras' flag
---------------------------------------------------------------------------------------------------
(model)                                             dict
one                                                 Sequential
one/conv                                            Conv2D
one/conv/kernel                                     float32             (3, 3, 1, 4)  non-trainable
one/conv/bias                                       float32             (4,)          non-trainable
one/bn = two/again                                  BatchNormalization
one/bn/gamma = two/again/gamma                      float32             (4,)          trainable
one/bn/beta = two/again/beta                        float32             (4,)          trainable
one/bn/moving_mean = two/again/moving_mean          float32             (4,)          non-trainable
one/bn/moving_variance = two/again/moving_variance  float32             (4,)          non-trainable
one/drop                                            Dropout
one/drop/seed_generator/state                       int64               (2,)          seed
one/flat                                            Flatten
two                                                 Module
two/w                                               float32             (64, 3)       trainable
two/b/0                                             float32             (3,)          trainable
two/b/1                                             float32             ()            non-trainable
"""


def test_the_paths_of_a_model_are_printed(capsys):
    model = {"one": keras.Sequential([keras.Input((6, 6, 1)), *models.base_layers()], name="s"), "two": models.Module()}
    model["one"].get_layer("conv").trainable = False
    model["two"].again = model["one"].get_layer("bn")
    del model["two"].base
    assert tl.paths(model) is None
    assert capsys.readouterr().out == PATHS.lstrip("\n")
