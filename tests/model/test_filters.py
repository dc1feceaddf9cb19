import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapeloop as tl
from tapeloop.model.filters import to_filter
from tapeloop.model.tree import Tree
from tests.support import models

MODEL = models.functional()
TREE = Tree.of(MODEL)


def chosen(filter_, tree=TREE):
    return [variable.path for variable in tree.variables if to_filter(filter_)(variable)]


HEAD = ["head/kernel", "head/bias"]
CONV = ["base/conv/kernel", "base/conv/bias"]
BN = ["base/bn/gamma", "base/bn/beta", "base/bn/moving_mean", "base/bn/moving_variance"]
SEED = ["base/drop/seed_generator/state"]


@pytest.mark.parametrize(
    ("filter_", "paths"),
    [
        ("head", HEAD),
        ("head/**", HEAD),
        ("head/*", HEAD),
        ("base/c*", CONV),
        ("*/conv", CONV),
        ("base/b?", BN),
        ("base/b[mn]", BN),
        ("**/bias", ["base/conv/bias", "head/bias"]),
        ("**/moving_*", BN[2:]),
        ("**", CONV + BN + SEED + HEAD),
        ("*", CONV + BN + SEED + HEAD),
        ("bas", []),
        ("base/conv/kernel/deeper", []),
        ("ba*nv", []),
        ("base?conv", []),
        (tl.named("kernel"), ["base/conv/kernel", "head/kernel"]),
        (tl.named("kernel", "gamma"), ["base/conv/kernel", "base/bn/gamma", "head/kernel"]),
        (tl.of_type(keras.layers.Dense), HEAD),
        (tl.of_type(keras.layers.Dense, keras.layers.Conv2D), CONV + HEAD),
        (tl.of_type(keras.Sequential), CONV + BN + SEED),
        (tl.matching(lambda variable: len(variable.shape) == 4), CONV[:1]),
        (tl.glob("base") & tl.named("bias"), CONV[1:]),
        (tl.glob("base/conv") | "head", CONV + HEAD),
        ("head" | tl.glob("base/conv"), CONV + HEAD),
        ("base" & ~tl.glob("base/bn"), CONV + SEED),
    ],
)
def test_what_a_filter_chooses(filter_, paths):
    assert chosen(filter_) == paths


def test_a_submodel_means_all_under_that_very_object():
    assert chosen(MODEL.get_layer("head")) == HEAD
    assert chosen(tl.under(MODEL.get_layer("base"))) == CONV + BN + SEED
    assert chosen(models.functional().get_layer("head")) == []


def test_any_path_of_a_shared_layer_matches():
    shared = keras.layers.Dense(2)
    model = {"a": keras.Sequential([keras.Input((2,)), shared]), "b": shared}
    assert chosen("b", Tree.of(model)) == ["a/dense/kernel", "a/dense/bias"]


FILTERS = st.recursive(
    st.sampled_from(["base", "head", "**/bias", "base/*/gamma", "nothing"]).map(tl.glob) | st.just(tl.named("kernel")),
    lambda inner: (
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1])
        | st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1])
        | inner.map(lambda filter_: ~filter_)
    ),
    max_leaves=6,
)


@given(FILTERS, FILTERS)
def test_the_laws_of_sets_hold(a, b):
    of_a, of_b = set(chosen(a)), set(chosen(b))
    assert set(chosen(a & b)) == of_a & of_b
    assert set(chosen(a | b)) == of_a | of_b
    assert set(chosen(~a)) == set(chosen("**")) - of_a
    assert chosen(a & ~a) == []


def test_filters_are_values():
    assert tl.glob("a") | tl.named("b") == tl.glob("a") | tl.named("b")
    assert len({tl.glob("a"), tl.glob("a"), tl.glob("b")}) == 2
    with pytest.raises(AttributeError):
        tl.glob("a").pattern = "b"


def test_reprs_read_as_written():
    filter_ = (tl.glob("a/**") & ~tl.named("bias")) | tl.of_type(keras.layers.Dense)
    assert repr(filter_) == "((glob('a/**') & ~named('bias')) | of_type(Dense))"
    assert repr(tl.under(MODEL.get_layer("head"))) == "under(<Dense head>)"
    assert repr(tl.matching(len)) == "matching(len)"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: tl.glob("a//b"), ValueError, r"segments joined by single slashes.*Received: 'a//b'"),
        (lambda: tl.glob(""), ValueError, r"Received: ''"),
        (lambda: tl.glob(3), TypeError, r"`pattern` must be a string. Received: 3"),
        (lambda: tl.of_type("Dense"), TypeError,
         r"`of_type` takes one or more classes of layers. Received: \('Dense',\)"),
        (lambda: tl.of_type(), TypeError, r"one or more classes"),
        (lambda: tl.named(), TypeError, r"`named` takes one or more names"),
        (lambda: tl.under("head"), TypeError, r"`submodel` must be a Keras model or layer.*Received: 'head'"),
        (lambda: tl.matching("head"), TypeError, r"`function` must take a `VariableInfo`"),
        (lambda: tl.Freeze(dict), TypeError, r"must be a path glob, a submodel, a class of layers"),
        (lambda: tl.Freeze(len), TypeError, r"write `matching\(function\)`"),
        (lambda: tl.Freeze([]), TypeError, r"A list must hold one or more"),
        (lambda: tl.Freeze(3), TypeError, r"a list of these, or a `Filter`. Received: 3."),
        (lambda: bool(tl.glob("a")), TypeError, r"no truth value: combine filters with `&`"),
    ],
)  # fmt: skip
def test_wrong_uses(make, error, text):
    with pytest.raises(error, match=text):
        make()


def blocks():
    layers = [keras.layers.Dense(3, name=f"block{index}") for index in range(4)]
    return keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.1, name="block_drop"), *layers])


@pytest.mark.parametrize(
    ("filter_", "chosen_blocks"),
    [
        (tl.first(1, of="block*"), [0]),
        (tl.first(2, of=keras.layers.Dense), [0, 1]),
        (tl.last(1, of="block*"), [3]),
        (tl.last(3, of=keras.layers.Layer), [1, 2, 3]),
        (tl.last(9, of="block*"), [0, 1, 2, 3]),
        (~tl.first(3, of="block*"), [3]),
        (tl.first(1, of="stage*"), []),
    ],
)
def test_submodels_are_counted_in_order_of_construction(filter_, chosen_blocks):
    tree = Tree.of(blocks())
    expected = [f"block{index}/{name}" for index in chosen_blocks for name in ("kernel", "bias")]
    assert [v.path for v in tree.variables if v.trainable and filter_(v)] == expected


def test_ordinals_are_values():
    assert tl.first(2, of="b*") == tl.first(2, of="b*") != tl.last(2, of="b*")
    assert repr(tl.first(2, of="b*")) == "first(2, of='b*')"
    assert repr(tl.last(1, of=keras.layers.Dense)) == "last(1, of=Dense)"
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"`n` must be a whole number, 1 or more"):
            tl.first(wrong, of="b*")
    with pytest.raises(TypeError, match=r"`of` must be a class of layers, or a path glob"):
        tl.last(1, of=int)
    with pytest.raises(tl.PolicyError, match=r"first\(1, of='stage\*'\) in .* matches no variable"):
        assert tl.Trainer(blocks(), tl.Freeze(tl.first(1, of="stage*"))).selection
