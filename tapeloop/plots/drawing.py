"""A figure that is being drawn: its colours, how wide a text is, and where it goes.

Nothing here touches what pyplot knows or the user's settings. Text and backgrounds have the colours of the user's style
at this moment; what has a meaning is coloured so that the colour-blind can tell it apart, on light and on dark.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

Figure: TypeAlias = Any  # matplotlib.figure.Figure: matplotlib is an optional package, and may not be there
Colour: TypeAlias = tuple[float, float, float]
T = TypeVar("T")

SUFFIXES = ".png", ".svg"
DOTS_PER_INCH = 150  # of a file, unless the user's style says otherwise
# Okabe and Ito's colours, without black, which is a background; the palest last.
PALETTE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"


class Drawing:
    """A figure, and what drawing it needs.

    Attributes:
        figure: The figure.
        ink: The colour of text in the user's style.
        paper: The colour behind it.
    """

    def __init__(self, asked: str, path: str | os.PathLike[str] | None, size: tuple[float, float]) -> None:
        """Make an empty figure.

        Args:
            asked: What the user called, for the message if matplotlib is missing.
            path: Where the picture is written, if anywhere.
            size: Width and height in inches.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: `path` has another suffix than .png and .svg, or its folder is not there.
        """
        self.path = checked_path(path)
        self.matplotlib = _matplotlib(asked)
        self.figure = self.part("figure").Figure(figsize=size, layout="none")
        # The canvas that measures texts; it is attached to this figure alone.
        self._renderer = self.part("backends.backend_agg").FigureCanvasAgg(self.figure).get_renderer()
        colours, style = self.part("colors"), self.matplotlib.rcParams
        self.ink: Colour = colours.to_rgb(style["text.color"])
        paper = colours.to_rgba(style["figure.facecolor"])
        # Behind a transparent figure is a page on which the ink can be read.
        self.paper: Colour = paper[:3] if paper[3] else readable_on(self.ink)

    def part(self, name: str) -> Any:
        """Return a module of matplotlib."""
        return importlib.import_module(f"matplotlib.{name}")

    def colours(self, count: int) -> list[Colour]:
        """Return colours for things that stand in an order."""
        if count <= len(PALETTE):
            return [self.part("colors").to_rgb(colour) for colour in PALETTE[:count]]
        # As many as this cannot be told apart: then their order shows. The ends of the map are near black and white.
        scale = self.matplotlib.colormaps["viridis"]
        return [scale(0.15 + 0.8 * number / (count - 1))[:3] for number in range(count)]

    def mixed(self, colour: Colour, share: float) -> Colour:
        """Return a share of a colour on the paper."""
        red, green, blue = (share * one + (1 - share) * other for one, other in zip(colour, self.paper))
        return red, green, blue

    def width(self, text: str, size: float) -> float:
        """Return the width of a text in inches, at a size in points."""
        font = self.part("font_manager").FontProperties(size=size)
        wide = [self._renderer.get_text_width_height_descent(line, font, False)[0] for line in text.split("\n")]
        return max(wide) / self.figure.dpi

    def fitting(self, texts: Sequence[str], size: float, width: float) -> str:
        """Return the first of some texts that is no wider than so many inches; if none is, nothing."""
        return next((text for text in texts if self.width(text, size) <= width), "")

    def finish(self) -> Figure:
        """Write the figure, if it has a path, and return it."""
        # A notebook shows figures of itself only once pyplot was imported.
        vars(self.figure).update(_repr_png_=functools.partial(_png, self.figure))
        if self.path is not None:
            style = self.matplotlib.rcParams["savefig.dpi"]
            dots = DOTS_PER_INCH if style == "figure" else style
            self.figure.savefig(self.path, dpi=dots, facecolor=self.figure.get_facecolor())
        return self.figure


def checked_path(path: str | os.PathLike[str] | None) -> pathlib.Path | None:
    """Check where a picture shall be written.

    Raises:
        ValueError: `path` has another suffix than .png and .svg, or its folder is not there.
    """
    if path is None:
        return None
    file = pathlib.Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"`path` must end in .png or .svg, by which the format is told. Received: {str(path)!r}.")
    if not file.parent.is_dir():
        raise ValueError(
            f"`path` must be in a folder that is there: make {str(file.parent)!r}. Received: {str(path)!r}."
        )
    return file


def legend_groups(groups: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Return the groups that have a line of their own in a legend, and the rest, which share one."""
    most = 6 if len(groups) > 7 else len(groups)
    return groups[:most], groups[most:]


def luminance(colour: Colour) -> float:
    """Return the relative luminance of a colour, from 0 to 1: as the contrast rules of WCAG 2 define it."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def readable_on(colour: Colour) -> Colour:
    """Return black or white, whichever has the higher contrast to a colour."""
    return (0.0, 0.0, 0.0) if luminance(colour) > 0.179 else (1.0, 1.0, 1.0)


def plain(text: str) -> str:
    """Return a text that matplotlib shows as it is: names may hold dollars, which would begin a formula."""
    return text.replace("$", r"\$")


def shortened_path(path: str, most: int = 36) -> str:
    """Return a path with its middle left out, if it is longer than so many characters."""
    if len(path) <= most:
        return path
    if " to " in path:
        return " to ".join(shortened_path(side, most // 2 - 2) for side in path.split(" to "))
    # The end says more than the beginning: layers of one kind begin alike.
    return f"{path[: most // 3]}…{path[len(path) - (most - most // 3 - 1) :]}"


def _matplotlib(asked: str) -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            f"`{asked}` draws with matplotlib, which cannot be imported here ({error}). Install it: "
            "`pip install matplotlib`, or tapeloop with its extra `plot`."
        ) from error


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=figure.get_facecolor())
    return file.getvalue()
