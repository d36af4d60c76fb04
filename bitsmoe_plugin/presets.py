"""What each ``method`` of ``BitsMoEConfig`` sets."""

from __future__ import annotations

from typing import Any

ALL_WIDTHS = (0, 1, 2, 3, 4, 6, 8, 16)
_PAPER = {
    "widths": ALL_WIDTHS,
    "grid": "uniform",
    "basis_bits": 16,
    "joint_basis": False,
    "whitening": False,
    "cost": "spectral",
    "token_weighting": "none",
    "neuron_weighting": False,
    "covariance_prior": 0.0,
    "feedback": False,
    "widening": False,
    "refit": False,
    "compensation": False,
    "sequential": False,
    "scope": "layer",
}
_DEFAULT: dict[str, Any] = {
    "widths": ALL_WIDTHS,
    "grid": "trellis",
    "basis_bits": 4,
    "joint_basis": True,
    "whitening": True,
    "cost": "output",
    "token_weighting": "residual",
    "neuron_weighting": True,
    "covariance_prior": 1.0,
    "feedback": True,
    "widening": True,
    "refit": True,
    "compensation": True,
    "sequential": True,
    "scope": "global",
}
METHODS: dict[str, dict[str, Any]] = {
    "default": _DEFAULT,
    "fast": {
        **_DEFAULT,
        "cost": "model",
        "feedback": False,
        "refit": False,
        "compensation": False,
        "sequential": False,
    },
    "paper-v1": _PAPER,
    "paper-v2": {**_PAPER, "basis_bits": 8, "scope": "global"},
}
"""What each method sets; options that are given replace it. "fast" leaves out what takes long: see
examples/speed.md and examples/quality.md for what that saves and costs. "paper-v1" and "paper-v2" are our
reading of the two versions of arXiv 2606.00079, whose quantizer was never published."""
