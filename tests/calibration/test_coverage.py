"""How much calibration text is enough, and what is said and done where it is not."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.calibration import coverage
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.models.routing import experts_per_token
from bitsmoe_plugin.spectral.error_feedback import damping

QWEN3_30B, QWEN3_235B, DEEPSEEK_V3 = (
    LayerShape(128, 2048, 768),
    LayerShape(128, 4096, 1536),
    LayerShape(256, 7168, 2048),
)


@pytest.mark.parametrize(
    ("shape", "chosen", "wanted"),
    [
        (QWEN3_30B, 8, 131_072),
        (QWEN3_235B, 8, 262_144),
        (DEEPSEEK_V3, 8, coverage.MOST_TOKENS),  # 917,504 would be four per dimension
        (LayerShape(8, 4096, 14_336), 2, coverage.FEWEST_TOKENS),
        (QWEN3_30B, None, coverage.FEWEST_TOKENS),
    ],
)
def test_default_tokens_give_an_expert_four_per_dimension(
    shape: LayerShape, chosen: int | None, wanted: int
) -> None:
    """Within limits that keep time and memory in hand, and what was the default for all before."""
    assert coverage.wanted_tokens([LayerShape(4, 64, 32), shape], chosen) == wanted


def test_few_tokens_are_told_beforehand_with_how_many_are_enough() -> None:
    """The layer with the fewest per dimension decides; at two per dimension there is no warning."""
    shapes = [LayerShape(16, 2048, 768), QWEN3_30B]
    with pytest.warns(UserWarning, match=r"8,192 calibration tokens are 0\.25 .*about 65,536"):
        coverage.warn_about_few_tokens(8192, shapes, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coverage.warn_about_few_tokens(65_536, shapes, 8)
        coverage.warn_about_few_tokens(1, shapes, None)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"num_experts_per_tok": 8}, 8), ({"moe_topk": [4, 2]}, 2), ({"moe_k": 6}, 6), ({"top_k": 50}, None)],
)
def test_names_of_the_number_of_chosen_experts(fields: dict[str, Any], wanted: int | None) -> None:
    """``top_k`` is sampling's."""
    text = SimpleNamespace(**fields)
    assert experts_per_token(SimpleNamespace(get_text_config=lambda: text)) == wanted


def test_a_layer_that_is_worse_than_none_is_refused() -> None:
    """Without held-out text nobody knows; a layer that puts nothing out has nothing to lose; and few tokens,
    some of which err much, may be chance."""

    def judge(errors: list[float], energy: float) -> None:
        found = torch.tensor(errors)
        unseen = float(found.mean()) if errors else None
        coverage.refuse_thin_calibration("layer", {"unseen_error": unseen, "output_energy": energy}, found)

    with pytest.raises(QuantizationError, match=r"layer: .* err by 0\.2, more than the 0\.1 .*--allow-thin"):
        judge([0.2] * 3, 0.1)
    with pytest.raises(QuantizationError):
        judge([0.1, 0.3] * 50, 0.1)
    for errors, energy in (([0.05] * 9, 0.1), ([], 0.1), ([0.2], 0.1), ([0.1] * 9, 0.0), ([0.04, 0.36], 0.1)):
        judge(errors, energy)


def test_damping_falls_with_tokens_per_dimension() -> None:
    """Ten times the option's below one token per dimension, the option's from about three on, at most 1."""
    config = BitsMoEConfig(damping=0.01)
    found = [damping(config, tokens, 100) for tokens in (0, 50, 100, 200, 320, 10**6)]
    torch.testing.assert_close(found, [0.1, 0.1, 0.1, 0.025, 0.01, 0.01])
    assert damping(BitsMoEConfig(damping=0.5), 1, 100) == 1.0
