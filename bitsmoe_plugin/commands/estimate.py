"""What quantizing a model would give and take, from config.json and the headers of its weights alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.table import Table
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bitsmoe_plugin.allocation.budget import find_floor, reserve
from bitsmoe_plugin.allocation.sub_budgets import smallest_payload
from bitsmoe_plugin.allocation.super_expert_policy import (
    bias_bits,
    kept_bits,
    model_budget,
    named_kept,
    row_groups,
)
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.sizes import readable_size as _size
from bitsmoe_plugin.calibration.coverage import (
    THIN_TOKENS_PER_DIMENSION,
    tokens_per_dimension,
    wanted_tokens,
)
from bitsmoe_plugin.commands.estimate_resources import Workload, peak_memory, rough_seconds, tuning_ways
from bitsmoe_plugin.commands.tables import table_console
from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError, QuantizationError
from bitsmoe_plugin.models.dense_layers import planned_schemes
from bitsmoe_plugin.models.expert_source import LoadedExperts
from bitsmoe_plugin.models.families import layout_of
from bitsmoe_plugin.models.files import read_header, read_model_config
from bitsmoe_plugin.models.json_objects import read_object
from bitsmoe_plugin.models.low_precision import method_of, stored_settings
from bitsmoe_plugin.models.low_precision_source import LowPrecisionSource, source_in
from bitsmoe_plugin.models.model_class import empty_model as model_without_weights
from bitsmoe_plugin.models.model_config import load_config
from bitsmoe_plugin.models.routing import experts_per_token
from bitsmoe_plugin.models.source_tensors import check_source, folder_dtypes
from bitsmoe_plugin.models.stored_names import StoredNames
from bitsmoe_plugin.pipeline.size_budget import dense_bytes_saved, uniform_choices, whole_budget
from bitsmoe_plugin.pipeline.tuning_settings import WAYS

_HEADER_BYTES = 128
"""Per tensor in the header of a safetensors file; 110 to 120 measured, more with longer names."""
_PACKED_TENSORS = 7
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_LOW_PRECISION = 0.5
"""Bytes per weight, at least, of what is stored in low precision."""


@dataclass(frozen=True)
class Estimate:
    """All sizes in bytes.

    Attributes:
        model_type: of config.json.
        layers: MoE layers.
        experts: routed experts of all layers.
        expert_weights: their weights, the denominator of all bits per weight.
        bits_per_weight: counted, bases included.
        smallest_bits: smallest reachable ``bits`` (``factor_bits``, if that is given) with the same
            ``layer_bits`` and ``projection_bits``.
        parts: stored for the experts, by part.
        expert_bytes: their sum.
        other_bytes: everything that is not quantized.
        checkpoint_bytes: the packed checkpoint's safetensors files.
        unquantized_bytes: the tensors that stand in the model's files now.
        source: ``quant_method`` of these files; None: they are not quantized.
        source_bits_per_weight: in which expert weights are stored there, with their scales; None: the files
            are not all here, or are not quantized.
        source_other_bytes: all that is no expert, as it is stored there; None: likewise.
        memory: at the peak of quantization, by part; see ``estimate_resources.peak_memory``.
        peak_memory_bytes: their sum.
        seconds: order of magnitude on this machine; None if unknown.
        tuning: with ``tune``, what each way of it takes by itself, see ``tuning_ways``; ``memory`` and
            ``seconds`` are for ``tune_through``, "auto" as "both".
        choices: with ``size`` or ``fit``, bits of the linear layers outside the experts -> counted bits that
            are left for an expert weight; quantizing chooses for each layer, all else here is for the largest
            of them up to 8.
        calibration_tokens: that are used.
        tokens_per_dimension: of an expert on average, over hidden_size, least of all layers; None if unknown.
    """

    model_type: str
    layers: int
    experts: int
    expert_weights: int
    bits_per_weight: float
    smallest_bits: float
    parts: dict[str, int]
    expert_bytes: int
    other_bytes: int
    checkpoint_bytes: int
    unquantized_bytes: int
    source: str | None
    source_bits_per_weight: float | None
    source_other_bytes: int | None
    memory: dict[str, int]
    peak_memory_bytes: int
    seconds: float | None
    tuning: dict[str, dict[str, float | None]]
    choices: dict[int, float]
    calibration_tokens: int
    tokens_per_dimension: float | None


def stored_bytes(directory: Path) -> int:
    """Bytes of all tensors of a checkpoint, from its index, or else the header of its only file.

    Raises:
        CheckpointError: it cannot be read.
        QuantizationError: neither is there.
    """
    index, single = directory / SAFE_WEIGHTS_INDEX_NAME, directory / SAFE_WEIGHTS_NAME
    if index.is_file():
        metadata = read_object(index).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        # Some programs write 1e9 for whole numbers.
        if not isinstance(size, (int, float)) or isinstance(size, bool) or not 0 <= size < 2**63:
            raise CheckpointError(f"{index} is damaged (its metadata has no total_size)")
        return int(size)
    if single.is_file():
        ends = [entry["data_offsets"][1] for entry in read_header(single).values()]
        return max(ends, default=0)
    raise QuantizationError(f"{directory} has neither {SAFE_WEIGHTS_INDEX_NAME} nor {SAFE_WEIGHTS_NAME}")


def _model_config(directory: Path) -> Any:
    if not (directory / "config.json").is_file():
        raise QuantizationError(f"{directory / 'config.json'} does not exist; is {directory} a model?")
    read_model_config(directory)  # it refuses what the loader would trip over
    config = load_config(directory)
    settings = stored_settings(config)
    if settings is not None and method_of(settings) == QUANT_METHOD:
        raise QuantizationError(
            f"{directory} is quantized already (quant_method {QUANT_METHOD!r}); the model that it was "
            "made from is needed"
        )
    return config


def empty_model(directory: Path, stored: int) -> tuple[Any, LowPrecisionSource | None]:
    """The model on the meta device: all shapes and dtypes, no weights.

    Args:
        stored: bytes of its tensors in the files; settles the dtype if config.json names none.

    Returns:
        the model, and its files if they are in low precision and all here.

    Raises:
        QuantizationError: config.json is unusable, or describes another model than the files.
    """
    config = _model_config(directory)
    model = model_without_weights(config)
    settings, source = stored_settings(config), None
    if settings is None:
        check_source(StoredNames(model), folder_dtypes(directory))
    else:
        source = source_in(directory, model, settings)
    weights = sum(tensor.numel() for tensor in _tensors(model))
    itemsize = stored / weights
    if itemsize < 0.95 * (min(_DTYPES) if settings is None else _LOW_PRECISION):
        raise QuantizationError(
            f"config.json of {directory} describes {weights:,} weights, but the files hold {stored:,} bytes, "
            f"{itemsize:.2f} per weight; they do not belong together"
        )
    return (model if config.dtype else model.to(_DTYPES[2 if itemsize < 3 else 4])), source


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """What a checkpoint of the model holds: tied tensors once."""
    return list({id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _workload(
    model: Any, source: LoadedExperts, others: list[torch.Tensor], config: BitsMoEConfig
) -> Workload:
    return Workload(
        shapes=source.shapes,
        tokens=config.calibration_tokens or wanted_tokens(source.shapes, experts_per_token(model.config)),
        experts_per_token=experts_per_token(model.config),
        other_bytes=sum(map(_bytes, others)),
        active_weights=sum(tensor.numel() for tensor in others),
        itemsize=source.dtypes[0].itemsize,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )


def workload_of(model: Any, config: BitsMoEConfig) -> Workload:
    """Of a model without weights (``model_class.empty_model``)."""
    source = LoadedExperts(model)
    experts = {id(tensor) for layer in source.layers for tensor in layer.module.parameters(recurse=False)}
    others = [tensor for tensor in _tensors(model) if id(tensor) not in experts]
    return _workload(model, source, others, config)


def _tokens_per_dimension(work: Workload) -> float | None:
    chosen = work.experts_per_token
    if chosen is None:
        return None
    return min(tokens_per_dimension(work.tokens, shape, chosen) for shape in work.shapes)


def _packed_tensors(source: LoadedExperts, kept: list[tuple[int, ...]]) -> int:
    """Number of packed tensors of all layers."""
    return sum(
        _PACKED_TENSORS + 2 * layout_of(layer.module).has_bias + 2 * bool(ids)
        for layer, ids in zip(source.layers, kept, strict=True)
    )


@known_state()
def estimate(directory: Path, config: BitsMoEConfig) -> Estimate:
    """Sizes, memory and time of quantizing the model in ``directory``; no weight is read.

    Args:
        config: as for quantization; ``dataset`` is not needed, its text is taken to be long enough.
            Super experts that quantization would find by itself are not counted, only those named here.

    Raises:
        QuantizationError: no model, a dense or unknown one, or a budget that cannot be met.
        CheckpointError: config.json cannot be read, or the model needs code of its own.
    """
    config = BitsMoEConfig.checked_copy(config)
    stored = stored_bytes(Path(directory))
    model, files = empty_model(Path(directory), stored)
    settings = stored_settings(model.config)
    source = LoadedExperts(model)
    choices = uniform_choices(model, source, config) if config.size or config.fit else {}
    if config.size or config.fit:
        config = _at_size(model, source, config, choices)
    layers, shapes = source.layers, source.shapes
    kept = named_kept(source, config) or [()] * len(layers)
    budget = model_budget(source, config)
    groups = row_groups(source, config, budget, kept)
    budget = reserve(budget, "kept_experts", sum(kept_bits(source, kept)))
    payload = sum(group.payload_bits for group in groups)
    parts = {part: bits // 8 for part, bits in {"payload": payload, **budget.fixed}.items()}
    expert_bytes, floor = sum(parts.values()), find_floor(shapes, config, sum(bias_bits(source)))
    experts = {id(tensor) for layer in layers for tensor in layer.module.parameters(recurse=False)}
    others = [tensor for tensor in _tensors(model) if id(tensor) not in experts]
    schemes = planned_schemes(model, layers, config)
    other_bytes = sum(map(_bytes, others)) - dense_bytes_saved(model, schemes)
    header = _HEADER_BYTES * (len(others) + 2 * len(schemes) + _packed_tensors(source, kept))
    work = _workload(model, source, others, config)
    memory = peak_memory(work, config)
    return Estimate(
        model_type=model.config.model_type,
        layers=len(layers),
        experts=sum(shape.num_experts for shape in shapes),
        expert_weights=budget.weights,
        bits_per_weight=8 * expert_bytes / budget.weights,
        smallest_bits=(floor.counted + smallest_payload(groups)) / floor.weights,
        parts=parts,
        expert_bytes=expert_bytes,
        other_bytes=other_bytes,
        checkpoint_bytes=expert_bytes + other_bytes + header,
        unquantized_bytes=stored,
        source=None if settings is None else method_of(settings),
        source_bits_per_weight=None if files is None else 8 * files.expert_bytes / budget.weights,
        source_other_bytes=None if files is None else files.other_bytes,
        memory=memory,
        peak_memory_bytes=sum(memory.values()),
        seconds=rough_seconds(work, config),
        tuning=tuning_ways(work, config) if config.tune else {},
        choices=choices,
        calibration_tokens=work.tokens,
        tokens_per_dimension=_tokens_per_dimension(work),
    )


def _at_size(
    model: Any, source: LoadedExperts, config: BitsMoEConfig, choices: dict[int, float]
) -> BitsMoEConfig:
    """Options with ``bits``, and ``dense_bits``, that come to the size that is asked for."""
    config = copy.copy(config)
    if choices:
        config.dense_bits = max((bits for bits in choices if bits <= 8), default=min(choices))
        config.bits = choices[config.dense_bits]
    else:
        rows = whole_budget(model, source, config, 0).rows
        config.bits = (rows.payload_bits + sum(rows.fixed.values())) / rows.weights
    config.size = config.fit = None
    return config


def print_estimate(result: Estimate, stream: TextIO) -> None:
    """The estimate as tables."""
    console = table_console(stream)
    console.print(
        f"{result.model_type}: {result.layers} MoE layers, {result.experts:,} experts, "
        f"{result.expert_weights:,} expert weights at {result.bits_per_weight:.4f} counted bits "
        f"(smallest reachable {result.smallest_bits:.4f})",
        highlight=False,
    )
    for bits, left in sorted(result.choices.items(), reverse=True):
        console.print(
            f"with the linear layers outside the experts in {bits} bits, {left:.3f} bits are left for an "
            "expert weight",
            highlight=False,
        )
    console.print(_storage_table(result))
    memory = Table("peak memory of quantization", "bytes")
    for part, size in result.memory.items():
        memory.add_row(part, _size(size))
    memory.add_row("together", _size(result.peak_memory_bytes), style="bold")
    console.print(memory)
    console.print(_calibration(result), highlight=False)
    if result.seconds is not None:
        gpu = ", on its CPU (a GPU takes less)" if torch.cuda.is_available() else ""
        console.print(f"time on this machine{gpu}: of the order of {_rough(result.seconds)}", highlight=False)
    for way, needs in result.tuning.items():
        memory_bytes, seconds = needs["memory_bytes"], needs["seconds"]
        text = f"tuning {WAYS[way]}: {_size(int(memory_bytes or 0))} of memory"
        text += "" if seconds is None else f", of the order of {_rough(seconds)}"
        console.print(text, highlight=False)


def _rough(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _calibration(result: Estimate) -> str:
    text = f"calibration: {result.calibration_tokens:,} tokens"
    found = result.tokens_per_dimension
    if found is None:
        return text
    text += f", {found:.2g} x hidden_size per expert on average"
    return text if found >= THIN_TOKENS_PER_DIMENSION else f"{text}: few, errors on other text will be larger"


def _storage_table(result: Estimate) -> Table:
    table = Table("stored", "bytes", "bits per expert weight")
    for part, size in result.parts.items():
        if size:
            table.add_row(part, _size(size), f"{8 * size / result.expert_weights:.4f}")
    table.add_row("experts", _size(result.expert_bytes), f"{result.bits_per_weight:.4f}", style="bold")
    table.add_row("everything else", _size(result.other_bytes))
    table.add_row("packed checkpoint", _size(result.checkpoint_bytes), style="bold")
    if result.source is None:
        table.add_row("unquantized checkpoint", _size(result.unquantized_bytes))
        return table
    bits = result.source_bits_per_weight
    table.add_row(
        f"source, in {result.source}",
        _size(result.unquantized_bytes),
        None if bits is None else f"{bits:.4f}",
    )
    if result.source_other_bytes is not None:
        table.add_row("everything else in the source", _size(result.source_other_bytes))
    return table
