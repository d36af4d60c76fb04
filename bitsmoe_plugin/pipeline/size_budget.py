"""The budget of a whole model: ``size`` or ``fit`` in; what rows and linear layers may spend together out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitsmoe_plugin.allocation.budget import Budget, find_floor
from bitsmoe_plugin.allocation.super_expert_policy import bias_bits, model_budget
from bitsmoe_plugin.base.sizes import header_bytes, size_in_bytes, size_text
from bitsmoe_plugin.codec.dense import DenseScheme
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import ConfigError, QuantizationError
from bitsmoe_plugin.models.dense_layers import planned_schemes
from bitsmoe_plugin.models.dense_units import DenseUnit, dense_units, most_candidates
from bitsmoe_plugin.models.expert_source import ExpertSource
from bitsmoe_plugin.models.families import layout_of
from bitsmoe_plugin.options import DENSE_BITS
from bitsmoe_plugin.runtime.dense_linear import check_library

_BASES = ("input_basis", "input_scales", "output_basis", "output_scales")
_PACKED = ("row_codes", "scale_grid", "payload", *_BASES)
_BIASES, _KEPT = ("input_bias", "output_bias"), ("kept_input", "kept_output")
_PER_FILE, _FILE = 64, 10**9
"""What a file has besides, and the least that transformers splits files at by itself."""
_SPARE = 100_000
"""One byte of so many is left for names that are longer in the files than in the model."""
_APART = ("layer_bits", "projection_bits", "factor_bits")


@dataclass(frozen=True)
class WholeBudget:
    """Attributes:
    rows: of the experts; its ``payload_bits`` are what is left if every unit takes its least.
    units: linear layers whose widths are to be chosen.
    """

    rows: Budget
    units: list[DenseUnit]


def whole_budget(model: Any, source: ExpertSource, config: BitsMoEConfig, carried: int) -> WholeBudget:
    """What may be spent on a model; without ``size`` and ``fit``, on its experts.

    Args:
        carried: bytes of tensors that the model has no module for and its checkpoint will have.

    Raises:
        QuantizationError: out of reach; names the smallest that is not.
        ConfigError: options that contradict each other.
    """
    if config.size is None and config.fit is None:
        return WholeBudget(model_budget(source, config), [])
    _check_options(config)
    size, option = _asked(model, config)
    schemes = planned_schemes(model, source.layers, config)
    units = dense_units(model, source.layers, config)
    if units:
        check_library()
    floor = find_floor(source.shapes, config, sum(bias_bits(source)))
    others = 8 * (_other_bytes(model, source, config, units, schemes) + carried)
    fixed = others + sum(floor.fixed.values()) + sum(unit.sizes[0] for unit in units)
    payload = 8 * size - fixed
    if payload < floor.narrowest:
        cache = size_of_cache(model.config, config) if config.fit else 0
        least = -(-(fixed + floor.narrowest) // 8) + cache
        raise QuantizationError(
            f"{option} cannot be met: the smallest is {size_text(least)}, of which "
            f"{size_text(others // 8)} are embeddings, head and what else keeps its dtype"
        )
    most = 16 * floor.weights
    return WholeBudget(Budget(min(payload, most), floor.narrowest, floor.fixed, floor.weights), units)


def uniform_choices(model: Any, source: ExpertSource, config: BitsMoEConfig) -> dict[int, float]:
    """Width of all units -> counted bits that ``size`` or ``fit`` leaves for an expert weight, where it does;
    empty if there are no units.

    Raises:
        QuantizationError, ConfigError: see ``whole_budget``.
    """
    budget = whole_budget(model, source, config, 0)
    rows, units = budget.rows, budget.units
    if not units:
        return {}
    found = {}
    for bits in DENSE_BITS:
        payload = rows.payload_bits - sum(unit.sizes[unit.candidate(bits)] - unit.sizes[0] for unit in units)
        if payload >= rows.narrowest:
            found[bits] = (payload + sum(rows.fixed.values())) / rows.weights
    return found


def dense_bytes_saved(model: Any, schemes: Mapping[str, DenseScheme]) -> int:
    """Bytes that a checkpoint is smaller by."""
    weights = {name: model.get_submodule(name).weight for name in schemes}
    return sum(weights[name].nbytes - _stored_bytes(weights[name], of) for name, of in schemes.items())


def _check_options(config: BitsMoEConfig) -> None:
    if config.size is not None and config.fit is not None:
        raise ConfigError("BitsMoEConfig: give size or fit, not both")
    option = "fit" if config.size is None else "size"
    given = [name for name in _APART if getattr(config, name)]
    given += ['scope="layer"'] if config.scope == "layer" else []
    given += ['cost="spectral"'] if config.cost == "spectral" else []
    if given:
        raise ConfigError(
            f"BitsMoEConfig: {option} is one budget for all layers, in the unit of output errors; it does "
            f"not go with {', '.join(given)}"
        )
    most = most_candidates(config)
    if len(config.widths) < most and (config.dense_bits == 16 or isinstance(config.dense_bits, dict)):
        raise ConfigError(
            f"BitsMoEConfig: {option} chooses among {most} ways to store a linear layer, so widths must have "
            f"as many, not {len(config.widths)}; or give dense_bits, 8 for example"
        )


def _asked(model: Any, config: BitsMoEConfig) -> tuple[int, str]:
    """Bytes that weights may take, and the option that says so."""
    if config.fit is None:
        return size_in_bytes(config.size) or 0, f"size={config.size}"
    cache = size_of_cache(model.config, config)
    tokens = f"{config.fit_batch} x {config.fit_context} tokens"
    told = f"fit={config.fit} with a KV cache of {size_text(cache)} ({tokens})"
    return (size_in_bytes(config.fit) or 0) - cache, told


def size_of_cache(model_config: Any, config: BitsMoEConfig) -> int:
    """Bytes of the KV cache in 16 bits, see the option ``fit``."""
    text = model_config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum("linear" not in kind and "mamba" not in kind for kind in kinds)
    if getattr(text, "kv_lora_rank", None):
        values = text.kv_lora_rank + text.qk_rope_head_dim
    else:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        values = 2 * heads * size
    return int(2 * layers * values * config.fit_context * config.fit_batch)


def _other_bytes(
    model: Any,
    source: ExpertSource,
    config: BitsMoEConfig,
    units: list[DenseUnit],
    schemes: Mapping[str, DenseScheme],
) -> int:
    """Files' bytes besides packed experts' data and ``units``: tied tensors once, headers included."""
    experts = {layer.name for layer in source.layers}
    chosen = {f"{name}.weight" for unit in units for name in unit.names}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    total = _PER_FILE + _packed_headers(source, config)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] in experts or name in chosen or name in tied:
            continue
        layer = name.removesuffix(".weight")
        shapes = {name: tuple(tensor.shape)}
        if layer in schemes:
            stored = schemes[layer].shapes(*tensor.shape)
            shapes = {f"{layer}.{part}": shape for part, shape in stored.items()}
        total += _stored_bytes(tensor, schemes[layer]) if layer in schemes else tensor.nbytes
        total += sum(header_bytes(part, shape) for part, shape in shapes.items())
    return total + _PER_FILE * (total // _FILE) + total // _SPARE


def _packed_headers(source: ExpertSource, config: BitsMoEConfig) -> int:
    total, may_keep = 0, config.super_experts != "auto" or config.rounds_as_planned
    for layer, shape in zip(source.layers, source.shapes, strict=True):
        names = [*_PACKED, *(_BIASES if layout_of(layer.module).has_bias else ())]
        names += _KEPT if may_keep else ()
        largest = (len(shape.factors), shape.num_experts, max(shape.rank, shape.hidden_size))
        total += sum(header_bytes(f"{layer.name}.bitsmoe_{name}", largest) for name in names)
    return total


def _stored_bytes(weight: Tensor, scheme: DenseScheme) -> int:
    outputs, inputs = weight.shape
    groups = inputs // scheme.group_size
    return int(outputs * (inputs * scheme.bits // 8 + weight.element_size() * groups)) + 16
