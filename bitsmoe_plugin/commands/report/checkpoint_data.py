"""What a report tells about a packed checkpoint, gathered from its directory alone."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitsmoe_plugin.checkpoint.energy_summary import BINS, rank_bins
from bitsmoe_plugin.checkpoint.headers import stored_tensors
from bitsmoe_plugin.checkpoint.manifest import packed_spec
from bitsmoe_plugin.checkpoint.prediction_layers import PredictionSize
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.checkpoint.untrusted_values import id_list, number, number_list, number_table
from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.commands.tables import layer_label
from bitsmoe_plugin.commands.times import read_times
from bitsmoe_plugin.commands.whole_model import told as told_of_model
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.files import safetensors_files
from bitsmoe_plugin.models.layer_names import stored_key

ERRORS = {"predicted": "estimated_error", "calibration": "calibration_error", "unseen": "unseen_error"}
"""Name in a report -> key of the manifest."""
PART_NAMES = {
    "payload": "rounded rows",
    "row_codes": "widths and scales of rows",
    "row_scales": "scales of rows",
    "scale_grids": "scale grids",
    "bases": "shared bases",
    "biases": "biases",
    "kept_experts": "kept experts",
}
"""Part of ``inspect_checkpoint`` -> what users call it."""


@dataclass(frozen=True)
class LayerData:
    """One MoE layer; what its checkpoint lacks is None.

    Attributes:
        label: see ``layer_label``.
        bits: counted bits per expert weight.
        factors: names of the f projections.
        projection_bits: ``[f]`` float64, mean width of the rows of each.
        width_shares: ``[f, widths, bins]`` float64, share of rows of each width along the ranks, weak ranks
            first; kept experts left out.
        expert_bits: ``[E]`` float64, mean width of each expert's rows, width of the original for kept ones.
        kept: ids of the experts in original precision.
        found: ids of the super experts, kept or not.
        errors: of ``ERRORS``, share of the output's energy.
        energy: mean square of the layer's output per token and hidden value, token-weighted.
        over_bound: bits per weight beyond the rate-distortion bound.
        spectrum: ``[f, bins]`` float64, energy along the ranks, weak ranks first.
        tokens: ``[E]`` float64, calibration tokens of each expert.
        peaks: ``[E]`` float64, largest absolute output value of each expert.
        hidden_size: input dimensions of an expert.
        routing: share of tokens for which other experts are selected than in full precision, if it was
            measured.
    """

    name: str
    label: str
    bits: float
    factors: tuple[str, ...]
    projection_bits: np.ndarray
    width_shares: np.ndarray
    expert_bits: np.ndarray
    kept: tuple[int, ...]
    found: tuple[int, ...]
    errors: dict[str, float | None]
    energy: float | None
    over_bound: float | None
    spectrum: np.ndarray | None
    tokens: np.ndarray | None
    peaks: np.ndarray | None
    hidden_size: int
    routing: float | None = None

    @property
    def median_tokens(self) -> float | None:
        """Calibration tokens of the median expert."""
        return None if self.tokens is None else statistics.median(self.tokens.tolist())


@dataclass(frozen=True)
class CheckpointData:
    """Attributes:
    title: name of the directory.
    architecture: of the model, as config.json says; empty if it does not.
    method: of BitsMoEConfig.
    budget: the option that set it, e.g. ``bits=2``.
    widths: that rows may have, rising.
    bits: counted bits per expert weight.
    expert_bytes: everything stored for the experts.
    expert_weights: of the unquantized model.
    file_bytes: all safetensors files.
    whole: about the whole model, by line.
    prediction: what layers for multi-token prediction take of them, empty if there are none.
    parts: part of what is stored for the experts -> bits per weight, largest first.
    calibration_tokens, held_out_tokens: None if it was not told.
    gap: certified relative gap of the allocation; None likewise.
    layers: in forward order.
    seconds: that quantizing took, by part, the longest first; empty if it was not kept.
    """

    title: str
    architecture: str
    method: str
    budget: str
    widths: tuple[int, ...]
    bits: float
    expert_bytes: int
    expert_weights: int
    file_bytes: int
    whole: tuple[str, ...]
    prediction: str
    parts: dict[str, float]
    calibration_tokens: float | None
    held_out_tokens: float | None
    gap: float | None
    layers: tuple[LayerData, ...]
    seconds: dict[str, float]

    @property
    def factors(self) -> tuple[str, ...]:
        """Projections that any layer has."""
        return max((layer.factors for layer in self.layers), key=len)


def gather(directory: Path) -> CheckpointData:
    """Read manifest, headers and row codes of a packed checkpoint; no payload is read.

    Raises:
        CheckpointError: no packed checkpoint, or one whose parts contradict each other.
    """
    inspected, config = inspect_checkpoint(directory), read_config(directory)
    files = safetensors_files(Path(directory))
    tensors = stored_tensors(files)
    layers = []
    for position, name in enumerate(config.layers):
        spec = packed_spec(name, config)
        codes = tensors[stored_key(f"{name}.bitsmoe_row_codes")].read()
        rows = layout.row_widths(codes, config.widths)
        layers.append(_layer(name, position, rows, spec, inspected["layers"][name]))
    parts = sorted(inspected["parts"].items(), key=lambda item: -item[1])
    calibration = config.calibration
    return CheckpointData(
        title=Path(directory).resolve().name,
        architecture=_architecture(directory),
        method=config.method,
        budget=_budget(config),
        widths=config.widths,
        bits=inspected["bits_per_weight"],
        expert_bytes=inspected["expert_bytes"],
        expert_weights=inspected["expert_weights"],
        file_bytes=sum(file.stat().st_size for file in files),
        whole=tuple(told_of_model(inspected).splitlines()),
        prediction=PredictionSize(**inspected["prediction"]).describe(),
        parts={part: bits for part, bits in parts if bits},
        calibration_tokens=number(calibration, "tokens"),
        held_out_tokens=number(calibration, "held_out_tokens"),
        gap=number(calibration, "allocation_relative_gap"),
        layers=tuple(layers),
        seconds=read_times(Path(directory)),
    )


def with_routing(data: CheckpointData, by_layer: dict[str, float]) -> CheckpointData:
    """Layers that are told how often routing differs.

    Args:
        by_layer: path of the experts module -> share of the tokens; others are left out.
    """
    layers = (replace(layer, routing=by_layer.get(layer.name)) for layer in data.layers)
    return replace(data, layers=tuple(layers))


def _budget(config: BitsMoEConfig) -> str:
    for option in ("size", "fit", "factor_bits"):
        if getattr(config, option) is not None:
            value = getattr(config, option)
            return f"{option}={value:g}" if isinstance(value, float) else f"{option}={value}"
    return f"bits={config.bits:g}"


def _architecture(directory: Path) -> str:
    values = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    names = values.get("architectures") or [values.get("model_type")]
    return names[0] if isinstance(names, list) and isinstance(names[0], str) else ""


def _layer(name: str, position: int, rows: torch.Tensor, spec: PackedSpec, told: dict[str, Any]) -> LayerData:
    """Args:
    rows: ``[f, E, r]`` int64, bits of every row.
    told: of the layer, by ``inspect_checkpoint``: what was counted and what was measured.
    """
    experts = spec.shape.num_experts
    packed = torch.ones(experts, dtype=torch.bool)
    packed[list(spec.kept)] = False
    expert_bits = torch.tensor(told["expert_bits"], dtype=torch.float64)
    expert_bits[~packed] = 8 * layout.ORIGINAL_DTYPES[spec.original_dtype].itemsize
    energy = number(told, "output_energy")
    return LayerData(
        name=name,
        label=layer_label(name, position),
        bits=told["bits_per_weight"],
        factors=spec.shape.factors,
        projection_bits=rows[:, packed].double().mean((1, 2)).nan_to_num().numpy(),
        width_shares=_width_shares(rows[:, packed], spec.widths),
        expert_bits=expert_bits.numpy(),
        kept=spec.kept,
        found=id_list(told, "super_experts", experts),
        errors={error: _share(number(told, key), energy) for error, key in ERRORS.items()},
        energy=energy,
        over_bound=number(told, "bits_over_bound"),
        spectrum=number_table(told, "spectrum", (len(rows), min(BINS, spec.shape.rank))),
        tokens=number_list(told, "tokens_per_expert", experts),
        peaks=number_list(told, "output_peaks", experts),
        hidden_size=spec.shape.hidden_size,
    )


def _share(error: float | None, energy: float | None) -> float | None:
    return error / energy if error is not None and energy else None


def _width_shares(rows: torch.Tensor, widths: tuple[int, ...]) -> np.ndarray:
    """``[f, widths, bins]`` of ``rows`` ``[f, experts, r]``; zeros if there are no experts."""
    shares = [
        torch.stack([(piece == width).double().mean((1, 2)) for width in widths], 1)
        for piece in rank_bins(rows)
    ]
    return torch.stack(shares, -1).nan_to_num().numpy()


def worst(layers: tuple[LayerData, ...], error: str) -> float | None:
    """Largest error of a name of ``ERRORS`` over the layers that have it."""
    values = [value for layer in layers if (value := layer.errors[error]) is not None]
    return max(values, default=None)
