import io
import sys

import pytest

from tapeloop.loop.progress import ProgressDisplay


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(style, stream, **options):
    """Ten batches of 8 examples, one every 0.03 s; returns how often the logs were asked for."""
    clock, asked = Clock(), []

    def logs():
        asked.append(clock.now)
        return {"loss": 0.5, "accuracy": 0.25}, 8 * round(clock.now / 0.03)

    progress = ProgressDisplay(style, stream=stream, clock=clock, **options)
    progress.start("epoch 1/2", 10)
    for _ in range(10):
        clock.now += 0.03
        progress.advance(1, logs)
    progress.end({"loss": 0.125, "accuracy": 1.0}, 80)
    return asked


LINE = "epoch 1/2: loss 0.125, accuracy 1, 267 examples/s, 0.3 s\n"


@pytest.mark.parametrize(("style", "written"), [(2, LINE), (0, "")])
def test_lines_are_one_a_pass_and_none_is_silent(style, written):
    stream = io.StringIO()
    assert run(style, stream) == []
    assert stream.getvalue() == written


def test_a_bar_asks_for_what_it_shows_at_most_every_tenth_of_a_second(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # or a fast bar's own rate may leave no room for the logs
    stream = io.StringIO()
    assert run(1, stream) == pytest.approx([0.12, 0.24])
    assert "epoch 1/2: 100%" in stream.getvalue()
    assert "loss 0.5, accuracy 0.25, 267 examples/s" in stream.getvalue()
    assert "loss 0.125, accuracy 1, 267 examples/s" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("make", [Terminal, io.StringIO], ids=["a terminal", "a log file"])
def test_by_itself_a_terminal_gets_a_bar_and_a_log_file_lines(make):
    stream = make()
    run("auto", stream)
    assert (stream.getvalue() == LINE) == (make is io.StringIO)
    assert ("100%" in stream.getvalue()) == (make is Terminal)


def test_a_pass_that_raises_leaves_a_closed_bar():
    stream = io.StringIO()
    progress = ProgressDisplay(1, stream=stream)
    progress.start("epoch", 3)
    progress.close()
    progress.close()
    assert stream.getvalue().endswith("\n")


def test_other_styles_are_refused():
    with pytest.raises(ValueError, match=r"`verbose` must be 'auto', 0 \(nothing\), 1 .* or 2 .*. Received: 'loud'"):
        ProgressDisplay("loud")


class WritesOnly:
    """All that a display may ask of a stream."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Breaks(Terminal):
    """A terminal that goes away."""

    def write(self, text):
        raise BrokenPipeError("the other side has gone")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


# When a bar that could not be made is collected, an older tqdm raises; Python ignores that, pytest reports it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("style", ["auto", 1, 2])
@pytest.mark.parametrize("make", [WritesOnly, Breaks, closed, lambda: None], ids=["writes", "breaks", "closed", "none"])
def test_training_never_fails_because_of_a_display(style, make, monkeypatch):
    stream = make()
    if stream is None:
        monkeypatch.setattr(sys, "stderr", None)
    run(style, stream)
    if isinstance(stream, WritesOnly):
        assert style == 1 or "epoch 1/2" in stream.text


def test_a_terminal_of_no_columns_shows_a_bar_all_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")  # and standard output is no terminal here
    stream = Terminal()
    run("auto", stream)
    assert "epoch 1/2" in stream.getvalue()
