"""Lets torchvision's Python part be imported next to a torch for CPUs.

torchvision's wheels for GPUs cannot load their compiled part there and stop at the first operator of it that
they register something for. With this folder on PYTHONPATH, torch declares those operators when it is
imported (entry point group ``torch.backends``); images are resized by torch's own operators.
"""

from __future__ import annotations

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []


def declare() -> None:
    """Called by torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    _declared.append(library)  # it ends with its object
