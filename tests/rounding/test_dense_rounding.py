"""Linear layers rounded to codes with one scale per group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitsmoe_plugin.codec.dense import DenseScheme
from bitsmoe_plugin.rounding.dense_rounding import round_linear
from bitsmoe_plugin.runtime.dense_linear import pack, packed_again, put, unpack


def correlated(inputs: int, tokens: int) -> torch.Tensor:
    """Second moments of inputs of very different strength that depend on one another."""
    mix = torch.randn(inputs, inputs) * torch.logspace(0, -1.5, inputs)
    x = torch.randn(tokens, inputs) @ mix
    return x.T @ x / tokens


def error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor) -> float:
    groups = codes.shape[1] // scales.shape[1]
    off = (weight - codes * scales.float().repeat_interleave(groups, 1)).double()
    return float(((off @ moments.double()) * off).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_8_bits_are_off_by_half_a_step_and_4_by_less_with_feedback(dtype: torch.dtype) -> None:
    """Guards against clipped weights, scales that their dtype rounds afterwards, and feedback that goes the
    wrong way."""
    weight, moments = torch.randn(64, 128).to(dtype), correlated(128, 1024)
    codes, scales = round_linear(weight, DenseScheme(8, 32), None, 0.01, True)
    steps = scales.float().repeat_interleave(32, 1)
    assert scales.dtype == dtype
    # A scale of 8 mantissa bits may be 2**-9 too small, at a code of 127.
    assert float(((weight.float() - codes * steps).abs() / steps).max()) < 0.5 + 127 * 2**-8
    plain = round_linear(weight, DenseScheme(4, 32), moments, 0.01, False)
    passed = round_linear(weight, DenseScheme(4, 32), moments, 0.01, True)
    assert error(weight.float(), *passed, moments) < 0.5 * error(weight.float(), *plain, moments)
    assert passed[0].abs().max() <= 8


def test_layers_of_zeros_and_without_moments_have_sound_scales() -> None:
    """Guards against scales of 0, which every reader refuses."""
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[0, 0] = 1e-7  # below what the dtype holds over 7
    for bits in (4, 8):
        codes, scales = round_linear(weight, DenseScheme(bits, 32), torch.zeros(64, 64), 0.01, True)
        assert bool((scales > 0).all())
        assert bool((codes[1:] == 0).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_all_codes_under_all_scales_of_bfloat16_are_packed_again(bits: int) -> None:
    """Guards against layers that can be loaded and not be saved: a product is rounded to 8 bits."""
    scheme = DenseScheme(bits, 32)
    codes = torch.arange(-scheme.largest - 1, scheme.largest + 1)
    codes = codes.repeat(32 // min(32, len(codes))).to(torch.int8).expand(128, -1).contiguous()
    mantissas = torch.arange(128, 256, dtype=torch.float32)[:, None] / 2**14
    scales = mantissas.expand(-1, codes.shape[1] // 32).to(torch.bfloat16).contiguous()
    module = nn.Linear(codes.shape[1], 128, bias=False, dtype=torch.bfloat16)
    put(module, pack(codes, scales, scheme), scheme)
    again = packed_again("layer", module)
    assert torch.equal(again["weight_packed"], pack(codes, scales, scheme)["weight_packed"])
    assert torch.equal(unpack(again, scheme), module.weight)
