"""Layer statistics against a slow implementation, token by token, and against measured errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.calibration import activations as layer_activations
from bitsmoe_plugin.calibration import statistics
from bitsmoe_plugin.calibration.activations import PRIOR_TOKENS
from bitsmoe_plugin.calibration.statistics import LayerStatistics
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.expert_weights import ExpertWeights
from bitsmoe_plugin.spectral.layer_problem import build_problem
from bitsmoe_plugin.spectral.moments import (
    BasisMoments,
    HiddenMoments,
    basis_moments,
    input_covariance,
    input_variance,
    own_share,
    pooled_covariance,
)

pytestmark = pytest.mark.usefixtures("float_products")

E, SIZE, H, T, K = 4, 8, 16, 50, 2
TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}
"""float32 sums of 100 terms are good to 1e-5; central differences to 1e-8."""


def slopes(gating: Callable, gate: Tensor, up: Tensor, step: float = 1e-5) -> list[Tensor]:
    """dh/dgate and dh/dup in float64 by central differences."""
    by_gate = (gating(gate + step, up) - gating(gate - step, up)) / (2 * step)
    by_up = (gating(gate, up + step) - gating(gate, up - step)) / (2 * step)
    return [by_gate, by_up]


def slow_statistics(layer, tokens) -> tuple[LayerStatistics, Tensor, BasisMoments, float]:
    """The sums of the module text, one token of one expert after another, in float64: statistics, second
    moments of hidden activations, those that bases are of, and the layer's output energy."""
    w, a = layer.weights, layer.activations
    second, outputs = (torch.zeros(H, H, dtype=torch.double) for _ in range(2))
    gram = torch.zeros(2, H, H, dtype=torch.double)
    moment = torch.zeros(E, SIZE, SIZE, dtype=torch.double)
    neurons = torch.zeros(2, E, SIZE, dtype=torch.double)
    slots = torch.zeros(2, T, K, dtype=torch.double)
    peaks = torch.zeros(E, dtype=torch.double)
    mass = 0.0
    for e in range(E):
        matrices = [w.gate[e].double(), w.up[e].double()]
        down = w.down[e].double()
        own = tokens[e]
        for n, (t, weight) in enumerate(zip(own.tokens.tolist(), own.weights.tolist(), strict=True)):
            x = a.hidden[t].double()
            gate, up = (m @ x for m in matrices)
            h = layer.gating(gate, up)
            y = down @ h
            moment[e] += weight * torch.outer(h, h) / H
            outputs += weight * torch.outer(y, y)
            second += weight * torch.outer(x, x)
            mass += weight
            for part, slope in enumerate(slopes(layer.gating, gate, up)):
                q = slope**2 * (down**2).sum(0) / H
                neurons[part, e] += weight * q
                if n < own.routed:
                    peaks[e] = max(peaks[e], y.abs().max())
                    slots[part, t, own.slots[n]] = weight * q.sum()
        for part in range(2):
            for i in range(SIZE):
                gram[part] += neurons[part, e, i] * torch.outer(matrices[part][i], matrices[part][i])
    y = layer.forward(a.hidden, a.top_k_index, a.top_k_weights)
    energy = float((a.token_weights.double() * (y**2).sum(1) / H).mean())
    moments = BasisMoments(gram, outputs)
    return LayerStatistics(second / mass, neurons, slots, peaks), moment, moments, energy


@pytest.fixture
def layer(make_layer):
    return make_layer(E, SIZE, H, T, K)


def collect(layer, tokens) -> LayerStatistics:
    return statistics.collect(layer.weights, layer.activations, tokens, layer.gating)


def moments_of(layer, tokens) -> Tensor:
    """``[E, I, I]``, what ``collect`` gives away."""
    given = dict[int, Tensor]()
    statistics.collect(layer.weights, layer.activations, tokens, layer.gating, take=given.__setitem__)
    return torch.stack([given[expert] for expert in range(E)])


def test_every_sum_agrees_with_a_slow_implementation(layer) -> None:
    """Guards against a transposed product, a lost weight or a wrong slope in any statistic."""
    tokens = layer_activations.expert_tokens(layer.activations, E, seed=0)
    fast, (slow, moment, slow_moments, energy) = collect(layer, tokens), slow_statistics(layer, tokens)
    hidden = HiddenMoments(layer.weights, BitsMoEConfig(), [T] * E)
    for expert, found in enumerate(moments_of(layer, tokens)):
        torch.testing.assert_close(found.double(), moment[expert], **TOLERANCE)
        hidden.take(expert, found)
    moments = basis_moments(layer.weights, fast, hidden)
    for name, value in {**vars(slow), **vars(slow_moments)}.items():
        got = (vars(fast) | vars(moments))[name].double()
        torch.testing.assert_close(got, value.double(), **TOLERANCE, msg=name)
    found = statistics.output_energy(layer.weights, layer.activations, layer.gating, None)
    assert found == pytest.approx(energy, rel=1e-4)


