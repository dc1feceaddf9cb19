import pytest

from tapeloop.plots.treemap import Rectangle, areas, strips

AREA = Rectangle(1.0, 2.0, 9.0, 5.0)


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.9, 0.05, 0.05], [0.01] * 100, [0.3, 0.1, 0.2, 0.25, 0.15]])
def test_rectangles_have_the_areas_of_their_shares_and_fill_the_area_without_overlap(shares):
    found = strips(shares, AREA)
    assert [each.width * each.height for each in found] == pytest.approx([share * 45 for share in shares])
    for each in found:
        assert each.x >= 1 - 1e-9
        assert each.x + each.width <= 10 + 1e-9
        assert each.y >= 2 - 1e-9
        assert each.y + each.height <= 7 + 1e-9
    for number, one in enumerate(found):
        for other in found[:number]:  # in the order in which they are read: to the right of those before, or below
            assert other.x + other.width <= one.x + 1e-9 or other.y + other.height <= one.y + 1e-9


def test_rectangles_are_rather_wider_than_high_since_names_are():
    assert strips([0.5, 0.5], Rectangle(0, 0, 9, 2)) == [(0, 0, 4.5, 2), (4.5, 0, 4.5, 2)]
    assert strips([0.5, 0.5], AREA) == [(1, 2, 9, 2.5), (1, 4.5, 9, 2.5)]  # side by side they would be 4.5 x 5


def test_what_is_too_small_to_be_seen_is_enlarged_at_the_cost_of_the_rest():
    assert areas([60, 40]) == ([0.6, 0.4], False)
    shares, is_enlarged = areas([9990, 10])
    assert is_enlarged
    assert shares == pytest.approx([0.999 / 1.029, 0.03 / 1.029])
    shares, _ = areas([1_000_000] + [1] * 999)
    assert sum(shares[1:]) < 0.2


def test_a_margin_never_turns_a_rectangle_inside_out():
    assert AREA.inside(0.5, 1) == (1.5, 3.5, 8, 3)
    assert Rectangle(0, 0, 0.1, 0.1).inside(0.2) == (0.2, 0.2, 0, 0)
