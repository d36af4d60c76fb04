"""Distance of a model from its reference: every number against its definition, computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families_support import build, off_convention, quantize
from forms_support import CAUSAL
from torch import nn
from transformers import AutoModelForCausalLM

from bitsmoe_plugin.commands.divergence import TokenDivergences
from bitsmoe_plugin.commands.evaluate import EvaluationText, as_record, evaluate_model
from bitsmoe_plugin.commands.evaluate_output import told_divergence
from bitsmoe_plugin.commands.routing import RoutingComparison, other_experts, selected

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:no tokenizer saved")


def test_numbers_of_two_tokens_by_hand() -> None:
    """Reference (1/2, 1/2) at both tokens; the model says (1/2, 1/2) and (1/4, 3/4); the text has 0 and 1."""
    wanted = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    ours = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    found = TokenDivergences()
    found.add(ours, wanted, torch.tensor([0, 1]))
    result, kl = found.result(), 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert result.kl_divergence == pytest.approx(kl / 2, rel=1e-6)
    assert result.kl_median == pytest.approx(kl / 2, rel=1e-6)
    assert result.kl_99 == pytest.approx(0.99 * kl, rel=1e-6)
    assert result.kl_999 == pytest.approx(0.999 * kl, rel=1e-6)
    assert result.top1_agreement == 0.5  # of equal probabilities the first counts
    assert result.probability_change == pytest.approx(math.sqrt(0.25**2 / 2), rel=1e-6)


def test_batches_count_by_their_tokens() -> None:
    """A mean of the batches' means, or of their percentiles, would weigh a short last batch too much."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 1000, 7, generator=generator).log_softmax(-1)
    tokens = torch.randint(0, 7, (1000,), generator=generator)
    whole, parts = TokenDivergences(), TokenDivergences()
    whole.add(logits[0], logits[1], tokens)
    for piece in (slice(0, 900), slice(900, 903), slice(903, 1000)):
        parts.add(logits[0, piece], logits[1, piece], tokens[piece])
    assert vars(parts.result()) == pytest.approx(vars(whole.result()), rel=1e-9)
    each = (logits[1].exp() * (logits[1] - logits[0])).sum(-1).double().numpy()
    assert whole.result().kl_99 == pytest.approx(np.sort(each)[[989, 990]] @ [0.99, 0.01], rel=1e-5)
    change = logits[0].exp() - logits[1].exp()
    squares = [float(change[place, token]) ** 2 for place, token in enumerate(tokens)]
    assert whole.result().probability_change == pytest.approx(math.sqrt(sum(squares) / 1000), rel=1e-5)


def test_sets_are_compared_not_their_order() -> None:
    """The order of selected experts is that of their scores, which says nothing about who computes."""
    ours, theirs = torch.tensor([[3, 1], [0, 2], [5, 4]]), torch.tensor([[1, 3], [0, 3], [4, 5]])
    module = Plain()
    found = other_experts(selected(module, [None, ours]), selected(module, [None, theirs]))
    assert found.tolist() == [False, True, False]
    assert other_experts(ours, torch.tensor([[3], [0], [5]])).all()


class Plain(nn.Module):
    """Experts that are called as most families call them."""

    is_transposed, is_concatenated, has_bias, has_gate = False, True, False, True


class Llama4TextExperts(nn.Module):
    """Called with a copy of the tokens per expert, zero where one is not selected."""

    num_experts = 3


def test_copies_say_who_is_selected() -> None:
    copies = torch.zeros(3, 2, 4)
    copies[2, 0], copies[0, 1], copies[1, 1] = 1.0, 2.0, -1.0
    assert selected(Llama4TextExperts(), [copies.flatten(0, 1)]).tolist() == [[-1, -1, 2], [-1, 0, 1]]


