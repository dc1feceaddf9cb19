import sys

import keras
import matplotlib
import matplotlib.style
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex

import tapeloop as tl
from tests.support import models

BLUE, ORANGE = "#0072b2", "#d55e00"
FROZEN, FIXED = "#c7c7c7", "#e6e6e6"  # of black on white, 22 and 10 %


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def filled(figure):
    """The colour, the hatching and the area of each filled rectangle."""
    return [
        (to_hex(patch.get_facecolor()), patch.get_hatch(), patch.get_width() * patch.get_height())
        for patch in figure.axes[0].patches
        if patch.get_fill()
    ]


def outlined(figure):
    """The outlines of what runs in inference mode."""
    dashed = [patch for patch in figure.axes[0].patches if not patch.get_fill() and patch.get_linestyle() != "solid"]
    return [patch.get_bbox() for patch in dashed]


def test_areas_are_parameters_colours_are_groups_and_frozen_is_hatched():
    figure = models.trainer_of(policy=tl.Freeze("base")).plot()
    assert sorted(texts(figure)) == ["base  58", "bn\n16", "conv\n40", "drop  2", "head\n195"]
    by_look = {}
    for colour, hatch, area in filled(figure):
        by_look[colour, hatch] = by_look.get((colour, hatch), 0) + area
    assert set(by_look) == {(BLUE, None), (FROZEN, "////"), (FIXED, None)}
    assert by_look[BLUE, None] / sum(by_look.values()) == pytest.approx(195 / 253, abs=0.05)
    assert by_look[FROZEN, "////"] / by_look[FIXED, None] == pytest.approx(48 / 10, rel=0.15)
    assert legend(figure) == [
        "trains, group default: 195 (77.1%)",
        "frozen: 48 (19.0%)",
        "non-trainable (statistics, seeds, flags): 10 (4.0%)",
        "in inference mode: 58 (22.9%)",
    ]
    (base,) = outlined(figure)  # and not once more around each layer in it
    assert base.width * base.height > sum(area for (colour, _), area in by_look.items() if colour != BLUE)


def test_groups_have_colours_and_numbers():
    figure = models.trainer_of(policy=tl.Groups({"top": "head", "low": "base/conv"})).plot()
    assert {colour for colour, _, _ in filled(figure)} == {BLUE, ORANGE, FROZEN, FIXED}
    assert legend(figure)[:2] == ["trains, group low: 40 (15.8%)", "trains, group top: 195 (77.1%)"]
    assert len(outlined(figure)) == 1  # `base/bn`, which is frozen; the seed of `base/drop` is not, for `base` trains


def test_many_groups_are_told_by_order_and_the_legend_stays_short():
    figure = tl.Trainer(models.blocks(12), tl.LayerwiseDecay(0.8, of=keras.layers.Dense), loss="mse").plot()
    assert len({colour for colour, _, _ in filled(figure)}) == 14
    assert len(legend(figure)) == 7
    assert legend(figure)[-1] == "trains, 8 more groups, the last block13: 88 (55.0%)"


def test_repeated_submodels_and_layers_of_a_block_are_drawn_as_one():
    layers = [keras.layers.Dense(4, name=f"block_{n}_{part}") for n in range(3) for part in ("in", "out")]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(4, name="head")])
    figure = tl.Trainer(model, tl.TrainOnly("head"), loss="mse").plot()
    assert sorted(texts(figure)) == ["block_0..2_*  120", "head\n20", "in\n3 x 20", "out\n3 x 20"]
    stacked = tl.Trainer(models.blocks(12), tl.TrainOnly("head"), loss="mse").plot()
    assert "block0..11\n12 x 12" in texts(stacked)


def test_depth_limits_what_is_drawn():
    figure = models.trainer_of(policy=tl.Freeze("base")).plot(depth=1)
    assert sorted(texts(figure)) == ["base\n58", "head\n195"]


def test_what_is_shared_is_drawn_once():
    shared = keras.layers.Dense(4, name="shared")
    parts = [keras.Sequential([keras.Input((4,)), shared, keras.layers.Dense(4, name=f"own_{n}")]) for n in "ab"]
    figure = tl.Trainer({"one": parts[0], "two": parts[1]}, loss="mse").plot()
    assert legend(figure) == ["trains, group default: 60 (100.0%)"]
    assert sum(text.startswith("shared") for text in texts(figure)) == 1
    assert "two  20" in texts(figure)


def require_readable(figure):
    renderer = figure.canvas.get_renderer()
    found = figure.axes[0].texts
    boxes = [text.get_window_extent(renderer) for text in found]
    width, height = figure.bbox.size
    for number, box in enumerate(boxes):
        assert 0 <= box.x0 <= box.x1 <= width, found[number]
        assert 0 <= box.y0 <= box.y1 <= height, found[number]
        assert not any(box.overlaps(other) for other in boxes[:number]), found[number]
    assert len(found) > 15


def test_texts_on_a_large_map_are_within_it_and_do_not_overlap():
    # Side by side, and of very different sizes, as those of `keras.applications` are.
    layers = []
    for block in range(12):
        for part in ("expand", "expand_BN", "depthwise", "project", "project_BN"):
            kind = {"name": f"block_{block}_{part}"}
            is_norm = part.endswith("BN")
            layers.append(
                keras.layers.BatchNormalization(**kind)
                if is_norm
                else keras.layers.Dense(2 ** (2 + block // 2), **kind)
            )
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(500, name="predictions")])
    for policy in (tl.Freeze("block_?_*"), tl.TrainOnly("**/gamma", "**/beta", "predictions")):
        require_readable(tl.Trainer(model, policy, loss="mse").plot())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("MobileNetV2", tl.Freeze("block_?_*", "Conv1")),
        ("ResNet50", tl.Freeze("conv[1234]*")),
        ("InceptionResNetV2", tl.TrainAll()),
    ],
)
def test_texts_on_the_maps_of_large_models_are_within_them_and_do_not_overlap(name, policy):
    model = getattr(keras.applications, name)(weights=None)
    require_readable(tl.Trainer(model, policy, loss="mse").plot())


def test_the_title_says_what_is_drawn_and_is_cut_to_the_picture():
    figure = models.trainer_of(policy=tl.Freeze(*["base/conv"] * 30)).plot()
    first, second = figure.texts[0].get_text().split("\n")
    assert first.startswith("Functional '")
    assert first.endswith("', 253 parameters")
    assert second.startswith("Freeze(glob('base/conv'), glob(")
    assert second.endswith("…")


def test_colours_follow_the_style_and_the_state_of_matplotlib_is_left_as_it_is(tmp_path):
    trainer, backend = models.trainer_of(policy=tl.Freeze("base")), matplotlib.get_backend()
    with matplotlib.style.context("dark_background"):
        settings, figures = matplotlib.rcParams.copy(), pyplot.get_fignums()
        figure = trainer.plot(tmp_path / "map.png")
        assert (matplotlib.rcParams, pyplot.get_fignums()) == (settings, figures)
    assert matplotlib.get_backend() == backend
    assert {colour for colour, _, _ in filled(figure)} == {BLUE, "#383838", "#1a1a1a"}  # of white on black
    assert to_hex(figure.get_facecolor()) == "#000000"
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": "map.pdf"}, r"`path` must end in \.png or \.svg, .* Received: 'map\.pdf'\."),
        ({"depth": 0}, r"`depth` must be a whole number, 1 or more\. Received: 0\."),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        models.trainer_of().plot(**arguments)


def test_a_missing_matplotlib_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"`trainer\.plot` draws with matplotlib, .* `pip install matplotlib`"):
        models.trainer_of().plot()