def test_tokens_are_the_routed_ones_and_their_weights(layer) -> None:
    """Each (token, slot) belongs to exactly one expert, with weight omega p^2 / T, routed ones first."""
    a = layer.activations
    seen = torch.zeros(T, K)
    for e, own in enumerate(layer_activations.expert_tokens(a, E, seed=0)):
        tokens = own.tokens[: own.routed]
        seen[tokens, own.slots] += 1
        assert bool((a.top_k_index[tokens, own.slots] == e).all())
        wanted = a.token_weights[tokens] * a.top_k_weights[tokens, own.slots] ** 2 / T
        torch.testing.assert_close(own.weights[: own.routed], wanted)
    assert bool((seen == 1).all())


def test_thin_experts_are_topped_up_to_the_median_expert(layer, make_layer) -> None:
    """Added tokens weigh (1 - n / 64) of the layer's median expert; experts with 64 tokens get none."""
    tokens = layer_activations.expert_tokens(layer.activations, E, seed=0)
    typical = torch.stack([r.weights[: r.routed].sum() for r in tokens]).median()
    for r in tokens:
        assert len(r.tokens) == r.routed + PRIOR_TOKENS
        wanted = (1 - r.routed / PRIOR_TOKENS) * typical
        torch.testing.assert_close(r.weights[r.routed :].sum(), wanted)
    plenty = layer_activations.expert_tokens(make_layer(E, SIZE, H, 600, K).activations, E, seed=0)
    assert all(len(r.tokens) == r.routed >= PRIOR_TOKENS for r in plenty)


def covariance_of(bases: Tensor, stats, activations, tokens, prior: float) -> Tensor:
    pooled = pooled_covariance(bases, stats)
    z = activations.hidden.float() @ bases.transpose(1, 2)
    return input_covariance(
        z, pooled, tokens, tokens.of_slots(stats.slot_weights), own_share(tokens, H, prior)
    )


def test_unrouted_expert_gets_the_statistics_of_a_typical_one(make_layer) -> None:
    """Guards against zero cost, hence zero bits, for an expert that calibration never reached."""
    layer = make_layer(E, SIZE, H, 600, K)
    index = layer.activations.top_k_index
    activations = replace(layer.activations, top_k_index=torch.where(index == 2, 3, index))
    tokens = layer_activations.expert_tokens(activations, E, seed=0)
    assert tokens[2].routed == 0
    stats = statistics.collect(layer.weights, activations, tokens, layer.gating)
    for value in (moments_of(replace(layer, activations=activations), tokens), *vars(stats).values()):
        assert bool(torch.isfinite(value).all())
    mass = stats.neuron_weights.sum(-1)
    assert bool((mass[:, 2] > mass[:, [0, 1, 3]].amin(1) / 4).all())
    covariance = covariance_of(torch.eye(H)[None], stats, activations, tokens[2], 1.0)
    torch.testing.assert_close(covariance, stats.second_moment.float()[None])


def test_slots_that_point_nowhere_are_ignored(layer) -> None:
    """Ids from num_experts on mark tokens of other devices: they must not shift the other slots."""
    index = torch.where(layer.activations.top_k_index == 1, E, layer.activations.top_k_index)
    slots = layer_activations.routed_slots(replace(layer.activations, top_k_index=index), E)
    assert [len(token) for token, _ in slots] == [int((index == e).sum()) for e in range(E)]
    assert all(bool((index[token, slot] == e).all()) for e, (token, slot) in enumerate(slots))


def routed_only(layer, experts: int):
    """Rows without stand-in tokens, so that predictions speak of the routed tokens alone."""
    tokens = layer_activations.expert_tokens(layer.activations, experts, seed=0)
    return [replace(r, tokens=r.tokens[: r.routed], weights=r.weights[: r.routed]) for r in tokens]


def measured_error(layer, changed: ExpertWeights) -> float:
    """E[omega |y - y'|^2 / H] of the whole layer."""
    a = layer.activations
    routing = (a.hidden, a.top_k_index, a.top_k_weights)
    error = (layer.forward(*routing) - replace(layer, weights=changed).forward(*routing)).square().mean(-1)
    return float((error * a.token_weights).mean())


