"""Budgets of single layers and projections: met to the row, inside the total, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.allocation.budget import plan_budget
from bitsmoe_plugin.allocation.row_widths import allocate_rows
from bitsmoe_plugin.allocation.sub_budgets import StoredLayer, each_layer, layer_share, sub_budgets
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.cli import main
from bitsmoe_plugin.codec.layout import FACTORS, LayerShape, fixed_bits, row_sizes
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.commands.inspect import inspect_checkpoint

SHAPE = LayerShape(num_experts=6, hidden_size=64, intermediate_size=64)
LAYERS = [StoredLayer(name, SHAPE) for name in "abc"]
TOTAL = plan_budget([SHAPE] * 3, BitsMoEConfig(bits=4)).payload_bits


def groups_of(**options: Any) -> list:
    config = BitsMoEConfig(bits=4, **options)
    return sub_budgets(LAYERS, plan_budget([SHAPE] * 3, config).payload_bits, config)


@given(
    layer_bits=st.dictionaries(st.sampled_from("abc"), st.floats(3, 5)),
    projection_bits=st.dictionaries(st.sampled_from(FACTORS), st.floats(1.5, 3.5)),
    factor_bits=st.sampled_from([None, 4.0]),
)
def test_groups_hold_every_row_once_and_spend_the_total(layer_bits, projection_bits, factor_bits) -> None:
    """Guards against rows with two budgets or none, and against budgets that add up to more than ``bits``."""
    options = {"layer_bits": layer_bits, "projection_bits": projection_bits, "factor_bits": factor_bits}
    config = BitsMoEConfig(bits=4, **options)
    payload = plan_budget([SHAPE] * 3, config).payload_bits
    try:
        groups = sub_budgets(LAYERS, payload, config)
    except QuantizationError:
        return
    rows = sorted((layer, factor) for group in groups for layer in group.layers for factor in group.factors)
    assert rows in ([(i, f) for i in range(3) for f in range(3)], [])
    spent = sum(group.payload_bits for group in groups)
    assert spent <= payload
    if len(layer_bits) < 3 and len(projection_bits) < 3:
        assert spent == payload
    fixed = fixed_bits(SHAPE, config.basis_bits, config.basis_group_size, config.input_bases)
    own = sum(fixed.values()) - (0 if factor_bits is None else fixed["bases"])
    for position, name in enumerate("abc"):
        mine = sum(g.payload_bits for g in groups if g.layers == (position,) and g.given)
        if name in layer_bits and len(projection_bits) < 3:
            assert mine + own == int(layer_bits[name] * SHAPE.weights)
    for group in groups:
        if len(group.factors) == 1 and FACTORS[group.factors[0]] in projection_bits:
            weights = len(group.layers) * SHAPE.weights // 3
            beside = len(group.layers) * (fixed["row_codes"] + fixed["scale_grids"]) // 3
            wanted = int(projection_bits[FACTORS[group.factors[0]]] * weights)
            assert group.payload_bits + beside == wanted


def test_without_them_all_rows_share_the_whole_budget() -> None:
    """Guards results of configs that do not use them, and the config.json of their checkpoints."""
    (group,) = groups_of()
    assert (group.layers, group.factors, group.payload_bits) == ((0, 1, 2), (0, 1, 2), TOTAL)
    assert layer_share([group], [SHAPE] * 3, 1) == TOTAL // 3
    assert [part.payload_bits for part in each_layer([group], [SHAPE] * 3)] == [TOTAL // 3] * 3
    assert not {"layer_bits", "projection_bits"} & set(BitsMoEConfig().to_dict())
    config = BitsMoEConfig(layer_bits={"a": 3}, projection_bits={"up": 2.5})
    assert BitsMoEConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_bits": {"d": 2}}, "layer_bits names d, which the model lacks; its layers are a, b, c"),
        ({"layer_bits": {"a": 0.2}}, r"gives a 0\.2 bits per weight; the smallest reachable is 0\.7083"),
        ({"layer_bits": {"a": 9, "b": 9}}, r"bits=4 is too little beside layer_bits: .* is 6\.2361"),
        ({"layer_bits": dict.fromkeys("abc", 4.5)}, r"bits=4 is too little beside layer_bits: .* is 4\.5"),
        (
            {"projection_bits": {"up": 0.1}},
            r"gives up 0\.1 bits per weight; the smallest reachable is 0\.2083",
        ),
        (
            {"projection_bits": {"up": 11.5}},
            r"needs 3\.7639 bits .* all other layers, which may spend 3\.2917; lower it, or raise bits",
        ),
        (
            {"layer_bits": {"b": 3}, "projection_bits": {"up": 9}},
            r"needs 2\.9306 bits .* rows of b, which may spend 2\.2917; lower it, or raise layer_bits",
        ),
    ],
)
def test_what_cannot_be_met_is_refused_with_both_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        groups_of(**options)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_allocation_spends_each_budget_to_the_row(scope: str) -> None:
    """A kept expert has no rows in any group; the rows of every group take what it may spend, less a row."""
    config = BitsMoEConfig(
        bits=5, scope=scope, layer_bits={"a": 6.5, "c": 3.9}, projection_bits={"down": 4, "gate": 3.5}
    )
    layers = [StoredLayer("a", SHAPE, 0, 16 * SHAPE.weights // 6), *LAYERS[1:]]
    payload = plan_budget([SHAPE] * 3, config).payload_bits - layers[0].kept
    groups = sub_budgets(layers, payload, config)
    falling = torch.tensor([4.0**-width for width in config.widths])
    costs = {i: torch.rand(3, 6, 64, 1) * falling for i in (2, 5, 7)}
    widths = allocate_rows(costs, [SHAPE] * 3, groups, config, {2: (4,), 5: (), 7: ()})
    assert not widths.rows[2][:, 4].any()
    sizes = row_sizes(SHAPE, config.widths)
    for group in groups:
        rows = [widths.rows[(2, 5, 7)[i]][list(group.factors)] for i in group.layers]
        taken = sum(int(row.sum()) for row in rows) * SHAPE.intermediate_size
        assert group.payload_bits - sizes[1] < taken <= group.payload_bits, group


@pytest.mark.filterwarnings("ignore:.*calibration token")
def test_a_checkpoint_counts_what_was_asked_for(tiny_model, tmp_path: Path, capfd) -> None:
    """From the options of a command to the bytes of the files; the estimate says the same beforehand."""
    dense, layer = tmp_path / "dense", "model.layers.0.mlp.experts"
    tiny_model("qwen3_moe", moe_intermediate_size=32).save_pretrained(dense)
    options: dict[str, Any] = {"layer_bits": {layer: 9.5}, "projection_bits": {"down": 3}}
    tokens = torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(1)).tolist()
    config = BitsMoEConfig(8, dataset=tokens, sequence_length=32, basis_group_size=16, **options)
    expected = estimate(dense, config)
    with pytest.raises(QuantizationError, match="smallest reachable is"):
        estimate(dense, BitsMoEConfig(8, basis_group_size=16, layer_bits={layer: 1}))
    assert expected.smallest_bits < 8
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "out")
    report = inspect_checkpoint(tmp_path / "out")
    row = 32 / (3 * 4 * 32 * 32)  # one more bit in one row, per weight of a layer
    assert 9.5 - row < report["layers"][layer]["bits_per_weight"] <= 9.5
    assert 8 - 2 * row < report["bits_per_weight"] <= 8
    for found in (report, *report["layers"].values()):
        assert 3 - 3 * row < found["projections"]["down"] <= 3
    assert expected.expert_bytes == pytest.approx(report["expert_bytes"], rel=1e-3)
    assert {name: getattr(read_config(tmp_path / "out"), name) for name in options} == options
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "down 3.0000" in capfd.readouterr().out