def moved(model: Any, layer: int) -> Any:
    """A copy of a model whose router of one layer swaps experts 0 and 1 (their weights stay)."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        router = other.model.layers[layer].mlp.gate.weight
        router[[0, 1]] = router[[1, 0]].clone()
    return other


@torch.no_grad()
def test_only_tokens_of_moved_experts_in_scored_places_count(tiny_model: Any) -> None:
    """Against the routers' own outputs: a set changes where exactly one of the swapped experts is in it."""
    model = build(tiny_model, "qwen3_moe", num_hidden_layers=1).eval()
    other = moved(model, 0)
    tokens = torch.randint(1, 64, (3, 16), generator=torch.Generator().manual_seed(5))
    chosen: list[torch.Tensor] = []
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_hook(lambda _, args, out: chosen.append(out[-1]))
    model(tokens)
    handle.remove()
    (index,) = chosen
    single = ((index == 0) | (index == 1)).sum(-1).view(3, 16) == 1
    assert 0 < single.float().mean() < 1
    for scored in (None, 5):
        result = evaluate_model(other, [EvaluationText("all", tokens, scored)], reference=model, batch_size=2)
        wanted = single[:, -1 - (scored or 15) : -1].double().mean()
        assert result.routing_change == pytest.approx(float(wanted), abs=1e-9)
        assert list(result.routing_change_by_layer.values()) == pytest.approx([float(wanted)])
        assert list(result.routing_change_by_layer) == ["model.layers.0.mlp.experts"]


@torch.no_grad()
def test_layers_before_a_change_stay_and_the_whole_is_the_mean(tiny_model: Any) -> None:
    model = build(tiny_model, "qwen3_moe").eval()
    tokens = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(6))
    texts = [EvaluationText("all", tokens)]
    same = evaluate_model(model, texts, reference=model)  # one model as its own reference
    assert same.routing_change == same.kl_divergence == same.kl_999 == same.probability_change == 0
    result = evaluate_model(moved(model, 1), texts, reference=model)
    first, second = result.routing_change_by_layer.values()
    assert first == 0 < second
    assert result.routing_change == pytest.approx((first + second) / 2)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe")},
    **{name: CAUSAL[name] for name in ("no gate", "identity experts")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_models_of_every_way_to_call_experts(tiny_model: Any, tmp_path: Path, family: str) -> None:
    """Packed against unpacked: the first layer sees what it saw before; and with other inputs it does not."""
    name, changes = FAMILIES[family]
    build(tiny_model, name, **changes).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    packed = quantize(tmp_path).eval()
    texts = [EvaluationText("all", torch.arange(1, 65).view(2, 32) % 63)]
    result = evaluate_model(packed, texts, reference=model)
    assert result.routing_unknown is None
    shares = list(result.routing_change_by_layer.values())
    assert shares[0] == 0
    assert max(shares) < 0.5
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(0))
    shares = list(evaluate_model(packed, texts, reference=model).routing_change_by_layer.values())
    assert shares[0] > 0


@torch.no_grad()
def test_unknown_routing_is_named_and_the_rest_is_told(tiny_model: Any) -> None:
    """No number where experts are not found, and no error: perplexity and divergence stand by themselves."""
    model = off_convention().eval()
    tokens = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(8))
    result = evaluate_model(model, [EvaluationText("all", tokens)], reference=model)
    assert result.kl_divergence == 0
    assert result.routing_change is result.routing_change_by_layer is None
    assert "jetmoe" in result.routing_unknown
    assert any(
        "not known" in line and "jetmoe" in line for line in told_divergence(as_record(result, "text"))
    )
    deep, shallow = (build(tiny_model, "qwen3_moe", num_hidden_layers=n).eval() for n in (2, 1))
    result = evaluate_model(deep, [EvaluationText("all", tokens)], reference=shallow)
    assert "2 MoE layers and the reference 1" in result.routing_unknown


def test_no_hook_stays_behind(tiny_model: Any) -> None:
    model = build(tiny_model, "qwen3_moe").eval()
    routing = RoutingComparison(model, model)
    with pytest.raises(KeyboardInterrupt), routing.recording():
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in model.modules())
