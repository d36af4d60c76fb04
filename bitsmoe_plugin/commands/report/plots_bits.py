"""Plots of where the bits went: layers, projections, the spectrum, experts, parts."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bitsmoe_plugin.commands.report.axes import (
    centre_ticks,
    colour_bar,
    heat_map,
    layer_ticks,
    write_in_cells,
)
from bitsmoe_plugin.commands.report.checkpoint_data import PART_NAMES, CheckpointData, LayerData
from bitsmoe_plugin.commands.report.style import Look


def bits_by_layer(data: CheckpointData, look: Look) -> Figure:
    """Heat map: mean width of the rows of each projection of each layer."""
    values = np.stack([_by_factor(layer.projection_bits, layer, data) for layer in data.layers], 1)
    figure = look.figure(1.95 if not look.narrow else 2.35)
    axes = figure.subplots()
    drawn = heat_map(axes, values, look)
    if len(data.layers) <= (6 if look.narrow else 16):
        write_in_cells(axes, drawn, values)
    axes.set_yticks(np.arange(len(data.factors)) + 0.5, data.factors)
    _layer_columns(axes, data)
    colour_bar(axes, drawn, "bits per value", look)
    return figure


def _by_factor(values: np.ndarray, layer: LayerData, data: CheckpointData) -> np.ndarray:
    """``values`` ``[f, ...]`` of a layer for every projection of the model; NaN for those it lacks."""
    absent = np.full((len(data.factors) - len(layer.factors), *values.shape[1:]), np.nan)
    return np.concatenate([absent, values])


def _layer_columns(axes: Axes, data: CheckpointData) -> None:
    layer_ticks(axes, [layer.label for layer in data.layers])
    centre_ticks(axes)
    axes.set_xlabel("layer")


def widths_along_spectrum(data: CheckpointData, look: Look) -> Figure:
    """Stacked shares of rows of each width along the ranks, strong ones first; mean of all layers."""
    every = [_by_factor(layer.width_shares, layer, data) for layer in data.layers]
    shares = np.nanmean(every, 0)[:, :, ::-1]
    panels = look.panels(len(shares), 2.75 if not look.narrow else 2.1, sharey=True)
    edges = np.linspace(0, 100, shares.shape[-1] + 1)
    for factor, axes in enumerate(panels):
        bottom = np.zeros(shares.shape[-1])
        full = 100 * shares[factor].sum(0)
        for width, share in zip(data.widths, shares[factor], strict=True):
            if share.any():
                # Up to the top, to be covered by the next: between areas that end there, the background
                # shines through.
                axes.stairs(full, edges, baseline=bottom, fill=True, color=look.width_colour(width))
            bottom = bottom + 100 * share
        axes.set(xlim=(0, 100), ylim=(0, 100))
        axes.set_title(data.factors[factor])
        axes.grid(False)
        axes.set_xticks([0, 50, 100], ["strongest", "rank rows", "weakest"])
        _outer_labels_inwards(axes)
        axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    used = [w for w, share in zip(data.widths, shares.sum((0, 2)), strict=True) if share > 0]
    handles = [Patch(color=look.width_colour(w), label="dropped" if not w else f"{w} bit") for w in used]
    columns = min(len(used), 4 if look.narrow else 8)
    panels[0].figure.legend(  # type: ignore[union-attr]
        handles=handles, loc="outside upper left", ncols=columns, handlelength=1, columnspacing=1.2
    )
    return panels[0].figure  # type: ignore[return-value]


def _outer_labels_inwards(axes: Axes) -> None:
    """Align the first and last label with the ends of the axis, so that neighbours do not touch."""
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")


def bits_by_expert(data: CheckpointData, look: Look) -> Figure:
    """Heat map: mean width of the rows of each expert of each layer; kept ones are crossed out."""
    most = max(len(layer.expert_bits) for layer in data.layers)
    values = np.full((len(data.layers), most), np.nan)
    for row, layer in enumerate(data.layers):
        others = np.setdiff1d(np.arange(len(layer.expert_bits)), layer.kept)
        values[row, others] = layer.expert_bits[others]
    figure = look.figure(
        float(np.clip(0.2 * len(data.layers), 1.0, 5.0)) + (0.75 if not look.narrow else 1.2)
    )
    axes = figure.subplots()
    axes.set_facecolor(look.theme.empty)
    drawn = heat_map(axes, values, look, None if np.isfinite(values).any() else Normalize(0, 1))
    for row, layer in enumerate(data.layers):
        kept = np.array(layer.kept, dtype=float)
        axes.plot(kept + 0.5, np.full(len(kept), row + 0.5), "x", color=look.theme.ink, markersize=5)
    layer_ticks(axes, [layer.label for layer in data.layers], "y")
    axes.set_yticks(axes.get_yticks() + 0.5, [text.get_text() for text in axes.get_yticklabels()])
    axes.set(xlabel="expert", ylabel="layer")
    colour_bar(axes, drawn, "bits per value", look)
    return figure


def size_by_part(data: CheckpointData, look: Look) -> Figure:
    """Bars: bits per expert weight of each part of what is stored."""
    names = [textwrap.fill(PART_NAMES.get(part, part), 14 if look.narrow else 40) for part in data.parts]
    values = list(data.parts.values())
    figure = look.figure(0.2 + 0.4 * len(names))
    axes = figure.subplots()
    axes.barh(names, values, height=0.62, color=look.theme.series[0])
    for place, value in enumerate(values):
        text = f"{value:.3f}  ({100 * value / data.bits:.3g} %)"
        axes.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * (1.75 if look.narrow else 1.18))
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelcolor=look.theme.ink)
    return figure
