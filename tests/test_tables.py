import pickle

import numpy as np
import pytest

import tapeloop as tl
from tapeloop._table import format_count, html_table, shortened, table
from tests.support import models
from tests.support.histories import history_of

TEXT = """
name      number
----------------
a              1
<i>b</i>   2,000
----------------
totals           3
  of it          1
"""


def test_a_table_is_text_with_columns_and_totals():
    made = table(
        ("name", "number"), [("a", "1"), ("<i>b</i>", "2,000")], {"number"}, [("totals", "3"), ("  of it", "1")]
    )
    assert made == TEXT.strip("\n")
    assert table(("name", "number"), []) == "name  number\n------------"
    copy = pickle.loads(pickle.dumps(made))
    assert (copy, copy.html) == (made, made.html)


def test_html_is_escaped_aligned_and_without_colours():
    made = html_table(("name", "number"), [("<i>b</i>", "2,000"), ("  of it", "1")], {"number"}, "a & b")
    assert made == (
        "<table><caption>a &amp; b</caption>"
        '<thead><tr><th style="text-align: left">name</th><th style="text-align: right">number</th></tr></thead><tbody>'
        '<tr><td style="text-align: left">&lt;i&gt;b&lt;/i&gt;</td><td style="text-align: right">2,000</td></tr>'
        '<tr><td style="text-align: left; padding-left: 2em">of it</td><td style="text-align: right">1</td></tr>'
        "</tbody></table>"
    )


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, []), (3, [0, 1, 2]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, None, 4, 5, 6]), (99, [0, 1, None, 96, 97, 98])],
)
def test_long_lists_are_shortened_in_the_middle(count, shown):
    assert shortened(range(count), 6) == shown


def test_a_history_shows_its_logs_and_phases():
    logs = [{"loss": 0.123456, "<b>": np.arange(20.0)}] * 40
    policy = tl.Phases({0: tl.TrainOnly("head"), 2: tl.TrainAll()})
    html = history_of(models.blocks(1), policy, epochs=40, logs=logs)._repr_html_()
    assert "<b>" not in html
    assert html.count("0.1235") == 14  # and a row of dots
    assert "[ 0.  1. ... 18. 19.]" in html
    assert "TrainOnly(glob(&#x27;head&#x27;))" in html
    assert "default: 2 variables, 4 parameters" in html
    assert tl.History()._repr_html_().count("<tr>") == 2  # the headers of the two tables


def test_a_frontier_shows_what_it_prints():
    found = tl.Frontier(("base<1>",), 20, 8, 0.5)
    assert found._repr_html_().count("<tr>") == 3
    assert "`base&lt;1&gt;`" in found._repr_html_()
    assert "160 bytes for 8 examples" in found._repr_html_()
    none = tl.Frontier(obstacles=("`base/kernel` trains and comes first", "`x` mixes"))
    assert none._repr_html_().count("<tr>") == 3
    assert "mixes" in none._repr_html_()


def test_one_thing_and_several():
    assert format_count(1, "batch", "batches") == "1 batch"
    assert (format_count(0, "step"), format_count(2000, "step")) == ("0 steps", "2,000 steps")
