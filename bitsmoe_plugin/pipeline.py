"""Quantization of a whole model: calibrate and plan every layer, allocate, round and pack.

Two passes over the layers. The first collects costs on the unquantized model; the allocation
spends one budget over all of them; the second rounds, each layer on what the quantized layers
before it put out (``sequential``).
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from bitsmoe_plugin.allocation import Allocation, allocate
from bitsmoe_plugin.budget import Budget, plan_budget, reserve
from bitsmoe_plugin.calibration import LayerwiseForward, capture_layer
from bitsmoe_plugin.checkpoint import layer_manifest, packed_spec
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.experts import BitsMoEExperts, replace_module
from bitsmoe_plugin.families import (
    MoELayer,
    apply_gating,
    check_computation,
    find_moe_layers,
    layer_shape,
    read_biases,
    read_experts,
)
from bitsmoe_plugin.kept import bias_bits, choose_kept, kept_bits, with_originals
from bitsmoe_plugin.layer import LayerPlan, bits_over_bound, plan_layer, round_layer, row_sizes
from bitsmoe_plugin.packing import LayerShape
from bitsmoe_plugin.problem import build_problem
from bitsmoe_plugin.statistics import LayerActivations
from bitsmoe_plugin.super_experts import ExpertOutputs, forms_massive_activations

THIN_TOKENS_PER_DIMENSION = 0.25


def held_out_last(blocks: Tensor, share: float) -> tuple[Tensor, int]:
    """Move a share of the calibration blocks, evenly spaced, to the end; returns how many are before."""
    count = int(len(blocks) * share)
    apart = torch.zeros(len(blocks), dtype=torch.bool)
    apart[((torch.arange(count) + 0.5) * len(blocks) / max(count, 1)).long()] = True
    return torch.cat([blocks[~apart], blocks[apart]]), len(blocks) - count


def warn_about_thin_calibration(name: str, activations: LayerActivations, shape: LayerShape) -> Tensor:
    """Tokens per expert ``[E]``; warns if an expert saw none, or most saw too few."""
    index = activations.top_k_index.flatten()
    counts = torch.bincount(index, minlength=shape.num_experts)[: shape.num_experts]
    unrouted = torch.nonzero(counts == 0).flatten().tolist()
    if unrouted:
        warnings.warn(
            f"{name}: no calibration token was routed to expert {', '.join(map(str, unrouted))}; "
            "treated as typical experts of the layer. More or more varied calibration text helps, or "
            "all_experts=True.",
            stacklevel=2,
        )
    if float(counts.float().median()) < THIN_TOKENS_PER_DIMENSION * shape.hidden_size:
        warnings.warn(
            f"{name}: the median expert saw {int(counts.float().median())} calibration tokens for "
            f"hidden_size {shape.hidden_size}, the one with fewest {int(counts.min())}; use more "
            "calibration text (calibration_tokens), or all_experts=True.",
            stacklevel=2,
        )
    return counts


def allocate_rows(
    plans: list[LayerPlan],
    shapes: list[LayerShape],
    budget: Budget,
    config: BitsMoEConfig,
    kept: list[tuple[int, ...]],
) -> tuple[list[Tensor], list[Allocation]]:
    """Widths ``[3, E, r]`` int64 per layer; one allocation for all layers, or one for each.

    Args:
        kept: experts of each layer that have no rows.
    """
    ours = [_others(shape.num_experts, ids) for shape, ids in zip(shapes, kept, strict=True)]
    costs = [
        plan.costs[:, own].reshape(-1, len(config.widths)).numpy()
        for plan, own in zip(plans, ours, strict=True)
    ]
    sizes = [row_sizes(shape, config.widths) for shape in shapes]
    if config.scope == "global":
        results = [allocate(costs, sizes, budget.payload_bits)]
    else:
        results = [
            allocate([cost], [size], budget.payload_bits * shape.weights // budget.weights)
            for shape, cost, size in zip(shapes, costs, sizes, strict=True)
        ]
    choice = torch.from_numpy(np.concatenate([result.choice for result in results]))
    pieces = choice.split([len(cost) for cost in costs])
    table = torch.tensor(config.widths)
    widths = [torch.zeros(plan.costs.shape[:-1], dtype=torch.int64) for plan in plans]
    for layer, piece, own in zip(widths, pieces, ours, strict=True):
        layer[:, own] = table[piece.long()].view(3, len(own), -1)
    return widths, results


def _others(experts: int, kept: tuple[int, ...]) -> list[int]:
    return [expert for expert in range(experts) if expert not in kept]


def _estimated_error(plan: LayerPlan, row_bits: Tensor, config: BitsMoEConfig) -> float:
    index = torch.searchsorted(torch.tensor(config.widths), row_bits)
    return float(plan.costs.gather(-1, index[..., None]).double().sum())


def _drift(exact: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """``[T, H]``: what is missing from the residual stream ``outputs`` of the quantized model so far."""
    return torch.cat([(a - b).flatten(0, -2).cpu() for a, b in zip(exact, outputs, strict=True)])


def _output_errors(exact: list[Tensor], rounded: list[Tensor], token_weights: Tensor) -> Tensor:
    """Weighted mean square difference of two versions of a decoder layer's outputs, ``[T]``.

    Everything but the routed experts is the same in both, so this is the experts' output error.
    """
    squares = [
        (a.float() - b.float()).square().mean(-1).flatten().cpu() for a, b in zip(exact, rounded, strict=True)
    ]
    return torch.cat(squares) * token_weights


@dataclass(frozen=True)
class _Decoder:
    """The decoder layers of a model and the MoE layer of each, None for dense ones."""

    layers: nn.ModuleList
    moe: list[MoELayer | None]


def _decoder(model: nn.Module, layers: list[MoELayer]) -> _Decoder:
    path = {layer.layer_name.rpartition(".")[0] for layer in layers}
    names = [layer.layer_name for layer in layers]
    if len(path) != 1 or len(set(names)) != len(names):
        raise QuantizationError(
            f"MoE layers at {', '.join(layer.name for layer in layers)}: only one per decoder layer, in "
            "one list of decoder layers, is supported"
        )
    modules = model.get_submodule(path.pop())
    assert isinstance(modules, nn.ModuleList)  # by decoder_layer_name
    by_index = {int(layer.layer_name.rpartition(".")[2]): layer for layer in layers}
    return _Decoder(modules, [by_index.get(i) for i in range(len(modules))])


def _plan(
    forward: LayerwiseForward, decoder: _Decoder, tokens: int, budget: Budget, config: BitsMoEConfig
) -> tuple[list[LayerPlan], list[ExpertOutputs]]:
    """First pass: costs of all rows of all layers, and what their experts put out, on the unquantized model.

    Args:
        tokens: statistics see the first so many, the others are held out.
    """
    plans, experts = [], []
    for index in logging.tqdm(range(len(decoder.layers)), desc="Calibrating layers"):
        layer = decoder.moe[index]
        if layer is None:
            forward.advance(forward.run(index))
            continue
        activations, outputs = capture_layer(forward, index, layer.module, config.token_weighting)
        shape = layer_shape(layer.module)
        gating = partial(apply_gating, layer.module)
        weights = read_experts(layer.module)
        seen = activations.first(tokens)
        check_computation(
            layer.name, layer.module, weights, (seen.hidden, seen.top_k_index, seen.top_k_weights)
        )
        biases = read_biases(layer.module)
        problem = build_problem(layer.name, weights, seen, gating, config, biases=biases)
        plans.append(plan_layer(problem, budget.payload_bits * shape.weights // budget.weights))
        massive = forms_massive_activations(forward.hidden, outputs)
        experts.append(ExpertOutputs(problem.statistics.output_peaks, massive))
        forward.advance(outputs)
    return plans, experts


def _round(
    model: nn.Module,
    forward: LayerwiseForward,
    decoder: _Decoder,
    plans: list[LayerPlan],
    widths: list[Tensor],
    kept: list[tuple[int, ...]],
    tokens: int,
    config: BitsMoEConfig,
) -> None:
    """Second pass: round and replace the experts of every layer, and write the manifest."""
    pending = iter(zip(plans, widths, kept, strict=True))
    exact = forward.hidden  # as the unquantized model goes on; forward.hidden is the quantized one's
    for index in logging.tqdm(range(len(decoder.layers)), desc="Rounding layers"):
        layer = decoder.moe[index]
        if layer is None:
            exact = forward.run(index, exact)
            forward.advance(forward.run(index))
            continue
        plan, row_bits, ids = next(pending)
        exact = forward.run(index, exact)
        activations, outputs = capture_layer(forward, index, layer.module, config.token_weighting)
        shape = layer_shape(layer.module)
        seen = activations.first(tokens)
        drift = _drift(exact, outputs)[:tokens] if config.compensation else None
        counts = warn_about_thin_calibration(layer.name, seen, shape)
        weights, gating = read_experts(layer.module), partial(apply_gating, layer.module)
        biases = read_biases(layer.module)
        problem = build_problem(layer.name, weights, seen, gating, config, plan.bases, drift, biases)
        result = round_layer(problem, row_bits)
        packed = with_originals(result.packed, weights, biases, ids)
        config.layers[layer.name] = layer_manifest(shape, packed, layer.module.down_proj.dtype, ids)
        module = BitsMoEExperts(layer.module, packed_spec(layer.name, config))
        module.load_packed(packed)
        module.to(layer.module.down_proj.device)
        module.drop_original_weights()
        replace_module(model, layer.name, module)
        rounded = forward.run(index)
        errors = _output_errors(outputs, rounded, activations.token_weights)
        config.layers[layer.name]["report"] = {
            "estimated_error": _estimated_error(plan, row_bits, config),
            "calibration_error": float(errors[:tokens].mean()),
            "unseen_error": float(errors[tokens:].mean()) if len(errors) > tokens else None,
            "bits_over_bound": bits_over_bound(plan, result, shape) if config.cost == "output" else None,
            "output_energy": problem.statistics.output_energy,
            "tokens_per_expert": counts.tolist(),
            "output_peaks": problem.statistics.output_peaks.tolist(),
        }
        forward.advance(rounded if config.sequential else outputs)


def quantize_model(model: nn.Module, blocks: Tensor, config: BitsMoEConfig) -> BitsMoEConfig:
    """Quantize the routed experts of a loaded model in place.

    Args:
        model: transformers causal language model, all weights loaded.
        blocks: ``[blocks, sequence_length]`` int64 calibration tokens.
        config: options; its manifest is replaced.

    Returns:
        the config with the manifest of the packed layers.

    Raises:
        QuantizationError: no MoE layers, unknown family, NaN weights, or budget out of reach.
    """
    moe = find_moe_layers(model)
    shapes = [layer_shape(layer.module) for layer in moe]
    budget = reserve(plan_budget(shapes, config), "biases", bias_bits(moe))
    decoder = _decoder(model, moe)
    training = model.training
    model.eval()
    with torch.no_grad():
        blocks, seen = held_out_last(blocks, config.held_out)
        tokens = seen * blocks.shape[1]
        forward = LayerwiseForward(model, decoder.layers, blocks, config.batch_size)
        plans, outputs = _plan(forward, decoder, tokens, budget, config)
        kept = choose_kept(moe, outputs, config)
        budget = reserve(budget, "kept_experts", kept_bits(moe, kept))
        widths, allocations = allocate_rows(plans, shapes, budget, config, kept)
        config.layers = {}
        forward.restart()
        _round(model, forward, decoder, plans, widths, kept, tokens, config)
    model.train(training)
    config.calibration = {
        "tokens": tokens,
        "held_out_tokens": blocks.numel() - tokens,
        "sha256": hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest(),
        "allocation_relative_gap": max(result.relative_gap for result in allocations),
    }
    return config
