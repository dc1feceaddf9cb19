"""A treemap: rectangles within rectangles, with areas as weights say, in the order in which they are given.

Source: strip treemaps, as in Bederson, Shneiderman and Wattenberg, Ordered and quantum treemaps, 2002. They keep the
order of a model's layers, which squarified treemaps (Bruls, Huizing and van Wijk, 2000) do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# What is smaller than this share of its surroundings is drawn as large: a head of a thousandth would not be seen.
LEAST = 0.03
MOST_ADDED = 0.2  # the share of a rectangle that may be taken from the large for that
WIDE = 2.0  # times as wide as high is best: names are wide


class Rectangle(NamedTuple):
    """A rectangle, from its upper left corner.

    Attributes:
        x: How far to the right it begins.
        y: How far down it begins.
        width: Its width.
        height: Its height.
    """

    x: float
    y: float
    width: float
    height: float

    def inside(self, margin: float, top: float = 0.0) -> Rectangle:
        """Return what is left of it within a margin on all sides, and below a strip at the top."""
        width, height = max(0.0, self.width - 2 * margin), max(0.0, self.height - 2 * margin - top)
        return Rectangle(self.x + margin, self.y + margin + top, width, height)


def areas(weights: Sequence[float]) -> tuple[list[float], bool]:
    """Return the shares of an area that weights get, and whether small ones get more than theirs."""
    total = sum(weights)
    least = min(LEAST, MOST_ADDED / len(weights))
    shares = [max(weight / total, least) for weight in weights]
    return [share / sum(shares) for share in shares], any(weight / total < least for weight in weights)


def strips(shares: Sequence[float], within: Rectangle) -> list[Rectangle]:
    """Return a rectangle for each share of an area, in strips from the top, each from the left.

    Args:
        shares: The shares, which add up to 1.
        within: The area.
    """
    found: list[Rectangle] = []
    top, start = within.y, 0
    while start < len(shares):
        end = start + 1
        # A strip takes in what comes next as long as the rectangles in it come closer to the best form.
        while end < len(shares) and _misfit(shares[start : end + 1], within) <= _misfit(shares[start:end], within):
            end += 1
        together, left = sum(shares[start:end]), within.x
        height = together * within.height
        for share in shares[start:end]:
            width = within.width * share / together
            found.append(Rectangle(left, top, width, height))
            left += width
        top, start = top + height, end
    return found


def _misfit(shares: Sequence[float], within: Rectangle) -> float:
    """Return how far from the best form the rectangles of a strip would be, on average."""
    together = sum(shares)
    height = together * within.height
    ratios = [within.width * share / together / height / WIDE for share in shares]
    return sum(max(ratio, 1 / ratio) for ratio in ratios) / len(ratios)
