"""What linear layers in fewer bits cost where they send tokens to other experts."""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.calibration.carried import Carried
from bitsmoe_plugin.pipeline.dense_costs import _added_error, _Outputs, _without_shift
from bitsmoe_plugin.pipeline.noise import with_noise


def _outputs(hidden: Tensor, *rerouted: int) -> _Outputs:
    experts = torch.zeros(len(hidden), 1, dtype=torch.int64)
    experts[list(rerouted)] = 1
    return _Outputs(hidden, experts)


def test_tokens_that_go_to_other_experts_cost_what_they_add() -> None:
    """Guards against leaving them out, which undervalued the first layer's attention three times, and against
    paying twice for tokens that earlier errors send away anyway."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4, 64, generator=generator)
    noise = 0.1 * torch.randn(4, 64, generator=generator)
    change = 0.01 * torch.randn(4, 64, generator=generator)
    weights = torch.tensor([1.0, 2.0, 0.5])  # the fourth is held out
    before, after = exact + noise, exact + noise + change
    kept = _added_error(_outputs(exact), _outputs(before), _outputs(after), weights)
    torch.testing.assert_close(kept, float((change[:3].square().mean(1) * weights).mean()), rtol=1e-4, atol=0)
    after[1] = exact[1] + 2.0
    added = _added_error(_outputs(exact), _outputs(before), _outputs(after, 1), weights)
    flipped = weights[1] * (4.0 - noise[1].square().mean()) / 3
    rest = (change[:3].square().mean(1) * weights)[[0, 2]].sum() / 3
    torch.testing.assert_close(added, float(flipped + rest), rtol=1e-4, atol=0)
    after[1] = exact[1]  # came out better by chance
    assert _added_error(_outputs(exact), _outputs(before), _outputs(after, 1), weights) >= float(rest) * 0.999


def test_noise_is_in_proportion_to_each_token_and_none_changes_nothing() -> None:
    hidden = Carried([torch.randn(2, 8, 4096) * torch.tensor([1.0, 100.0])[:, None, None]], [{"a": ()}])
    noisy = with_noise(hidden, 0.04, seed=3)
    share = (noisy[0] - hidden[0]).square().mean(-1) / hidden[0].square().mean(-1)
    torch.testing.assert_close(share, torch.full((2, 8), 0.04), rtol=0.15, atol=0)
    assert noisy.left == hidden.left
    assert torch.equal(with_noise(hidden, 0.0, seed=3)[0], hidden[0])


def test_a_change_that_all_tokens_share_costs_nothing_beside_experts_that_make_up_for_it() -> None:
    """Guards against a layer of attention that gets 8 bits for a shift that the experts are fitted to."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(5, 64, generator=generator)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])  # the fifth is held out
    own = 0.01 * torch.randn(5, 64, generator=generator)
    own[:4] -= weights @ own[:4] / weights.sum()
    shifted = _without_shift(_outputs(before), _outputs(before + own + 0.3, 1), weights)
    torch.testing.assert_close(shifted.hidden, before + own, rtol=0, atol=1e-5)
    assert shifted.experts[1] == 1
