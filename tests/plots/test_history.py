import math
import pickle
import sys

import keras
import matplotlib
import matplotlib.style
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex

import tapeloop as tl
from tapeloop.loop.history import History
from tests.support import models
from tests.support.histories import history_of

TWO_STAGES = tl.GradualUnfreeze(["head", "block*"], every=2)
BLUE, ORANGE = "#0072b2", "#d55e00"


def rows(axes):
    """The labels of a timeline, each with the stretches in which it trained and their colour."""
    labels = [label.get_text() for label in axes.get_yticklabels()]
    found = {label: [] for label in labels}
    for bars in axes.collections:
        for path in bars.get_paths():
            (left, low), (right, high) = path.get_extents().min, path.get_extents().max
            span = round(float(left), 3), round(float(right), 3), to_hex(bars.get_facecolor()[0])
            found[labels[round((low + high) / 2)]].append(span)
    return {label: sorted(spans) for label, spans in found.items()}


def above(axes):
    """What stands above the phases."""
    return [text.get_text() for text in axes.texts]


def shades(axes):
    """Where the shades of phases begin and end."""
    # A rectangle, or in an older Matplotlib a polygon.
    extents = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in axes.patches]
    return [(each.x0, each.x1) for each in extents]


def test_logs_are_drawn_over_the_phases_and_what_trained_below():
    figure = history_of(models.blocks(), TWO_STAGES).plot()
    loss, timeline = figure.axes
    assert (loss.get_ylabel(), timeline.get_xlabel()) == ("loss", "epoch")
    training, validation = loss.get_lines()
    assert (training.get_linestyle(), validation.get_linestyle()) == ("-", "--")
    assert [to_hex(line.get_color()) for line in (training, validation)] == [BLUE, ORANGE]
    assert list(training.get_xdata()) == [1, 2, 3, 4]
    assert list(training.get_ydata()) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    assert shades(loss) == shades(timeline) == [(0, 2), (2, 4)]
    assert above(loss) == ["head", "block0..3, head"]
    assert rows(timeline) == {"stem": [], "block0..3": [(2, 4, BLUE)], "head": [(0, 4, BLUE)]}
    assert not figure.legends  # one group, and nothing trains in part


def test_steps_may_be_counted_instead_of_epochs():
    loss, timeline = history_of(models.blocks(), TWO_STAGES).plot(by="step").axes
    assert timeline.get_xlabel() == "step"
    assert list(loss.get_lines()[0].get_xdata()) == [10, 20, 30, 40]
    assert rows(timeline)["block0..3"] == [(20, 40, BLUE)]


def test_groups_have_colours_and_parts_are_lighter():
    model = models.blocks(1)
    first = tl.Groups({"late": "head"})
    second = tl.Groups({"late": ["head", "block0/bias"], "early": "stem"})
    figure = history_of(model, tl.Phases({0: first, 3: second})).plot()
    found = rows(figure.axes[1])
    assert found["head"] == [(0, 4, BLUE)]
    assert found["stem"] == [(3, 4, ORANGE)]
    assert [span[:2] for span in found["block0"]] == [(3, 4)]
    assert found["block0"][0][2] not in (BLUE, ORANGE)  # the kernel, which is most of it, does not train
    assert found["block0/bias"] == [(3, 4, BLUE)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "group late",
        "group early",
        "pale: a part of it trains",
    ]


