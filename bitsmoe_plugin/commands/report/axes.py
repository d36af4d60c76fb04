"""Axes that several plots share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bitsmoe_plugin.commands.report.style import Look, readable_on

CELLS_WITH_GAPS = 400
"""Up to so many cells stand apart; more would be nothing but gaps on a phone."""


def short(value: float) -> str:
    """A number for a tick: 0.02, 5, 300, 20k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.3g}"


def per_cent(value: float) -> str:
    """A percentage for a tick."""
    return f"{value:.3g} %"


def format_ticks(axis: Any, text: Any = short) -> None:
    """Numbers of an axis as ``text`` gives them; mathematical ones would look foreign on the page."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


_STEPS = (
    (2.5, (1.0,)),
    (1.6, (1.0, 3.0)),
    (0.8, (1.0, 2.0, 5.0)),
    (-1.0, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)),
)
"""Decades of more than so many -> what is written in each of them."""


def logarithmic(axes: Axes, values: np.ndarray, text: Any = short, axis: str = "y") -> None:
    """Logarithmic from the smallest to the largest positive value, with at least two numbers on it."""
    values = values[values > 0]
    own = axes.yaxis if axis == "y" else axes.xaxis
    if len(values):
        (axes.set_yscale if axis == "y" else axes.set_xscale)("log")
        decades = np.log10(values.max() / values.min())
        steps = next(steps for least, steps in _STEPS if decades > least)
        own.set_major_locator(LogLocator(subs=steps, numticks=12))
        own.set_minor_locator(LogLocator(subs=(), numticks=12))
    format_ticks(own, text)


def layer_ticks(axes: Axes, labels: Sequence[str], axis: str = "x") -> None:
    """Numbers of layers at positions 0, 1, ...: all of them, or as many as have room."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if len(labels) / s <= 13)
    places = range(0, len(labels), step)
    (axes.set_xticks if axis == "x" else axes.set_yticks)(list(places), [labels[i] for i in places])


def heat_map(axes: Axes, values: np.ndarray, look: Look, norm: Normalize | None = None) -> Any:
    """Cells of ``values`` ``[rows, columns]``, the first row on top; nan is left empty.

    Returns:
        what a colour bar is made of.
    """
    gaps = values.size <= CELLS_WITH_GAPS
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    drawn = axes.pcolormesh(
        values,
        cmap=look.colours(),
        norm=norm or value_range(values),
        edgecolors=look.theme.surface if gaps else "none",
        linewidth=1.5 if values.size <= CELLS_WITH_GAPS // 4 else 0.6,
        rasterized=not gaps,
    )
    axes.set_ylim(len(values), 0)
    return drawn


def centre_ticks(axes: Axes) -> None:
    """Move the ticks of ``layer_ticks`` from the edges of cells to their middles."""
    axes.set_xticks(axes.get_xticks() + 0.5, [text.get_text() for text in axes.get_xticklabels()])


def value_range(values: np.ndarray) -> Normalize:
    """From the smallest to the largest value; a little around it if there is only one."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return Normalize(low, high) if high > low else Normalize(low - 0.5, high + 0.5)


def write_in_cells(axes: Axes, drawn: Any, values: np.ndarray) -> None:
    """The number of each cell inside it."""
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        colour = readable_on(drawn.cmap(drawn.norm(value)))
        axes.text(
            column + 0.5, row + 0.5, f"{value:.2f}", color=colour, ha="center", va="center", fontsize=8.5
        )


def colour_bar(axes: Axes, drawn: Any, label: str, look: Look) -> None:
    """A thin colour bar: right of the axes, in the narrow format below."""
    assert isinstance(axes.figure, Figure)
    height = axes.figure.get_figheight()
    place = (
        {"location": "bottom", "aspect": 40, "pad": 0.03}
        if look.narrow
        else {"aspect": max(18, 9 * height), "pad": 0.015}
    )
    bar = axes.figure.colorbar(drawn, ax=axes, **place)  # type: ignore[arg-type]
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    bar.set_label(label)


def ranges(axes: Axes, values: Sequence[np.ndarray | None], look: Look) -> None:
    """For each layer the whole range, the middle 80 per cent and the median of its experts."""
    thick = 9 if len(values) <= 8 else 5 if len(values) <= 24 else 2.5
    blue = look.theme.series[0]
    for place, own in enumerate(values):
        if own is None:
            continue
        low, tenth, median, ninetieth, high = np.quantile(np.clip(own, 0, None), (0, 0.1, 0.5, 0.9, 1))
        axes.plot([place] * 2, [low, high], color=blue, linewidth=1, alpha=0.75)
        axes.plot([place] * 2, [tenth, ninetieth], color=blue, linewidth=thick, alpha=0.45)
        axes.plot(place, median, "o", color=blue, markersize=max(thick / 1.8, 3))
    axes.set_xlim(-0.6, len(values) - 0.4)
