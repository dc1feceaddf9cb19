import keras
import pytest

from tapeloop.model.rows import Row, folded


def layer(name):
    """A row of a layer of its own; its look is told by the test."""
    return Row(name, (keras.layers.Layer(name=name.replace("/", "_")),))


def labels(names, look=lambda name: None):
    """The labels of rows of some names, and how many each stands for, folded by what `look` says of a name."""
    rows = [layer(name) for name in names]
    names_of = {id(row.infos[0]): row.label for row in rows}
    return [(row.label, len(row.infos)) for row in folded(rows, lambda info: look(names_of[id(info)]))]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["blocks/0", "blocks/1", "blocks/2"], [("blocks/0..2", 3)]),
        (["block_0", "block_1", "head"], [("block_0..1", 2), ("head", 1)]),
        ([f"block_{n:02}" for n in range(12)], [("block_00..11", 12)]),
        ([f"b{n}" for n in range(9, 12)], [("b9..11", 3)]),
        (["layer3_conv", "layer4_conv"], [("layer3..4_conv", 2)]),
        (["a/0", "a/2", "a/3"], [("a/0", 1), ("a/2..3", 2)]),  # one is missing
        (["a/1", "a/0"], [("a/1", 1), ("a/0", 1)]),
        (["a0", "b1", "c"], [("a0", 1), ("b1", 1), ("c", 1)]),
        (["a1_b1", "a2_b2"], [("a1_b1", 1), ("a2_b2", 1)]),  # two numbers differ
        (["stem", "dense", "dense_1", "dense_2"], [("stem", 1), ("dense", 1), ("dense_1..2", 2)]),
        (["b1_conv", "b1_bn", "b2_conv", "b2_bn", "b3_conv"], [("b1..2_conv", 2), ("b1..2_bn", 2), ("b3_conv", 1)]),
        (["b1_x", "b1_y", "b2_x", "b3_y"], [("b1_x", 1), ("b1_y", 1), ("b2_x", 1), ("b3_y", 1)]),
        ([], []),
    ],
)
def test_rows_that_follow_and_differ_in_a_number_that_counts_up_are_one(names, found):
    assert labels(names) == found


def test_rows_that_look_otherwise_are_left_apart():
    names = [f"b{n}" for n in range(6)]
    assert labels(names, look=lambda name: int(name[1]) >= 4) == [("b0..3", 4), ("b4..5", 2)]
    blocks = [f"b{n}_{part}" for n in range(3) for part in ("conv", "bn")]
    folds = labels(blocks, look=lambda name: (name.endswith("bn"), name.startswith("b2")))
    assert folds == [("b0..1_conv", 2), ("b0..1_bn", 2), ("b2_conv", 1), ("b2_bn", 1)]


def test_what_is_in_rows_is_folded_first_and_must_be_alike():
    def block(number, heads):
        name = f"blocks/{number}"
        inner = [layer(f"{name}/heads/{head}") for head in range(heads)] + [layer(f"{name}/out")]
        return Row(name, layer(name).infos, tuple(inner))

    rows = folded([block(0, 3), block(1, 3), block(2, 4)], lambda info: None)
    assert [(row.label, len(row.infos)) for outer in rows for row in outer.flat()] == [
        ("blocks/0..1", 2),
        ("blocks/0..1/heads/0..2", 6),
        ("blocks/0..1/out", 2),
        ("blocks/2", 1),
        ("blocks/2/heads/0..3", 4),
        ("blocks/2/out", 1),
    ]
