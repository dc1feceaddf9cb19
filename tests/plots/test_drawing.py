"""What the pictures have in common."""

import pytest

from tapeloop.plots.drawing import legend_groups


@pytest.mark.parametrize(("count", "own"), [(0, 0), (7, 7), (8, 6), (20, 6)])
def test_a_legend_has_seven_lines_of_groups_at_most(count, own):
    groups = [f"group{number}" for number in range(count)]
    assert legend_groups(groups) == (groups[:own], groups[own:])