def test_hidden_moment_predicts_the_error_of_a_down_row(layer) -> None:
    """Exact, as the output is linear in down: |u|^2 d^T E[a h h^T] d for down + u d^T."""
    moments = moments_of(layer, routed_only(layer, E))
    u, d = torch.randn(H), torch.randn(SIZE)
    down = layer.weights.down.clone()
    down[1] += torch.outer(u, d)
    predicted = float(u.square().sum() * (d @ moments[1] @ d))
    assert predicted == pytest.approx(measured_error(layer, replace(layer.weights, down=down)), rel=1e-4)


@pytest.mark.parametrize("part", ["gate", "up"])
def test_neuron_weight_and_covariance_predict_the_error_of_a_neuron(make_layer, part: str) -> None:
    """To first order and for one neuron exact: E[a q] d^T C d. Error 1e-3 of the weights: 1 %."""
    layer = make_layer(E, 1, H, T, K)
    tokens = routed_only(layer, E)
    stats = collect(layer, tokens)
    d = torch.randn(H) * 1e-3 * layer.weights.gate.std()
    changed = getattr(layer.weights, part).clone()
    changed[3, 0] += d
    index = ("gate", "up").index(part)
    covariance = covariance_of(torch.eye(H).expand(2, H, H), stats, layer.activations, tokens[3], 0.0)[index]
    predicted = float(stats.neuron_weights[index, 3, 0] * (d @ covariance @ d))
    changed_weights = replace(layer.weights, **{part: changed})
    assert predicted == pytest.approx(measured_error(layer, changed_weights), rel=0.01)


@pytest.mark.parametrize("bases", [1, 2])
def test_covariance_blends_by_token_count(layer, bases: int) -> None:
    """n / (n + strength * rank) of the expert's own moment, the rest of the layer's."""
    tokens = routed_only(layer, E)
    stats = collect(layer, tokens)
    basis = torch.randn(bases, H, H)
    own = covariance_of(basis, stats, layer.activations, tokens[0], 0.0)
    blended = covariance_of(basis, stats, layer.activations, tokens[0], 0.5)
    pooled = basis @ stats.second_moment.float() @ basis.transpose(1, 2)
    share = tokens[0].routed / (tokens[0].routed + 0.5 * H)
    torch.testing.assert_close(blended, share * own + (1 - share) * pooled, rtol=1e-4, atol=1e-4)


def test_gate_and_up_have_the_covariance_of_their_own_basis(layer) -> None:
    """Guards the order of two bases, gate's first: each part as if its basis were the only one."""
    tokens = layer_activations.expert_tokens(layer.activations, E, seed=0)
    stats = collect(layer, tokens)
    bases = torch.randn(2, H, H)
    both = covariance_of(bases, stats, layer.activations, tokens[1], 0.5)
    for part in range(2):
        alone = covariance_of(bases[[part, part]], stats, layer.activations, tokens[1], 0.5)
        torch.testing.assert_close(both[part], alone[part], **TOLERANCE)


def test_one_basis_has_the_mean_covariance_of_gate_and_up(layer) -> None:
    """Guards that neither of them is left out."""
    tokens = layer_activations.expert_tokens(layer.activations, E, seed=0)
    stats, basis = collect(layer, tokens), torch.randn(1, H, H)
    each = covariance_of(basis.expand(2, H, H), stats, layer.activations, tokens[1], 0.5)
    one = covariance_of(basis, stats, layer.activations, tokens[1], 0.5)
    assert float((each[0] - each[1]).norm() / each[0].norm()) > 0.01, "they do not differ in the example"
    torch.testing.assert_close(one[0], each.mean(0), **TOLERANCE)


@pytest.mark.parametrize("bases", [1, 2])
def test_variances_are_the_diagonal_of_the_covariance(layer, bases: int) -> None:
    tokens = layer_activations.expert_tokens(layer.activations, E, seed=0)
    stats, basis = collect(layer, tokens), torch.randn(bases, H, H)
    z = layer.activations.hidden.float() @ basis.transpose(1, 2)
    given = z, pooled_covariance(basis, stats), tokens[1], tokens[1].of_slots(stats.slot_weights), 0.7
    covariance, variance = input_covariance(*given), input_variance(*given)
    torch.testing.assert_close(variance, covariance.diagonal(dim1=1, dim2=2), **TOLERANCE)


