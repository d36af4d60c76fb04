"""Plots of what quantizing cost and what it rests on: spectrum, errors, calibration tokens, peaks.

Each draws the layers that have the numbers; the page leaves a plot out if none has.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bitsmoe_plugin.calibration.coverage import THIN_TOKENS_PER_DIMENSION
from bitsmoe_plugin.commands.report.axes import (
    format_ticks,
    layer_ticks,
    logarithmic,
    per_cent,
    ranges,
    short,
)
from bitsmoe_plugin.commands.report.checkpoint_data import ERRORS, CheckpointData, LayerData
from bitsmoe_plugin.commands.report.style import Look

LAYERS_BY_NAME = 6
"""Up to so many layers are named in a legend, more are told apart by a colour bar."""
MANY_POINTS = 1000
"""More are drawn as pixels: each would be text in the page otherwise."""


def spectrum(data: CheckpointData, look: Look) -> Figure:
    """Energy along the ranks of each projection of each layer, and the output energy of the layers."""
    panels = look.panels(len(data.factors) + 1, 2.3 if not look.narrow else 2.1, columns=2)
    for factor, axes in zip(data.factors, panels, strict=False):
        _spectra(axes, factor, data, look)
        axes.set_title(factor)
    _energies(panels[-1], data, look)
    figure = panels[0].figure
    if len(data.layers) <= LAYERS_BY_NAME:
        handles = panels[0].get_lines()
        figure.legend(handles=handles, loc="outside upper left", ncols=2 if look.narrow else 6)
    else:
        norm = Normalize(0, len(data.layers) - 1)
        scale = ScalarMappable(norm, look.colours())
        bar = figure.colorbar(scale, ax=panels[:-1] if look.narrow else panels, location="top", aspect=50)
        layer_ticks(bar.ax, [layer.label for layer in data.layers])
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label("layer")
    return figure  # type: ignore[return-value]


def _spectra(axes: Axes, factor: str, data: CheckpointData, look: Look) -> None:
    drawn = []
    for place, layer in enumerate(data.layers):
        if layer.spectrum is None or factor not in layer.factors:
            continue
        energies = layer.spectrum[layer.factors.index(factor)]
        if energies.sum() <= 0:
            continue
        share = 100 * energies[::-1] / energies.sum()
        colour = look.line_colour(place / max(len(data.layers) - 1, 1))
        middles = 100 * (np.arange(len(share)) + 0.5) / len(share)
        width = 1.6 if len(data.layers) <= LAYERS_BY_NAME else 0.9
        axes.plot(middles, share, color=colour, linewidth=width, label=f"layer {layer.label}")
        drawn.append(share)
    logarithmic(axes, np.concatenate([*drawn, np.zeros(0)]), per_cent)
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 50, 100], ["strongest", "rank rows", "weakest"])
    first, _, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _energies(axes: Axes, data: CheckpointData, look: Look) -> None:
    values = np.array([layer.energy or np.nan for layer in data.layers])
    axes.plot(values, "o", color=look.theme.series[0], markersize=5 if len(values) < 24 else 3)
    logarithmic(axes, values)
    axes.margins(y=0.15)
    axes.set_xlim(-0.6, len(values) - 0.4)
    layer_ticks(axes, [layer.label for layer in data.layers])
    axes.set_title("output energy by layer")


def errors(data: CheckpointData, look: Look) -> Figure:
    """Predicted and measured output error of each layer, share of its output's energy."""
    figure = look.figure(2.9)
    axes = figure.subplots()
    series = zip(ERRORS, look.theme.series, ("o", "s", "^"), strict=True)
    everything = []
    for place, (error, colour, marker) in enumerate(series):
        values = np.array([_per_cent(layer.errors[error]) for layer in data.layers])
        if np.isnan(values).all():
            continue
        everything.append(values)
        # Side by side where there is room: measured errors on known and unseen text are nearly the same.
        shift = 0.14 * (place - 1) if len(values) <= 16 else 0
        size = 6 if len(values) <= 16 else 3
        axes.plot(
            np.arange(len(values)) + shift,
            values,
            marker,
            color=colour,
            markersize=size,
            label=_ERROR_NAMES[error],
            linestyle="-" if len(values) > 16 else "none",
            linewidth=1,
        )
    logarithmic(axes, np.concatenate(everything), per_cent)
    axes.set_xlim(-0.6, len(data.layers) - 0.4)
    axes.margins(y=0.12)
    layer_ticks(axes, [layer.label for layer in data.layers])
    axes.set(xlabel="layer", ylabel="error, of the output's energy")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.4, handletextpad=0.3)
    return figure


