"""Quality against all bytes of a model: one line for each method that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bitsmoe_plugin.checkpoint.untrusted_values import number
from bitsmoe_plugin.commands.report.axes import format_ticks, logarithmic, short
from bitsmoe_plugin.commands.report.figures import Picture
from bitsmoe_plugin.commands.report.style import DARK, LIGHT, Look, applied, png_bytes, svg_uri

NAME = "quality-by-size"
ALT = "Lines of the KL divergence from full precision against all bytes of the model, one for each method"
_MARKERS = "os^Dv"
_LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1, 1, 1)), (0, (2, 1)))
Curves = dict[str, np.ndarray]
"""Method -> ``[points, 2]`` float64, bytes and KL divergence, by bytes."""


def read_curves(path: Path) -> Curves:
    """Of a file that ``read_evaluation`` takes; rows without bytes or divergence are left out, and the
    result is empty if fewer than two are left."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = values.get("results") if isinstance(values, dict) else None
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict):
            continue
        size, divergence = number(row, "total_bytes"), number(row, "kl_divergence")
        if size is not None and divergence is not None and size > 0 and divergence > 0:
            found.setdefault(str(row.get("method", "?")), []).append((size, divergence))
    if sum(map(len, found.values())) < 2:
        return {}
    return {method: np.array(sorted(points)) for method, points in found.items()}


def draw(curves: Curves, look: Look) -> Figure:
    """All curves in one plot; the longest is drawn thickest, on top."""
    figure = look.figure(3.4)
    axes = figure.subplots()
    colours = (*look.theme.series, look.theme.muted, look.theme.ink)
    for place, (method, points) in enumerate(sorted(curves.items(), key=lambda item: -len(item[1]))):
        axes.plot(
            *points.T,
            marker=_MARKERS[place % len(_MARKERS)],
            linestyle=_LINES[place % len(_LINES)],
            linewidth=2.2 if place == 0 else 1.2,
            color=colours[place % len(colours)],
            label=method,
            zorder=5 - min(place, 3),
        )
    logarithmic(axes, np.concatenate([points[:, 1] for points in curves.values()]))
    format_ticks(axes.xaxis, short)
    axes.set(xlabel="bytes of the whole model", ylabel="KL, nats per token")
    figure.legend(loc="outside upper left", ncols=2 if look.narrow else 5, columnspacing=1.4)
    return figure


def curve_picture(curves: Curves) -> dict[str, Picture]:
    """As ``figures.pictures``; empty if there are no curves."""
    if not curves:
        return {}
    looks = [Look(theme, narrow) for narrow in (False, True) for theme in (LIGHT, DARK)]
    drawn = []
    for look in looks:
        with applied(look):
            drawn.append(svg_uri(draw(curves, look)))
    return {NAME: Picture(ALT, *drawn)}


def curve_files(curves: Curves) -> Iterator[tuple[str, bytes]]:
    """As ``figures.png_files``."""
    for theme, name in ((LIGHT, NAME), (DARK, f"{NAME}-dark")) if curves else ():
        look = Look(theme)
        with applied(look):
            yield f"{name}.png", png_bytes(draw(curves, look))
