"""What a packed checkpoint holds: counted bits by part, widths by layer and projection, errors."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table
from torch import Tensor

from bitsmoe_plugin.calibration.coverage import THIN_TOKENS_PER_DIMENSION
from bitsmoe_plugin.checkpoint.other_tensors import tied_by_record, verify_others
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.checkpoint.prediction_layers import PredictionSize, depth_of, prediction_size
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.checkpoint.untrusted_values import id_list, measured, number_list
from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.commands.tables import layer_label, table_console
from bitsmoe_plugin.commands.whole_model import told, whole_model
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import read_model_config, safetensors_files

_PARTS = {
    "bitsmoe_payload": "payload",
    "bitsmoe_row_codes": "row_codes",
    "bitsmoe_scale_grid": "scale_grids",
    "bitsmoe_input_basis": "bases",
    "bitsmoe_input_scales": "bases",
    "bitsmoe_output_basis": "bases",
    "bitsmoe_output_scales": "bases",
    "bitsmoe_input_bias": "biases",
    "bitsmoe_output_bias": "biases",
    "bitsmoe_kept_input": "kept_experts",
    "bitsmoe_kept_output": "kept_experts",
    "bitsmoe_tile_scales": "row_scales",
    "bitsmoe_row_gains": "row_scales",
}

_ALIKE = ("row_codes", "scale_grid", "kept_input", "kept_output")
"""Tensors of which each projection has an equal part."""


def inspect_checkpoint(directory: Path) -> dict[str, Any]:
    """Sizes, widths and errors of a packed checkpoint, JSON-ready.

    Returns:
        ``bits_per_weight``, ``expert_bytes``, ``expert_weights``, ``parts`` (bits per weight by
        part), ``projections`` (bits per weight of the projection, as ``projection_bits`` counts them),
        ``calibration``, and ``layers``: for each ``bits_per_weight``, ``projections``, ``widths`` (projection
        -> width -> rows), ``expert_bits`` (mean width of each expert's rows), ``kept_experts`` (ids),
        ``tokens_per_dimension`` and what was measured while quantizing: errors (absolute, per token and
        hidden value, token-weighted), ``output_energy``, ``bits_over_bound``, ``tokens_per_expert``,
        ``output_peaks``, ``super_experts`` (ids of those that were found, kept or not). ``prediction``: what
        layers for multi-token prediction take beside all that, see ``PredictionSize``. Further what
        ``whole_model`` returns.
    """
    config = read_config(directory)
    if not config.layers:
        raise CheckpointError(f"quantization_config of {directory} describes no layers; it is incomplete")
    paths = safetensors_files(Path(directory))
    files = PackedFiles.open(paths, config)
    verify_others(
        paths, config.other_tensors, config.other_tensors_in_model, tied_by_record(config.other_tensors)
    )
    files.check_dense()
    specs = files.specs
    parts: Counter[str] = Counter()
    projections: Counter[str] = Counter()
    total_of: Counter[str] = Counter()
    layers: dict[str, Any] = {}
    weights = 0
    for layer, spec in specs.items():
        weights += spec.shape.weights
        size = 0
        for buffer, (dtype, shape) in spec.tensors().items():
            bits = 8 * dtype.itemsize * math.prod(shape)
            parts[_PARTS[buffer]] += bits
            size += bits
        widths = layout.row_widths(files.read(layer).row_codes, config.widths)
        rows = _projection_bits(spec, widths)
        projections.update(rows)
        total_of.update(dict.fromkeys(rows, spec.shape.weights // len(rows)))
        layers[layer] = {
            **measured(config.layers[layer]),  # first, so that it replaces nothing of what was counted
            "bits_per_weight": size / spec.shape.weights,
            "projections": {factor: len(rows) * bits / spec.shape.weights for factor, bits in rows.items()},
            "widths": {
                factor: {str(w): int((widths[i] == w).sum()) for w in config.widths}
                for i, factor in enumerate(spec.shape.factors)
            },
            "expert_bits": widths.double().mean((0, 2)).tolist(),
            "kept_experts": list(spec.kept),
            "tokens_per_dimension": _tokens_per_dimension(config.layers[layer], spec.shape.hidden_size),
        }
    total = sum(parts.values())
    return {
        "bits_per_weight": total / weights,
        "expert_bytes": total // 8,
        "expert_weights": weights,
        "parts": {part: bits / weights for part, bits in parts.items()},
        "projections": {factor: bits / total_of[factor] for factor, bits in projections.items()},
        "prediction": asdict(prediction_size(paths, depth_of(read_model_config(Path(directory))))),
        "calibration": config.calibration,
        "layers": layers,
        **whole_model(Path(directory), files, paths),
    }


def _projection_bits(spec: PackedSpec, widths: Tensor) -> dict[str, int]:
    """What is stored for each projection alone: its rows with their codes and scales, and kept experts.

    Args:
        widths: ``[f, E, r]`` bits of the rows.
    """
    sizes = {name: 8 * dtype.itemsize * math.prod(shape) for name, (dtype, shape) in spec.tensors().items()}
    alike = sum(sizes.get(f"bitsmoe_{name}", 0) for name in _ALIKE) // len(spec.shape.factors)
    scales = sum(sizes.get(f"bitsmoe_{name}", 0) for name in ("tile_scales", "row_gains"))
    stored = (widths > 0).sum((1, 2)).tolist()
    payload = (BLOCK * spec.shape.blocks * widths.sum((1, 2))).tolist()
    return {
        factor: alike + payload[i] + scales * stored[i] // max(1, sum(stored))
        for i, factor in enumerate(spec.shape.factors)
    }


def _tokens_per_dimension(entry: dict[str, Any], hidden_size: int) -> float:
    counts = number_list(measured(entry), "tokens_per_expert", entry["num_experts"])
    return 0.0 if counts is None else statistics.median(counts.tolist()) / hidden_size


def quantized_super_experts(layer: dict[str, Any]) -> list[int]:
    """Ids of the super experts of a layer of ``inspect_checkpoint`` that have rows."""
    found = id_list(layer, "super_experts", len(layer["expert_bits"]))
    return [expert for expert in found if expert not in layer["kept_experts"]]


_ERRORS = {"estimated_error": "estimated", "calibration_error": "measured", "unseen_error": "unseen"}


def _layer_summary(layer: dict[str, Any]) -> list[str]:
    """The columns that a layer has once, not per projection; "-" for what the checkpoint lacks."""
    relative = layer.get("output_energy") or math.nan
    errors = [layer.get(key) for key in _ERRORS]
    over = layer.get("bits_over_bound")
    return [
        *("-" if error is None else f"{100 * error / relative:.2f} %" for error in errors),
        "-" if over is None else f"{over:.3f}",
        f"{layer['tokens_per_dimension']:.2f}",
    ]


def print_inspection(report: dict[str, Any], stream: TextIO) -> None:
    """The report as tables."""
    console = table_console(stream)
    parts = ", ".join(f"{part} {bits:.4f}" for part, bits in report["parts"].items())
    projections = ", ".join(f"{name} {bits:.4f}" for name, bits in report["projections"].items())
    console.print(
        f"{report['bits_per_weight']:.4f} bits per expert weight = {parts}\n"
        f"bits per weight of each projection, without bases and biases: {projections}\n"
        f"{report['expert_bytes']:,} bytes for {report['expert_weights']:,} expert weights\n{told(report)}",
        highlight=False,
    )
    prediction = PredictionSize(**report["prediction"]).describe()
    if prediction:
        console.print(f"besides: {prediction}", highlight=False)
    for name, layer in report["layers"].items():
        kept = layer["kept_experts"]
        if kept:
            console.print(
                f"kept in original precision: {name}, expert {', '.join(map(str, kept))}", highlight=False
            )
        for expert in quantized_super_experts(layer):
            bits = layer["expert_bits"][expert]
            console.print(
                f"super expert in rows of {bits:.3g} bits: {name}, expert {expert}", highlight=False
            )
    widths = list(next(iter(next(iter(report["layers"].values()))["widths"].values())))
    columns = [*(f"{w} bit" for w in widths), *_ERRORS.values(), "over bound", "tokens/dim"]
    table = Table("layer", "projection", "bits", *columns)
    for position, (name, layer) in enumerate(report["layers"].items()):
        summary = _layer_summary(layer)
        for factor, histogram in layer["widths"].items():
            first = factor == next(iter(layer["widths"]))
            total = sum(histogram.values())
            table.add_row(
                layer_label(name, position) if first else "",
                factor,
                f"{layer['bits_per_weight']:.3f}" if first else "",
                *(f"{100 * histogram[w] / total:.1f} %" for w in widths),
                *(summary if first else [""] * len(summary)),
            )
    console.print(table)
    console.print(
        "widths: share of rows. estimated, measured, unseen: output error of the layer, relative to the "
        "output's energy (token-weighted), as the allocation expected it, on the calibration text and on "
        "text held out from it, what makes up for earlier layers included. "
        "over bound: bits per weight of the rows (without bases) beyond the "
        "rate-distortion bound at the same first-order error. tokens/dim: calibration tokens of the median "
        f"expert per input dimension; below {THIN_TOKENS_PER_DIMENSION:g} estimates are poor."
    )
