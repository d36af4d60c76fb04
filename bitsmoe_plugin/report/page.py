"""The HTML page of a report."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bitsmoe_plugin.pipeline import THIN_TOKENS_PER_DIMENSION
from bitsmoe_plugin.report.checkpoint_data import CheckpointData, LayerData, worst
from bitsmoe_plugin.report.evaluation_data import THIS, EvaluationData
from bitsmoe_plugin.report.figures import pictures
from bitsmoe_plugin.report.plots_bits import PART_NAMES
from bitsmoe_plugin.version import __version__

MISSING = "–"
ORIGINAL_BITS = 16
"""What experts are compared with: nearly all models are released in bfloat16."""


def render(data: CheckpointData, evaluation: EvaluationData | None) -> str:
    """The page, with everything it needs inside.

    Args:
        evaluation: what was measured on text, if it was.
    """
    # Names of models, layers and texts were written by others: all of them are escaped.
    environment = Environment(
        loader=PackageLoader("bitsmoe_plugin.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(per_cent=per_cent, fixed=fixed, whole=whole, size=size)
    style = environment.loader.get_source(environment, "report.css")[0]  # type: ignore[union-attr]
    return environment.get_template("report.html").render(
        data=data,
        evaluation=evaluation,
        own=evaluation.of(THIS, "checkpoint", "bitsmoe") if evaluation else None,
        full=evaluation.of("full") if evaluation else None,
        pictures=pictures(data),
        style=Markup(style),
        version=__version__,
        part_names=PART_NAMES,
        original_bytes=data.expert_weights * ORIGINAL_BITS // 8,
        worst_unseen=worst(data.layers, "unseen"),
        worst_calibration=worst(data.layers, "calibration"),
        outstanding=[(layer, expert) for layer in data.layers for expert in outstanding(layer)],
        thin=THIN_TOKENS_PER_DIMENSION,
    )


def outstanding(layer: LayerData) -> list[int]:
    """Ids of the super experts that were found, and of all experts that were kept."""
    return sorted({*layer.found, *layer.kept})


def per_cent(value: float | None) -> str:
    """A share as a percentage of three significant digits."""
    if value is None:
        return MISSING
    digits = 2 if value < 0.1 else 1
    return f"{100 * value:.{digits}f} %"


def fixed(value: float | None, digits: int = 3) -> str:
    """So many digits after the point."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def whole(value: float | None) -> str:
    """A count, thousands apart."""
    return MISSING if value is None else f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in the largest decimal unit that leaves a number above one."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} bytes"
