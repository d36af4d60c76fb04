"""The plots of a report: what each shows, which checkpoints have it, and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from matplotlib.figure import Figure

from bitsmoe_plugin.commands.report import plots_bits, plots_quality
from bitsmoe_plugin.commands.report.checkpoint_data import ERRORS, CheckpointData
from bitsmoe_plugin.commands.report.style import DARK, LIGHT, Look, applied, png_bytes, svg_uri

Form = TypeVar("Form", str, bytes)


@dataclass(frozen=True)
class Plot:
    """Attributes:
    name: of its files.
    alt: what it shows, for those who do not see it; the numbers are in the tables of the page.
    draw: makes the figure.
    has: whether a checkpoint holds what it takes.
    """

    name: str
    alt: str
    draw: Callable[[CheckpointData, Look], Figure]
    has: Callable[[CheckpointData], bool] = lambda data: True


def _has_error(data: CheckpointData) -> bool:
    return any(layer.errors[error] is not None for layer in data.layers for error in ERRORS)


PLOTS = (
    Plot("bits-by-layer", "Heat map of the mean width by layer and projection", plots_bits.bits_by_layer),
    Plot(
        "widths-along-spectrum",
        "Stacked shares of rows of each width from the strongest to the weakest rank, for gate, up and down",
        plots_bits.widths_along_spectrum,
    ),
    Plot("bits-by-expert", "Heat map of the mean width by layer and expert", plots_bits.bits_by_expert),
    Plot(
        "spectrum",
        "Energy from the strongest to the weakest rank, for gate, up and down of each layer, and the output "
        "energy of the layers",
        plots_quality.spectrum,
        lambda data: any(layer.spectrum is not None for layer in data.layers),
    ),
    Plot(
        "errors",
        "Output error of each layer as predicted, on calibration text and on unseen text",
        plots_quality.errors,
        _has_error,
    ),
    Plot(
        "tokens",
        "Range of calibration tokens per expert by layer, and bits of each expert against its tokens",
        plots_quality.tokens,
        lambda data: any(layer.tokens is not None for layer in data.layers),
    ),
    Plot(
        "peaks",
        "Range of the experts' largest output values by layer",
        plots_quality.peaks,
        lambda data: any(layer.peaks is not None for layer in data.layers),
    ),
    Plot(
        "routing",
        "Share of tokens for which other experts are selected than in full precision, by layer",
        plots_quality.routing,
        lambda data: any(layer.routing is not None for layer in data.layers),
    ),
    Plot("size", "Bars of the bits per weight of each part that is stored", plots_bits.size_by_part),
)


@dataclass(frozen=True)
class Picture:
    """A plot for the page: data URIs of the wide format and of the one for phones."""

    alt: str
    light: str
    dark: str
    light_narrow: str
    dark_narrow: str


def pictures(data: CheckpointData) -> dict[str, Picture]:
    """Name of each plot that the checkpoint has -> its pictures."""
    return {
        plot.name: Picture(
            plot.alt,
            *(
                _render(plot, data, Look(theme, narrow), svg_uri)
                for narrow in (False, True)
                for theme in (LIGHT, DARK)
            ),
        )
        for plot in PLOTS
        if plot.has(data)
    }


def png_files(data: CheckpointData) -> Iterator[tuple[str, bytes]]:
    """File name and content of each plot, light and dark."""
    for plot in PLOTS:
        if plot.has(data):
            yield f"{plot.name}.png", _render(plot, data, Look(LIGHT), png_bytes)
            yield f"{plot.name}-dark.png", _render(plot, data, Look(DARK), png_bytes)


def _render(plot: Plot, data: CheckpointData, look: Look, form: Callable[[Figure], Form]) -> Form:
    with applied(look):
        return form(plot.draw(data, look))
