"""Models whose routed experts are not where, or not what, can be quantized: refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from bitsmoe_plugin.errors import QuantizationError


def refuse_unfused(model: nn.Module, model_type: str) -> None:
    """Name the experts of a model whose modules hold no fused ones, if there are any.

    Raises:
        QuantizationError: there are.
    """
    kinds = sorted({(type(m).__module__, type(m).__name__) for m in model.modules()})
    own = [name for module, name in kinds if module == type(model).__module__]
    family = own[0][: _common(own[0], own[-1])]  # of which "Moe" may be a part
    names = dict.fromkeys(name for _, name in kinds)
    unknown = [n for n in names if re.search("experts|moe", n.removeprefix(family), re.IGNORECASE)]
    if unknown:
        raise QuantizationError(
            f"model type {model_type!r} cannot be quantized: its experts ({', '.join(unknown)}) are not "
            "stored as transformers' fused experts are: down_proj, and gate_up_proj or up_proj, all 3-D"
        )


def _common(first: str, last: str) -> int:
    """How many letters two names begin with alike; of sorted names, all that are between do too."""
    pairs = zip(first, last, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def check_one_list(layers: Sequence[tuple[str, str]], model_type: str) -> None:
    """Refuse what calibration, which walks one list of decoder layers, cannot reach.

    Args:
        layers: paths of modules of routed experts and of the decoder layers that hold them.

    Raises:
        QuantizationError: they are in several lists, or several in one layer.
    """
    lists = dict.fromkeys(layer.rpartition(".")[0] for _, layer in layers)
    if len(lists) > 1:
        raise QuantizationError(
            f"model type {model_type!r} cannot be quantized: routed experts stand in several lists of "
            f"decoder layers ({', '.join(lists)}), and calibration walks one"
        )
    found: dict[str, str] = {}
    for name, layer in layers:
        if found.setdefault(layer, name) != name:
            raise QuantizationError(
                f"model type {model_type!r} cannot be quantized: {found[layer]} and {name} stand in one "
                "decoder layer, and only one module of routed experts per layer is supported"
            )