def test_neurons_weigh_alike_without_neuron_weighting(layer) -> None:
    """The switch changes two things: an expert's neurons all weigh its mean, so that its share in the
    layer stays, and the bases see the plain weights. All else is as before."""
    tokens = layer_activations.expert_tokens(layer.activations, E, seed=0)
    weighted = collect(layer, tokens)
    plain = statistics.collect(layer.weights, layer.activations, tokens, layer.gating, neuron_weighting=False)
    mean = weighted.neuron_weights.mean(-1, keepdim=True).expand(2, E, SIZE)
    torch.testing.assert_close(plain.neuron_weights, mean)
    assert float((weighted.neuron_weights / mean).std()) > 0.1, "the example has nothing to switch off"
    hidden = HiddenMoments(layer.weights, BitsMoEConfig(), [T] * E)
    gram = basis_moments(layer.weights, plain, hidden, neuron_weighting=False).gram
    for part, weights in enumerate((layer.weights.gate, layer.weights.up)):
        stacked = weights.double().flatten(0, 1)
        torch.testing.assert_close(gram[part], stacked.T @ stacked, **TOLERANCE)
    for name in ("second_moment", "slot_weights", "output_peaks"):
        torch.testing.assert_close(getattr(plain, name), getattr(weighted, name), msg=name)


def test_the_first_tokens_are_the_first_of_everything(layer) -> None:
    """Guards held-out tokens against reaching a statistic: all four tensors are cut alike."""
    a, first = layer.activations, layer.activations.first(7)
    assert torch.equal(first.hidden, a.hidden[:7])
    assert torch.equal(first.top_k_index, a.top_k_index[:7])
    assert torch.equal(first.top_k_weights, a.top_k_weights[:7])
    assert torch.equal(first.token_weights, a.token_weights[:7])


@pytest.mark.parametrize("part", ["gate", "up", "down"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_weights_are_refused_by_name(layer, part: str, value: float) -> None:
    """A NaN would spread over the whole layer through the shared bases."""
    bad = getattr(layer.weights, part).clone()
    bad[1, 2, 3] = value
    with pytest.raises(
        QuantizationError, match=rf"model\.layers\.7\.mlp\.experts: NaN or infinity in {part};"
    ):
        statistics.check_finite(
            "model.layers.7.mlp.experts", replace(layer.weights, **{part: bad}), layer.activations
        )


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("hidden", "the input activations"),
        ("top_k_weights", "the router's weights"),
        ("token_weights", "the layer's outputs"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_inputs_are_refused_by_name(layer, part: str, words: str, value: float) -> None:
    """The layer before, the router or the attention may have overflowed."""
    bad = getattr(layer.activations, part).clone()
    bad.view(-1)[4] = value
    with pytest.raises(QuantizationError, match=f"layer 7: NaN or infinity in {words};"):
        statistics.check_finite("layer 7", layer.weights, replace(layer.activations, **{part: bad}))
    statistics.check_finite("layer 7", layer.weights, layer.activations)


@pytest.mark.parametrize("part", ["hidden", "down"])
def test_sums_beyond_float32_are_refused_by_name(layer, part: str) -> None:
    """Finite weights and activations whose squares are not."""
    weights, activations = layer.weights, layer.activations
    if part == "hidden":
        activations = replace(activations, hidden=activations.hidden.sign() * 1e25)
    else:
        weights = replace(weights, down=weights.down.sign() * 1e25)
    with pytest.raises(QuantizationError, match=r"layer 7: NaN or infinity in the statistics \("):
        build_problem("layer 7", weights, activations, layer.gating, BitsMoEConfig(bits=2))


def test_all_tokens_can_be_shown_to_every_expert(layer) -> None:
    """The option for thin experts: routed tokens keep slots and weights, the others follow with little
    weight, and an expert that no token was routed to still weighs as much as a typical one."""
    index = layer.activations.top_k_index.masked_fill(layer.activations.top_k_index == 1, 0)
    activations = replace(layer.activations, top_k_index=index)
    routed = layer_activations.expert_tokens(activations, E, 0)
    shown = layer_activations.expert_tokens(activations, E, 0, all_tokens=True)
    assert shown[1].routed == 0
    typical = torch.stack([r.weights[: r.routed].sum() for r in routed if r.routed]).median()
    assert float(shown[1].weights.sum()) == pytest.approx(float(typical), rel=1e-5)
    for before, after in zip(routed, shown, strict=True):
        n = before.routed
        assert torch.equal(after.tokens[:n], before.tokens[:n])
        assert torch.equal(after.slots, before.slots)
        assert torch.equal(after.weights[:n], before.weights[:n])
        assert set(after.tokens.tolist()) == set(range(T))
        assert float(after.weights[n:].sum()) <= float(typical) * (1 + 1e-5)
