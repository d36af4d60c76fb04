"""``model.num_parameters()`` of a packed model: of the model that it stands for, not of its packed words.

transformers' own count knows packed elements of bitsandbytes alone, and no quantizer is asked.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from bitsmoe_plugin.experts import BitsMoEExperts


def count_original_parameters(model: PreTrainedModel) -> None:
    """Let ``num_parameters`` of a model and the models in it count the experts' original weights."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.num_parameters = MethodType(num_parameters, module)  # type: ignore[method-assign]


def count_plain_parameters(model: PreTrainedModel) -> None:
    """Undo ``count_original_parameters``."""
    for module in model.modules():
        vars(module).pop("num_parameters", None)


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """See ``PreTrainedModel.num_parameters``. Packed experts are not trained."""
    count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    packed = [module for module in model.modules() if isinstance(module, BitsMoEExperts)]
    return count + sum(_original(module) - sum(p.numel() for p in module.parameters()) for module in packed)


def _original(module: BitsMoEExperts) -> int:
    shape = module.whole_shape
    biases = shape.num_experts * (2 * shape.intermediate_size + shape.hidden_size)
    return shape.weights + (biases if module.spec.has_bias else 0)
