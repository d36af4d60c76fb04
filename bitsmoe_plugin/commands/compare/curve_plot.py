"""KL divergence from full precision against counted bits, one line per method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitsmoe_plugin.commands.report.axes import format_ticks, logarithmic
from bitsmoe_plugin.commands.report.style import DARK, LIGHT, Look, applied, png_bytes

NAME = "kl-by-bits"
_NAMES = {"bitsmoe": "BitsMoE", "gptq": "GPTQ", "autoround": "AutoRound", "rtn": "rounded to nearest"}
_MARKERS = "osD^vP"


def plots(rows: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """File name and content, for light and for dark pages; nothing if no row is other than its original."""
    series = curves(rows)
    if not series:
        return
    for theme, name in ((LIGHT, NAME), (DARK, f"{NAME}-dark")):
        look = Look(theme)
        with applied(look):
            yield f"{name}.png", png_bytes(draw(series, look))


def curves(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Method -> ``[points, 2]`` float64, counted bits and KL, by bits; points without divergence are left
    out: a logarithmic axis has no place for them."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["kl_divergence"] > 0 and row["method"] != "full":
            found.setdefault(row["method"], []).append((row["bits_per_weight"], row["kl_divergence"]))
    return {method: np.array(sorted(points)) for method, points in found.items()}


def draw(series: dict[str, np.ndarray], look: Look) -> Figure:
    """Series of ``curves`` in one plot."""
    figure = look.figure(3.6)
    axes: Axes = figure.subplots()
    ours = [method for method in series if method == "bitsmoe"]
    colours = [*look.theme.series, look.theme.muted, look.theme.ink]
    for place, method in enumerate(ours + [method for method in series if method not in ours]):
        axes.plot(
            *series[method].T,
            _MARKERS[place % len(_MARKERS)],
            linestyle="-" if method in ours else (0, (2, 2)),
            color=colours[place % len(colours)],
            label=_NAMES.get(method, method),
        )
    logarithmic(axes, np.concatenate([points[:, 1] for points in series.values()]))
    format_ticks(axes.xaxis)
    axes.set(xlabel="counted bits per expert weight", ylabel="KL divergence, nats per token")
    axes.grid(True, axis="x")
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.4, handletextpad=0.5)
    return figure