def test_groups_that_train_together_in_a_submodel_share_its_row():
    policy = tl.Groups({"kernels": "**/kernel", "biases": "**/bias"})
    history = history_of(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")]), policy)
    spans = rows(history.plot().axes[1])["head"]
    assert spans == [(0, 4, BLUE), (0, 4, ORANGE)]


def test_one_epoch_of_many_phases_shows_when_within_it_each_began():
    history = history_of(models.blocks(), tl.RandomSubset(1, of="block*", every=1), epochs=1, steps=300, every=1)
    assert len(history.phases) > 150
    loss, timeline = history.plot().axes
    assert not shades(loss)  # too narrow to be seen
    assert above(loss) == [f"{len(history.phases)} phases"]
    found = rows(timeline)
    assert list(found) == ["stem", "block0", "block1", "block2", "block3", "head"]
    covered = [span for label, spans in found.items() for span in spans]
    assert sum(right - left for left, right, _ in covered) == pytest.approx(1, abs=0.01)
    assert (min(covered)[0], max(span[1] for span in covered)) == (0, 1)
    drawn = {phase.step: phase.selection.trained[0].path.partition("/")[0] for phase in history.phases}
    assert any(
        left == pytest.approx(history.phases[5].step / 300, abs=1e-3)
        for left, _, _ in found[drawn[history.phases[5].step]]
    )


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_a_phase_of_an_epoch_that_was_not_finished_is_left_out(by):
    history = history_of(models.blocks(1), TWO_STAGES, epochs=4)
    for values in (*history.history.values(), history.epoch, history.step):
        del values[2:]
    loss, timeline = history.plot(by=by).axes
    end = {"epoch": 2, "step": 20}[by]
    assert above(loss) == ["head"]
    assert rows(timeline) == {"stem": [], "block0": [], "head": [(0, end, BLUE)]}


def test_a_flat_model_with_more_layers_than_rows_has_neighbours_in_one():
    layers = [keras.layers.Dense(2, name=name) for k in range(9) for name in (f"b{k}_in", f"b{k}_mid", f"b{k}_out")]
    model = keras.Sequential([keras.Input((2,)), *layers])
    # Every other block trains, so that none of them looks like the next.
    policy = tl.Phases({k: tl.TrainOnly(f"b{k}_*") for k in range(0, 9, 2)})
    found = rows(history_of(model, policy, epochs=9).plot().axes[1])
    assert list(found) == ["b0_*", "b1_*", "b2_*", "b3_*", "b4_*", "b5_*", "b6_*", "b7_*", "b8_*"]
    assert found["b2_*"] == [(2, 4, BLUE)]
    assert found["b3_*"] == []


def test_each_metric_has_a_panel_and_some_may_be_chosen():
    logs = [{"loss": 1.0, "acc": 0.5, "val_acc": 0.4}, {"loss": 0.5, "acc": 0.6, "val_acc": 0.5}]
    history = history_of(models.blocks(1), tl.TrainAll(), epochs=2, logs=logs)
    assert [axes.get_ylabel() for axes in history.plot().axes] == ["loss", "acc", ""]
    assert [axes.get_ylabel() for axes in history.plot(metrics="acc").axes] == ["acc", ""]
    assert [axes.get_ylabel() for axes in history.plot(metrics=["acc", "loss"]).axes] == ["acc", "loss", ""]


def test_epochs_without_a_value_are_gaps_and_several_values_a_range():
    nan = math.nan
    several = np.array([0.2, 0.4]), nan, np.array([0.6, math.inf, 1.0])
    logs = [{"loss": value, "each": array} for value, array in zip([1.0, nan, math.inf], several)]
    history = history_of(models.blocks(1), tl.TrainAll(), epochs=3, logs=logs)
    loss, each, _ = history.plot().axes
    (line,) = loss.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), [1.0, nan, nan])
    assert line.get_markevery() == [0]  # alone, it would be no line
    np.testing.assert_allclose(each.get_lines()[0].get_ydata(), [0.3, nan, 0.8])
    assert each.get_ylabel() == "each\n(mean and range)"
    extents = [path.get_extents() for path in each.collections[0].get_paths() if len(path.vertices)]
    assert extents[0].ymin == pytest.approx(0.2)
    assert extents[-1].ymax == pytest.approx(1.0)


def test_of_many_epochs_those_alone_have_dots():
    logs = [{"loss": 1.0 if epoch in (0, 10, 20, 21, 49) else math.nan} for epoch in range(50)]
    (line,) = history_of(models.blocks(1), tl.TrainAll(), epochs=50, logs=logs).plot().axes[0].get_lines()
    assert line.get_markevery() == [0, 10, 49]


def test_a_log_without_any_finite_value_says_so():
    history = history_of(models.blocks(1), tl.TrainAll(), epochs=2, logs=[{"loss": math.nan}] * 2)
    assert "no finite value" in [text.get_text() for text in history.plot().axes[0].texts]


