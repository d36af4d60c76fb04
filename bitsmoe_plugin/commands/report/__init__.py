"""One HTML page, and its plots as PNG, about a packed checkpoint; by matplotlib and jinja2."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from bitsmoe_plugin.base.atomic_output import replace_file
from bitsmoe_plugin.errors import ConfigError

PAGE = "report.html"
FOLDER = "report"
"""Inside the checkpoint, unless another place is given."""
_NEEDED = ("matplotlib", "jinja2")


def check_report_extra() -> None:
    """Raises ConfigError if a package that only reports need cannot be imported."""
    for name in _NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"reports are made with {' and '.join(_NEEDED)}, and {name} cannot be imported ({error}); "
                'pip install "bitsmoe-plugin[report]"'
            ) from error


def write_report(directory: Path, out: Path | None = None, evaluation: Path | None = None) -> Path:
    """Write the report of a packed checkpoint: ``report.html``, which needs no other file, and PNG files.

    Every file replaces that of an earlier report at once, the page last; other files stay.

    Args:
        directory: of the checkpoint.
        out: directory to write to, made if it is not there; default: ``report`` in the checkpoint.
        evaluation: file that ``bitsmoe evaluate --json`` or ``compare --json`` wrote.

    Returns:
        the page.

    Raises:
        ConfigError: packages are missing, or ``evaluation`` is something else.
        CheckpointError: no packed checkpoint, or a damaged one.
        OSError: ``out`` cannot be written.
    """
    check_report_extra()
    from bitsmoe_plugin.commands.report.checkpoint_data import gather, with_routing
    from bitsmoe_plugin.commands.report.evaluation_data import read_evaluation
    from bitsmoe_plugin.commands.report.figures import png_files
    from bitsmoe_plugin.commands.report.page import own_row, render
    from bitsmoe_plugin.commands.report.plots_curve import curve_files, read_curves

    measured = read_evaluation(evaluation) if evaluation is not None else None
    data = gather(directory)
    own = own_row(data, measured)
    if own is not None:
        data = with_routing(data, own.routing_by_layer)
    out = Path(directory) / FOLDER if out is None else Path(out)
    curves = read_curves(evaluation) if evaluation is not None else {}
    page = render(data, measured, curves).encode()
    files = [*png_files(data), *curve_files(curves), (PAGE, page)]
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        replace_file(out / name, content)
    return out / PAGE
