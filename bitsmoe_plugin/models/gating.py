"""What an expert does between its projections, as a small table that kernels know, found by trying.

``GatingForm`` describes the gatings of transformers' families but for a few; its text stands in graphs that
are compiled or exported. Runtimes that have no module to ask, and kernels, compute a gating from its form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bitsmoe_plugin.errors import ConfigError

Gating = Callable[..., Tensor]
"""(gate ``[n, I]``, up ``[n, I]``) -> hidden ``[n, I]``, elementwise; without a gate (up) -> hidden."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
ACTIVATIONS = tuple(_ACTIVATIONS)
"""Names, in the order in which ``csrc/bitsmoe.h`` counts them."""


@dataclass(frozen=True)
class GatingForm:
    """act(min(gate, limit)) * (clamp(up, -limit, limit) + offset), or act(up) of experts without a gate.

    Or with soft caps, cap(x, c) = c tanh(x / c): cap(gate, gate_cap) sigmoid(alpha gate) cap(up, up_cap).

    Attributes:
        activation: a name of ``_ACTIVATIONS``.
        has_gate: of the experts.
        alpha: of "silu": x sigmoid(alpha x).
        limit: infinite where nothing is clamped, which without a gate it never is.
        clamps_activation: min(act(gate), limit) instead.
        offset: added to up.
        gate_cap: of "silu", with a gate and without a limit; infinite where nothing is capped.
        up_cap: alike.
    """

    activation: str
    has_gate: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    clamps_activation: bool = False
    offset: float = 0.0
    gate_cap: float = math.inf
    up_cap: float = math.inf

    @property
    def has_caps(self) -> bool:
        """Whether something is capped softly."""
        return min(self.gate_cap, self.up_cap) < math.inf

    def text(self) -> str:
        """What ``parse`` reads: the activation, and what differs from the defaults."""
        default = GatingForm(activation=self.activation)
        changes = [f"{k}={float(v):.9g}" for k, v in vars(self).items() if v != getattr(default, k)]
        return ",".join([self.activation, *changes])

    @staticmethod
    def parse(text: str) -> GatingForm:
        """From text, which may come from a file.

        Raises:
            ConfigError: it describes no gating that is known here.
        """
        name, *changes = text.split(",")
        if name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ConfigError(f"experts with activation {name[:80]!r} are not supported; supported: {known}")
        try:
            values = {key: float(value) for key, _, value in (change.partition("=") for change in changes)}
            flags = {key: bool(values.pop(key)) for key in ("has_gate", "clamps_activation") if key in values}
            form = GatingForm(activation=name, **values, **flags)  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{text[:80]!r} describes no gating of experts") from error
        if not form._is_sensible():
            raise ConfigError(f"{text[:80]!r} describes no gating of experts")
        return form

    def _is_sensible(self) -> bool:
        positive = min(self.limit, self.gate_cap, self.up_cap) > 0
        capped = GatingForm(activation="silu", alpha=self.alpha, gate_cap=self.gate_cap, up_cap=self.up_cap)
        finite = math.isfinite(self.alpha) and math.isfinite(self.offset)
        return finite and positive and (self == capped or not self.has_caps)

    def __call__(self, *products: Tensor) -> Tensor:
        """The gating, see ``Gating``."""
        if not self.has_gate:
            return self._activated(*products)
        gate, up = products
        if self.has_caps:
            open_gate = torch.sigmoid(gate if self.alpha == 1.0 else self.alpha * gate)
            return _capped(gate, self.gate_cap) * open_gate * _capped(up, self.up_cap)
        if self.limit < math.inf:
            up = up.clamp(-self.limit, self.limit)
            if not self.clamps_activation:
                gate = gate.clamp(max=self.limit)
        act = self._activated(gate)
        if self.clamps_activation:
            act = act.clamp(max=self.limit)
        return act * (up + self.offset if self.offset else up)

    def _activated(self, x: Tensor) -> Tensor:
        if self.alpha != 1.0:
            return x * torch.sigmoid(self.alpha * x)
        return _ACTIVATIONS[self.activation](x)


def _capped(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap if cap < math.inf else x


def finite_or_zero(limit: float) -> float:
    """As kernels are told that nothing is limited."""
    return limit if limit < math.inf else 0.0


def gating(text: str) -> GatingForm:
    """The gating of a ``GatingForm``'s text, of which "silu" is one.

    Raises:
        ConfigError: one that is not known here.
    """
    return GatingForm.parse(text)


def probe(has_gate: bool = True) -> tuple[Tensor, ...]:
    """Gate and up, or up, ``[n, n]`` float32 on the CPU on which gatings are told apart.

    Far out, too: some families clamp at 7 or 10.
    """
    near = torch.linspace(-6, 6, 49, dtype=torch.float32, device="cpu")
    far = torch.tensor([7.5, 9.0, 12.0, 24.0, 100.0, 1000.0], dtype=torch.float32, device="cpu")
    values = torch.cat([-far, near, far])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    return (gate, up) if has_gate else (up,)


def form_of(function: Gating, has_gate: bool = True) -> GatingForm | None:
    """The form that ``function`` computes, None if it is none of those known.

    Found by trying: modules name and wrap their activations in many ways.
    """
    given = probe(has_gate)
    result = function(*given)
    for form in _candidates(function, has_gate):
        if torch.allclose(result, form(*given), rtol=1e-5, atol=1e-6):
            return form
    return None


def _candidates(function: Gating, has_gate: bool) -> Iterator[GatingForm]:
    """All that ``function`` can be, with the constants that its values at a few points ask for."""
    forms = [GatingForm(activation=name, has_gate=has_gate) for name in _ACTIVATIONS]
    yield from forms
    one = torch.ones(1, dtype=torch.float64, device="cpu")

    def value(*at: float) -> float:
        return float(function(*(one * x for x in at)))

    # In up the gating is linear: slope and offset at gate 1, then what is left of a large value.
    slope = value(1, 1) - value(1, 0) if has_gate else 1.0
    if slope == 0 or not math.isfinite(slope):
        return
    alpha = _alpha(slope if has_gate else value(1))
    if alpha is not None:
        forms.append(GatingForm(activation="silu", has_gate=has_gate, alpha=alpha))
        yield forms[-1]
    if not has_gate:
        return
    offset = _rounded(value(1, 0) / slope)
    limit = _rounded(value(1, 1e6) / slope - offset)
    if not (math.isfinite(offset) and limit > 0):
        return
    limit = limit if limit < 1e5 else math.inf
    for form in forms:
        for clamps in (False, True):
            yield replace(form, limit=limit, clamps_activation=clamps, offset=offset)
    bound = value(1e6, 1)
    if bound:
        gate_cap = _cap(value(1, 1) / bound * (1 + math.exp(-1)))
        yield GatingForm(activation="silu", gate_cap=gate_cap, up_cap=_cap(bound / value(1e6, 1e6)))


def _alpha(value: float) -> float | None:
    """Where sigmoid is ``value``, None where it never is."""
    return _rounded(math.log(value / (1 - value))) if 0 < value < 1 else None


def _cap(ratio: float) -> float:
    """The soft cap that at 1 lets this part of it pass, infinite where there is none."""
    cap = _rounded(1 / math.atanh(ratio)) if 0 < ratio < 1 else math.inf
    return cap if 0 < cap < 1e5 else math.inf


def _rounded(value: float) -> float:
    """To what people write: some gatings compute in float32 whatever they are given."""
    return float(f"{value:.6g}") if abs(value) > 1e-6 else 0.0