def test_names_that_would_be_formulas_are_shown_as_they_are():
    history = history_of(models.blocks(1), tl.Groups({"$a$_b": "head", "c": "stem"}), logs=[{"$x^2$": 1.0}] * 4)
    figure = history.plot()
    figure.draw_without_rendering()
    assert figure.axes[0].get_ylabel() == r"\$x^2\$"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["group c", r"group \$a\$_b"]


def test_what_is_written_is_what_its_suffix_says(tmp_path):
    history = history_of(models.blocks(1), tl.TrainAll(), epochs=1)
    history.plot(tmp_path / "a.png", metrics="loss")
    history.plot(str(tmp_path / "a.SVG"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "a.SVG").read_bytes()


def test_the_state_of_matplotlib_is_left_as_it_is_and_a_notebook_shows_the_figure():
    backend = matplotlib.get_backend()  # which is chosen when it is first asked for
    settings, figures = matplotlib.rcParams.copy(), pyplot.get_fignums()
    figure = history_of(models.blocks(1), tl.TrainAll(), epochs=1).plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert (matplotlib.rcParams, pyplot.get_fignums(), matplotlib.get_backend()) == (settings, figures, backend)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure)).axes[0].get_ylabel() == "loss"


def test_backgrounds_and_shades_follow_the_style_of_the_moment():
    history = history_of(models.blocks(1), tl.TrainAll(), epochs=1)
    light = history.plot()
    with matplotlib.style.context("dark_background"):
        dark = history.plot()
    assert (to_hex(light.get_facecolor()), to_hex(dark.get_facecolor())) == ("#ffffff", "#000000")
    shade = [sum(figure.axes[0].patches[0].get_facecolor()[:3]) for figure in (light, dark)]
    assert shade == pytest.approx([3 - 3 * 0.04, 3 * 0.04])
    assert rows(light.axes[1]) == rows(dark.axes[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": "acc"}, r"`metrics` must name logs of the history, .* They are \['loss'\]\. Received: 'acc'\."),
        ({"metrics": ["loss", "val_loss"]}, r"without `val_`, which is drawn beside them"),
        ({"metrics": []}, r"Received: \[\]\."),
        ({"by": "batch"}, r"`by` must be 'epoch' or 'step'\. Received: 'batch'\."),
        ({"path": "a.gif"}, r"`path` must end in \.png or \.svg, .* Received: 'a\.gif'\."),
        ({"path": "nowhere/a.png"}, r"`path` must be in a folder that is there: make 'nowhere'\. Received: 'nowhere/a"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, said):
    history = history_of(models.blocks(1), tl.TrainAll(), epochs=1)
    with pytest.raises(ValueError, match=said):
        history.plot(**options)


def test_a_history_without_epochs_is_refused():
    with pytest.raises(ValueError, match=r"There is nothing to draw: the history has no epoch .* Train one by `fit`"):
        History().plot()


def test_a_history_without_steps_is_drawn_by_epochs_alone():
    history = history_of(models.blocks(1), TWO_STAGES)
    history.step = []
    assert rows(history.plot().axes[1])["head"] == [(0, 4, BLUE)]
    with pytest.raises(ValueError, match=r"`by='step'` needs .* has 4 epochs and 0 steps: .* Draw it by='epoch'\."):
        history.plot(by="step")


def test_a_history_without_phases_has_its_logs_alone():
    history = History({"loss": [1.0, 0.5]}, [3, 4])
    (loss,) = history.plot().axes
    assert list(loss.get_lines()[0].get_xdata()) == [3, 4]


def test_a_missing_matplotlib_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = r"`history\.plot` draws with matplotlib, .* Install it: `pip install matplotlib`, or .* extra `plot`\."
    with pytest.raises(ImportError, match=said):
        history_of(models.blocks(1), tl.TrainAll(), epochs=1).plot()


def test_a_fit_records_the_steps_by_which_epochs_ended():
    trainer = tl.Trainer(models.blocks(1), loss="mse")
    data = np.ones((16, 3)), np.ones((16, 1))
    first, second = (trainer.fit(data, batch_size=8, verbose=0) for _ in range(2))
    assert (first.step, second.step, trainer.history.step) == ([2], [4], [2, 4])
    loss, timeline = second.plot(by="step").axes
    assert list(loss.get_lines()[0].get_xdata()) == [4]
    assert rows(timeline)["head"] == [(2, 4, BLUE)]
