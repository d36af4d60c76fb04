"""How plots look: one palette for light and one for dark pages, a wide and a narrow format."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bitsmoe_plugin.presets import ALL_WIDTHS

WIDE, NARROW = 8.8, 3.6
"""Inches, of 100 CSS pixels: the page's column on a large screen and on a phone."""
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of a page's background and what stands on it.

    Series are told apart by people who see no red or no green, and in print by their markers: colours of
    Okabe and Ito, "Color Universal Design" (2008), blue and green darker or lighter for contrast.

    Attributes:
        empty: of rows that are dropped.
        series: blue, orange, green.
        colours: sequential, from near the background to far from it.
        first: where on it the smallest value is.
    """

    name: str
    surface: str
    ink: str
    muted: str
    line: str
    empty: str
    series: tuple[str, str, str]
    colours: str
    first: float


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    ink="#1c2430",
    muted="#5a6675",
    line="#dde2e8",
    empty="#e9ecf0",
    series=("#0072b2", "#d55e00", "#008060"),
    colours="viridis_r",
    first=0.08,
)
DARK = Theme(
    name="dark",
    surface="#171c23",
    ink="#e8ecf1",
    muted="#9aa7b5",
    line="#303945",
    empty="#2a323c",
    series=("#56b4e9", "#e69f00", "#2ec79b"),
    colours="viridis",
    first=0.18,
)


@dataclass(frozen=True)
class Look:
    """A theme in one of two formats."""

    theme: Theme
    narrow: bool = False

    @property
    def width(self) -> float:
        """Of a figure, in inches."""
        return NARROW if self.narrow else WIDE

    def figure(self, height: float) -> Figure:
        """A figure of the format's width.

        Args:
            height: inches.
        """
        return Figure(figsize=(self.width, height), layout="constrained")

    def panels(self, count: int, height: float, columns: int | None = None, **options: Any) -> list[Axes]:
        """Axes next to each other, in the narrow format one below the other.

        Args:
            height: of one panel, inches.
            columns: in the wide format; default: all.
            options: of ``Figure.subplots``.
        """
        across = 1 if self.narrow else columns or count
        down = -(-count // across)
        figure = self.figure(down * height)
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)
        engine.set(w_pad=0.11, h_pad=0.08)
        axes = figure.subplots(down, across, squeeze=False, **options)
        return list(axes.flat)

    def colours(self) -> Colormap:
        """Sequential, without the end that is lost on the background."""
        return ListedColormap(mpl.colormaps[self.theme.colours](np.linspace(self.theme.first, 1, 256)))

    def line_colour(self, share: float) -> Any:
        """Of one of many lines, from 0 to 1: a thin line needs more contrast than an area."""
        return self.colours()(0.2 + 0.8 * share)

    def width_colour(self, width: int) -> Any:
        """Of rows of so many bits; the same in every report."""
        steps = [w for w in ALL_WIDTHS if w]
        return self.colours()(steps.index(width) / (len(steps) - 1)) if width else self.theme.empty


@contextmanager
def applied(look: Look) -> Iterator[None]:
    """Settings of matplotlib for figures that are made and saved inside."""
    theme = look.theme
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 9.5,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.titlepad": 7,
                "axes.labelsize": 8.5,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "grid.color": theme.line,
                "grid.linewidth": 0.7,
                "lines.linewidth": 1.6,
                "lines.markersize": 5,
                "legend.frameon": False,
                "legend.fontsize": 8.5,
                "legend.handlelength": 1.6,
                "xtick.labelsize": 8,
                "ytick.labelsize": 8,
                "xtick.major.size": 3,
                "ytick.major.size": 0,
                "figure.facecolor": theme.surface,
                "axes.facecolor": theme.surface,
                "axes.edgecolor": theme.line,
                "axes.labelcolor": theme.muted,
                "xtick.color": theme.line,
                "ytick.color": theme.line,
                "xtick.labelcolor": theme.muted,
                "ytick.labelcolor": theme.muted,
                "text.color": theme.ink,
                "svg.fonttype": "none",  # text in the reader's own font, and searchable
                "svg.hashsalt": "bitsmoe",  # the same ids each time
            }
        )
        yield


def readable_on(colour: Any) -> str:
    """Black or white, whichever is told apart better from a background."""
    red, green, blue = to_rgb(colour)
    return "#10151b" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


def svg_uri(figure: Figure) -> str:
    """A figure as ``data:image/svg+xml``, the same for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace("'DejaVu Sans'", FONTS.replace("'", ""))
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG, at twice the pixels of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()
