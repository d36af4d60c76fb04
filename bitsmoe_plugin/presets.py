"""What each ``method`` of ``BitsMoEConfig`` sets."""

from __future__ import annotations

from typing import Any

from bitsmoe_plugin.options import ALL_WIDTHS, METHOD_NAMES, OPTIONS

__all__ = ["ALL_WIDTHS", "METHODS"]

METHODS: dict[str, dict[str, Any]] = {
    method: {name: option.by_method[method] for name, option in OPTIONS.items() if option.by_method}
    for method in METHOD_NAMES
}
"""What each method sets; options that are given replace it. "fast" leaves out what takes long: see
examples/speed.md and examples/quality.md for what that saves and costs. "paper-v1" and "paper-v2" are our
reading of the two versions of arXiv 2606.00079, whose quantizer was never published."""
