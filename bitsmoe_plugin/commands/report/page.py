"""The HTML page of a report."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bitsmoe_plugin.calibration.coverage import THIN_TOKENS_PER_DIMENSION
from bitsmoe_plugin.commands.report.checkpoint_data import PART_NAMES, CheckpointData, LayerData, worst
from bitsmoe_plugin.commands.report.evaluation_data import THIS, EvaluationData, EvaluationRow
from bitsmoe_plugin.commands.report.figures import pictures
from bitsmoe_plugin.commands.report.plots_curve import Curves, curve_picture
from bitsmoe_plugin.commands.report.plots_quality import wanted_tokens
from bitsmoe_plugin.version import __version__

MISSING = "\N{EN DASH}"
OWN_METHODS = ("checkpoint", "bitsmoe")
"""Of ``compare``."""
ORIGINAL_BITS = 16
"""What experts are compared with: nearly all models are released in bfloat16."""


def render(data: CheckpointData, evaluation: EvaluationData | None, curves: Curves | None = None) -> str:
    """The page, with everything it needs inside.

    Args:
        evaluation: what was measured on text, if it was.
        curves: quality against size, if several models were.
    """
    rows = evaluation.rows if evaluation else ()
    # Names of models, layers and texts were written by others: all of them are escaped.
    environment = Environment(
        loader=PackageLoader("bitsmoe_plugin.commands.report"),
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
        own=own_row(data, evaluation),
        full=next((row for row in rows if row.method == "full"), None),
        pictures={**pictures(data), **curve_picture(curves or {})},
        style=Markup(style),
        version=__version__,
        part_names=PART_NAMES,
        original_bytes=data.expert_weights * ORIGINAL_BITS // 8,
        worst_unseen=worst(data.layers, "unseen"),
        worst_calibration=worst(data.layers, "calibration"),
        outstanding=[(layer, expert) for layer in data.layers for expert in outstanding(layer)],
        any_kept=any(layer.kept for layer in data.layers),
        any_unseen=any(layer.tokens is not None and layer.tokens.min() <= 0 for layer in data.layers),
        wanted=wanted_tokens(data),
        thin=THIN_TOKENS_PER_DIMENSION,
    )


def own_row(data: CheckpointData, evaluation: EvaluationData | None) -> EvaluationRow | None:
    """What was measured of this checkpoint: ``compare`` may have quantized the model in another way."""
    for row in evaluation.rows if evaluation else ():
        same = row.bits is not None and abs(row.bits - data.bits) < 1e-6
        if row.method == THIS or (row.method in OWN_METHODS and same):
            return row
    return None


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