_ERROR_NAMES = {"predicted": "predicted", "calibration": "calibration text", "unseen": "unseen text"}


def _per_cent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def tokens(data: CheckpointData, look: Look) -> Figure:
    """Calibration tokens per expert by layer, and what bits experts got by how many they saw."""
    left, right = look.panels(2, 2.9 if not look.narrow else 2.6)
    own = [layer.tokens for layer in data.layers]
    ranges(left, own, look)
    thin = wanted_tokens(data)
    left.axhline(thin, color=look.theme.series[1], linewidth=1.2, linestyle=(0, (4, 2)))
    seen = np.concatenate([values for values in own if values is not None])
    logarithmic(left, np.append(seen, thin))
    left.set_title(f"tokens per expert, by layer (dashed: {short(thin)})")
    left.set_xlabel("layer")
    layer_ticks(left, [layer.label for layer in data.layers])
    _bits_by_tokens(right, data, look)
    return left.figure  # type: ignore[return-value]


def wanted_tokens(data: CheckpointData) -> float:
    """Calibration tokens that the median expert of every layer should see."""
    return THIN_TOKENS_PER_DIMENSION * max(layer.hidden_size for layer in data.layers)


def _bits_by_tokens(axes: Axes, data: CheckpointData, look: Look) -> None:
    points = np.concatenate(
        [
            # Zero has no place on a logarithmic axis: experts that saw nothing stand at its lower end.
            np.stack([np.maximum(layer.tokens, 0.5), layer.expert_bits], 1)[_others(layer)]
            for layer in data.layers
            if layer.tokens is not None
        ]
    )
    axes.plot(
        *points.T,
        "o",
        color=look.theme.series[0],
        alpha=0.45 if len(points) <= MANY_POINTS else 0.25,
        markersize=3.5,
        markeredgewidth=0,
        rasterized=len(points) > MANY_POINTS,
    )
    logarithmic(axes, points[:, 0], axis="x")
    format_ticks(axes.yaxis)
    axes.set(xlabel="calibration tokens", title="bits per value, by expert")


def _others(layer: LayerData) -> np.ndarray:
    """``[others]`` int64: ids of the experts that are not kept."""
    return np.setdiff1d(np.arange(len(layer.expert_bits)), layer.kept)


def peaks(data: CheckpointData, look: Look) -> Figure:
    """Largest absolute output of each expert by layer; super experts are marked."""
    figure = look.figure(2.6)
    axes = figure.subplots()
    own = [layer.peaks for layer in data.layers]
    ranges(axes, own, look)
    for place, layer in enumerate(data.layers):
        marked = sorted({*layer.found, *layer.kept})
        if layer.peaks is not None and marked:
            axes.plot(np.full(len(marked), place), layer.peaks[marked], "D", color=look.theme.series[1])
    logarithmic(axes, np.concatenate([values for values in own if values is not None]))
    layer_ticks(axes, [layer.label for layer in data.layers])
    axes.set(xlabel="layer", ylabel="largest output value")
    return figure


def routing(data: CheckpointData, look: Look) -> Figure:
    """Share of tokens for which each layer selects other experts than in full precision."""
    figure = look.figure(2.4)
    axes = figure.subplots()
    values = np.array([_per_cent(layer.routing) for layer in data.layers])
    many = len(values) > 16
    axes.plot(
        values,
        "o",
        color=look.theme.series[0],
        markersize=3 if many else 6,
        linestyle="-" if many else "none",
        linewidth=1,
    )
    axes.set_ylim(0, max(1.12 * float(np.nanmax(values)), 0.1))
    axes.set_xlim(-0.6, len(values) - 0.4)
    format_ticks(axes.yaxis, per_cent)
    layer_ticks(axes, [layer.label for layer in data.layers])
    axes.set(xlabel="layer", ylabel="tokens with other experts")
    return figure
